"""Every script on a real GPU: what tests/test_simulated_cuda.py claims, and what only a GPU can show. Skipped without
one; `make gpu` runs it first.
"""

import warnings

import pytest
import torch
from gpu_commands import ASYNC, COMMANDS, DNI, NARROW, OVERFLOWS, TOY, check_an_overflow, check_compiled, command_name
from running import PARALLEL, SEQUENTIAL, load_script
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.analysis.costs import peak_memory
from decoupled.logs import read_log
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training.run import Run
from decoupled.training.steps import Steps

load_script(ASYNC)  # its folder can be imported from now on
from replay_buffer import ReplayBuffer  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def half(command):
    return () if command[0] == DNI else ("--half",)


def epochs(command):
    return 1 if command[0] == SEQUENTIAL else 2  # of a later module no other number of epochs can be resumed


@pytest.fixture
def no_waiting(monkeypatch):
    """PyTorch raises where the host would wait for the device, from getting a mini-batch to asking for the next."""
    real = Run.progress

    def progress(run, batches):
        for batch in real(run, batches):
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield batch
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "progress", progress)


@pytest.mark.parametrize("command", COMMANDS, ids=command_name)
def test_runs_then_resumes(on_gpu, command):
    on_gpu(command, *half(command), "--epochs", 1)
    left = on_gpu(command, *half(command), "--epochs", epochs(command), "--resume")
    frame = read_log(left.log)
    assert frame.epoch.max() == epochs(command) and frame.test_top1.between(0, 100).all()
    assert ("fp16 mixed" if half(command) else "fp32") in left.log.read_text()
    assert all(weight.isfinite().all() for weight in left.weights.values())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] != ASYNC], ids=command_name)
def test_no_step_waits_for_the_gpu(on_gpu, no_waiting, command):
    """An asynchronous layer begins its pass over the images within a turn, where their order is sent."""
    on_gpu(command, *half(command), "--epochs", 1)


@pytest.mark.parametrize("command", COMMANDS, ids=command_name)
def test_deterministic_resumes_bit_for_bit(on_gpu, tmp_path, command):
    flags = (*half(command), "--deterministic")
    with warnings.catch_warnings():
        kind = "error" if command[0] in (PARALLEL, SEQUENTIAL) else "ignore"  # those networks have no such operation
        warnings.filterwarnings(kind, ".*does not have a deterministic implementation")
        whole = on_gpu(command, *flags, "--epochs", epochs(command), "--name", "whole")
        lines, weights = whole.lines, whole.weights
        on_gpu(command, *flags, "--epochs", 1, "--name", "parts")
        parts = on_gpu(command, *flags, "--epochs", epochs(command), "--name", "parts", "--resume")
    assert parts.lines == lines
    assert all(torch.equal(weight, weights[name]) for name, weight in parts.weights.items())


@pytest.mark.parametrize("command", OVERFLOWS, ids=command_name)
def test_an_overflow_in_one_module_costs_it_one_step_and_half_its_loss_scale(on_gpu, overflow, command):
    check_an_overflow(on_gpu, overflow, command)


def test_dni_refuses_fp16(fails):
    message = fails(DNI, *TOY, *NARROW, "--dni", "--device", "cuda", "--half")
    assert "--half" in message


@pytest.mark.parametrize("command", [(PARALLEL, *TOY, *NARROW), (SEQUENTIAL, *TOY, *NARROW)], ids=command_name)
def test_compiled_modules_learn_the_same(on_gpu, command):
    plain = read_log(on_gpu(command, "--epochs", 1, "--name", "plain").log)
    compiled = read_log(on_gpu(command, "--epochs", 1, "--name", "compiled", "--compile").log)
    assert (plain.loss - compiled.loss).abs().max() < 0.02


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_compiled_graphs_replay_what_plain_modules_do(half):
    """By CUDA graphs; no tensor that has left a module is written over by a later replay."""
    torch.compiler.reset()
    check_compiled("cuda", half, tolerance=0.05 if half else 1e-3)


# Memory

BATCH = 128


def dgl_step(device, whole):
    """A step of DGL on the network of learning_curves or, ``whole``, of back-propagation of its last head."""
    torch.manual_seed(0)
    net = layerwise_cnn(channels=64, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=10)
    steps = Steps(torch.device(device), half=False)
    steps.prepare(net, compiled=False)
    parts = [torch.nn.Sequential(*(module.body for module in net), net[-1].auxiliary)] if whole else net
    optimizers = [SGD(part.parameters(), lr=0.1, momentum=0.9, fused=True) for part in parts]
    images = torch.zeros(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)

    def step():
        representation = images
        for part, optimizer in zip(parts, optimizers, strict=True):
            representation, logits = (None, part(representation)) if whole else part(representation)
            steps.step(F.cross_entropy(logits, labels), optimizer)
            representation = None if whole else representation.detach()

    return step


def test_the_allocators_peak_is_what_decoupled_costs_counts():
    """But for the workspaces of cuDNN and the allocator's rounding; and DGL's is less than back-propagation's."""
    peaks = {}
    for whole in (False, True):
        counted = peak_memory(dgl_step("cpu", whole))
        step = dgl_step("cuda", whole)
        step()  # makes the momentum, and lets cuDNN time its kernels in workspaces of their own
        measured = peaks[whole] = peak_memory(step, "cuda")
        assert 0.7 * counted < measured < 1.3 * counted + 2**26
    assert peaks[False] < peaks[True]


# Replay buffers in main memory


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_buffer_in_pinned_memory_gives_back_what_was_written_without_waiting(bits):
    shape = (64, 32, 32)
    buffers = [
        ReplayBuffer(3, BATCH, shape, device="cuda", storage_device=storage, bits=bits) for storage in ("cpu", "cuda")
    ]
    kept = [value for value in buffers[0].tensors().values() if value.device.type == "cpu"]
    assert kept and all(value.is_pinned() for value in kept)
    labels, busy = torch.arange(BATCH, device="cuda"), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        read = []
        for n in range(8):  # more than its slots: a slot is written again while a copy from it may not have begun
            for _ in range(20):
                busy = (busy @ busy).tanh()
            representation = torch.randn(BATCH, *shape, device="cuda").to(memory_format=torch.channels_last)
            for buffer in buffers:
                buffer.write(representation, labels, n)
            read.append([buffer.read().representation.clone() for buffer in buffers])
        del representation
    finally:
        torch.cuda.set_sync_debug_mode("default")
    saved = [buffer.state_dict()["tensors"] for buffer in buffers]  # waits for what was written last
    assert all(torch.equal(pinned, there) for pinned, there in read)
    assert all(torch.equal(value, saved[1][name].cpu()) for name, value in saved[0].items() if name != "labels")
