"""Every script on a GPU that is simulated: all tensors on it, no wait for it within a step, as many operations a step
as tests/gpu_commands.py lists, and real fp16 with a loss scale for each module.
"""

import os
from collections import Counter

import pytest
import torch
from gpu_commands import ASYNC, COMMANDS, DNI, LAYERS, NARROW, OVERFLOWS, TOY, check_an_overflow, command_name
from running import PARALLEL, SEQUENTIAL
from simulated_cuda import DeviceError, simulated_cuda
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from decoupled.logs import read_log
from decoupled.training.run import Run


class NarrowResNet(ResNet):
    """ResNet-18 with an eighth of the channels: CPUs compute fp16 convolutions slowly."""

    def __init__(self, classes):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(64, classes)

    def _make_layer(self, block, planes, *options, **more):
        if planes == 64:  # the first of four
            self.inplanes = 8
        return super()._make_layer(block, planes // 8, *options, **more)


@pytest.fixture(autouse=True)
def narrow_resnet18(monkeypatch):
    real = models.get_model

    def get_model(name, num_classes, **options):
        return NarrowResNet(num_classes) if name == "resnet18" else real(name, num_classes=num_classes, **options)

    monkeypatch.setattr(models, "get_model", get_model)


@pytest.fixture
def follow(monkeypatch):
    """follow(gpu) → for each epoch trained from now on, for each of its mini-batches but the last (operations, syncs),
    from getting it to having the next one. A turn of one layer counts as a mini-batch.
    """
    epochs = []
    real = Run.progress

    def start(gpu):
        def progress(run, batches, **options):
            epochs.append([])
            before = None
            for batch in real(run, batches, **options):
                now = Counter(gpu.operations), Counter(gpu.syncs)
                if before is not None:
                    epochs[-1].append([after - then for after, then in zip(now, before, strict=True)])
                before = now
                yield batch

        monkeypatch.setattr(Run, "progress", progress)
        return epochs

    return start


@pytest.mark.parametrize("command", COMMANDS, ids=command_name)
def test_on_one_device_without_waiting_for_it(on_gpu, follow, command):
    half = () if command[0] == DNI else ("--half",)
    epochs = 1 if command[0] == SEQUENTIAL else 2  # of a later module no other number of epochs can be resumed
    with simulated_cuda() as gpu:
        steps = follow(gpu)
        on_gpu(command, *half, "--epochs", 1)
        left = on_gpu(command, *half, "--epochs", epochs, "--resume")
    frame = read_log(left.log)
    assert frame.epoch.max() == epochs and frame.test_top1.between(0, 100).all()
    assert (
        f"cuda (simulated), {torch.get_num_threads()} threads, {'fp16 mixed' if half else 'fp32'}"
        in left.log.read_text()
    )
    assert all(weight.isfinite().all() for weight in left.weights.values())
    if "--static-loss-scale" in command:
        assert {scaler["scale"] for scaler in left.state["scalers"]} == {command[-1]}
    syncs = sum((waits for epoch in steps for _, waits in epoch), Counter())
    for why, place in [*syncs]:  # an asynchronous layer begins its pass over the images in a turn of its own
        if command[0] == ASYNC and place.endswith("(draw)"):
            del syncs[why, place]
    assert not syncs
    turns = LAYERS if command[0] == ASYNC else 1
    counted = [sum(operations.total() for operations, _ in epoch[-turns:]) for epoch in steps]
    expected = COMMANDS[command] * (len(steps) // len(COMMANDS[command]))
    assert counted == pytest.approx(expected, rel=0.01)  # PyTorch's releases differ a little


@pytest.mark.parametrize("command", OVERFLOWS, ids=command_name)
def test_an_overflow_in_one_module_costs_it_one_step_and_half_its_loss_scale(on_gpu, overflow, command):
    with simulated_cuda():
        check_an_overflow(on_gpu, overflow, command)


def switches():
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_deterministic_is_for_cuda_and_for_one_run(on_gpu, fails, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    message = fails(PARALLEL, *TOY, *NARROW, "--device", "cpu", "--deterministic")
    assert "--deterministic" in message and "CUDA" in message
    with simulated_cuda():
        left = on_gpu((PARALLEL, *TOY, *NARROW), "--epochs", 1, "--deterministic")
        assert switches() == (True, True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert read_log(left.log).attrs["arguments"]["deterministic"] is True
        left = on_gpu((PARALLEL, *TOY, *NARROW), "--epochs", 1)
        assert switches() == (False, False, True) and "deterministic" not in read_log(left.log).attrs["arguments"]


def test_what_the_simulation_refuses_and_counts():
    with simulated_cuda() as gpu:
        here, there = torch.arange(4.0), torch.arange(4.0).to("cuda")
        assert (str(there.device), there.is_cuda, str(here.device)) == ("cuda:0", True, "cpu")
        for wrong in (
            lambda: here + there,
            lambda: torch.stack([here.sum(), there.sum()]),  # a scalar of the CPU goes into pointwise operations only
            lambda: here[there.long()],
            lambda: there.numpy(),
            lambda: there.normal_(generator=torch.Generator()),
            lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(DeviceError):
                wrong()
        gpu.syncs.clear()
        gpu.operations.clear()
        pinned, total = torch.zeros(4).pin_memory(), there * 2 + here.sum()
        pinned.copy_(total.view(2, 2).flatten(), non_blocking=True)
        assert not gpu.syncs and pinned.tolist() == [6, 8, 10, 12]
        assert sorted(name for name, _ in gpu.operations.elements()) == ["aten::add", "aten::copy_", "aten::mul"]
        for waits in (
            lambda: total.sum().item(),
            lambda: bool(total.any()),
            lambda: total.cpu(),
            lambda: total.to("cpu", non_blocking=True),  # which is not pinned
            lambda: pinned.to("cuda"),
            lambda: total[total > 1],
            lambda: total[here.long()],
            lambda: total.nonzero(),
            lambda: total.tolist(),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: here.copy_(total),
        ):
            gpu.syncs.clear()
            waits()
            assert gpu.syncs
    assert str(there.device) == "cpu"
