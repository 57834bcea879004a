"""Modules that learn at the same time in several processes give what one process gives, to the bit; and what happens
when one of them is killed, hangs, is told to stop or cannot go on.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from running import PARALLEL, ROOT, Finished, launch, small
from test_stopping import assert_same

from decoupled import InputError
from decoupled.images import Outline
from decoupled.mesh import Mesh
from decoupled.network import layerwise_cnn
from decoupled.partition import Layout, check_lengths, cut, survey

# 3 batches an epoch, the last of 8; 4 of test images, the last of 59: a process sends 7 mini-batches an epoch.
TOY = "--dataset digits --train-samples 40 --batch-size 16 --test-batch-size 100 --device cpu --epochs 2"


def toy(script, *flags):
    return [script, *TOY.split(), *map(str, flags)]


def said(stderr):
    """What the processes themselves wrote, without the agent's lines."""
    return [line for line in stderr.splitlines() if line.startswith(("cifar_dgl.py", "Traceback", PARALLEL))]


def names(script):
    return {"layerwise_cnn": small()} if "layerwise_cnn" in (ROOT / script).read_text() else {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process leaves of learning_curves, by the flags it has more: {flags: Finished}. Made by need."""
    left = {}

    def run(run_script, *flags):
        if flags not in left:
            folder = tmp_path_factory.mktemp("whole")
            left[flags] = run_script(*toy(PARALLEL, *flags), folder=folder, **names(PARALLEL))
        return left[flags]

    return run


SAME = [  # processes, script, flags
    (2, "aux_nets/cifar_dgl.py", "--channels 2 --depth 5 --lr-step 1 --modules-per-stage 4,1"),
    (3, "dni/cifar_dgl.py", "--channels 2 --log-interval 1"),
    (3, "ddg_comparison/cifar_dgl.py", "--depth 20 --splits 3 --milestones 2 --half --queue 1"),
    (3, PARALLEL, "--half"),
    (4, PARALLEL, ""),
]


def test_any_number_of_processes_gives_what_one_gives_to_the_bit(run_script, tmp_path):
    """Weights, batch norm, momentum, meters, schedules, images' place, every line. And where the highest is slow, the
    others hold few mini-batches; images the lowest alone.
    """
    runs = []
    for number, (processes, script, flags) in enumerate(SAME):
        words = toy(script, *flags.split(), "--log-dir", tmp_path / str(number))
        runs.append({"processes": processes, "words": words})
    runs[3] |= {"faults": {"2": [1, "slow"]}, "held": str(tmp_path / "held")}
    outcomes, stderr = launch(*runs)
    assert outcomes == ["finished"] * len(SAME) and not said(stderr), stderr
    for number, (processes, script, flags) in enumerate(SAME):
        alone = [word for word in flags.split() if word not in ("--modules-per-stage", "4,1")]
        expected = run_script(*toy(script, *alone), folder=tmp_path / f"alone {number}", **names(script))
        left = Finished(tmp_path / str(number))
        assert_same(left, expected)
        assert f"# processes: {processes}, gloo, modules " in left.log.read_text()
        assert len([*left.folder.iterdir()]) == 2  # one log, one checkpoint
    lowest, middle, highest = (json.loads((tmp_path / f"held.{rank}").read_text()) for rank in range(3))
    assert lowest["images"] > 40 and middle["images"] == highest["images"] == 0
    assert lowest["room"] == highest["pack"] == 0
    assert 0 < lowest["pack"] <= 2 and 0 < middle["pack"] <= 2  # of 7 in an epoch
    assert 0 < middle["room"] <= 4 and 0 < highest["room"] <= 4  # 2 to arrive, that at work, the one before


def test_one_that_is_killed_is_started_again_and_the_run_goes_on_from_its_checkpoint(run_script, tmp_path, whole):
    """The first amid an epoch, the middle one before there is an epoch's checkpoint, the last amid evaluation."""
    runs = []
    for rank, call in ((0, 9), (1, 1), (2, 12)):
        words = toy(PARALLEL, "--log-dir", tmp_path / str(rank))
        runs.append({"processes": 3, "restarts": 1, "words": words, "faults": {str(rank): [call, "SIGKILL"]}})
    outcomes, stderr = launch(*runs)
    assert outcomes == ["finished"] * 3, stderr
    for rank, line in zip(range(3), said(stderr), strict=True):
        assert f"process {rank} has ended" in line
        left = Finished(tmp_path / str(rank))
        assert left.log.read_text().count("# resumed after ") == 1
        assert_same(left, whole(run_script))


def test_a_signal_to_any_process_stops_all_after_one_mini_batch_and_another_number_goes_on(run_script, tmp_path, whole):
    where = ("--log-dir", tmp_path)
    outcomes, stderr = launch(
        {"processes": 3, "words": toy(PARALLEL, *where, "--queue", 1), "faults": {"2": [1, "SIGTERM"]}},
        {"processes": 2, "words": toy(PARALLEL, *where, "--resume"), "faults": {"0": [3, "SIGINT"]}},
        {"processes": 4, "words": toy(PARALLEL, *where, "--resume", "--queue", 1), "faults": {"1": [5, "SIGTERM"]}},
    )
    assert outcomes == ["[143]", "[130]", "[143]"], stderr
    assert len(said(stderr)) == 3 and all("stopped after epoch" in line for line in said(stderr))
    left = run_script(*toy(PARALLEL, "--resume"), folder=tmp_path, **names(PARALLEL))
    assert left.log.read_text().count("# resumed after ") == 3
    assert_same(left, whole(run_script))


def test_one_that_hangs_is_named_within_the_timeout(tmp_path):
    """Not its neighbor, which waits for it while another waits for that one."""
    words = toy(PARALLEL, "--log-dir", tmp_path, "--timeout", 4)
    outcomes, stderr = launch({"processes": 3, "words": words, "faults": {"2": [4, "SIGSTOP"]}})
    assert len(said(stderr)) == 1, stderr
    (line,) = said(stderr)
    assert "process 2 has not answered for 4 s" in line and "--timeout" in line
    assert outcomes != ["finished"]


def test_what_one_process_cannot_use_ends_all_and_is_said_once(tmp_path):
    words = toy(PARALLEL, "--log-dir", tmp_path)
    outcomes, stderr = launch(
        {"processes": 3, "words": words, "faults": {"1": [2, "error"]}},
        {"processes": 5, "words": words},
        {"processes": 2, "words": [*words, "--modules-per-stage", "1,2"]},
        {"processes": 2, "words": [*words, "--batch-size", "none"]},
    )
    assert outcomes == ["[2]"] * 4, stderr
    first, *lines = said(stderr)
    assert first == "cifar_dgl.py: error: this cannot be used: use something else"
    assert "5 stages are more than the 4 modules: start 4 processes or fewer" in lines[0]
    assert "--modules-per-stage 1,2 is 2 numbers for 3 modules, and there are 2 stages and 4 modules" in lines[1]
    assert "'none' must be an integer" in lines[2] and len(lines) == 3


def test_costs_are_cut_where_the_busiest_has_least():
    assert cut([13, 85, 160, 88], 2) == (2, 2)
    assert cut([13, 85, 160, 88], 3) == (2, 1, 1)
    assert cut([13, 85, 160, 88], 4) == (1, 1, 1, 1)
    assert cut([5, 1, 1, 1], 2) == (1, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.randint(1, 9, (6,), generator=generator).tolist()
        least = min(max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for b in range(2, 6) for a in range(1, b))
        lengths = cut(costs, 3)
        pieces = [costs[sum(lengths[:n]) : sum(lengths[: n + 1])] for n in range(3)]
        assert max(map(sum, pieces)) == least and min(lengths) >= 1


def test_the_survey_counts_as_costs_does_and_leaves_the_network_alone():
    from contextlib import nullcontext

    from decoupled.costs import costs

    net = layerwise_cnn(channels=4, depth=3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    flops, layouts, _ = survey(net, images, nullcontext)
    expected = costs(net, images).xs("module", level="part")["training_flops"]
    assert flops == [2 * count for count in expected]
    assert [layout.dtype for layout in layouts] == [torch.float32] * 3
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters()) and net.training


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 4), (2, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_representation_arrives_as_it_was_in_memory_too(shape, channels_last):
    representation = torch.rand(shape).bfloat16()
    if channels_last and len(shape) == 4:
        representation = representation.contiguous(memory_format=torch.channels_last)
    layout = Layout(representation)
    packed = layout.pack(representation)
    assert packed.is_contiguous() and packed.data_ptr() == representation.data_ptr()
    arrived = layout.room(5, "cpu")
    arrived[:2] = packed
    arrived = layout.unpack(arrived[:2])
    assert torch.equal(arrived, representation) and arrived.dtype == representation.dtype
    assert arrived.stride() == representation.stride()


def test_modules_and_processes_must_fit():
    check_lengths(None, 4, 3)
    check_lengths([1, 2, 1], 4, 3)
    for lengths, processes in (([4], 2), ([1, 1, 1], 3), ([2, 2], 1)):
        with pytest.raises(InputError, match="give each stage its number"):
            check_lengths(lengths, 4, processes)


def test_a_mesh_numbers_the_replicas_of_a_stage_one_after_the_other():
    def place(rank, size, stages):
        mesh = Mesh(SimpleNamespace(rank=rank, size=size, control=None, group=lambda *_: None), stages)
        return mesh.stage, mesh.replica, mesh.replicas, mesh.below, mesh.above

    assert [place(rank, 4, 2)[:3] for rank in range(4)] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    assert place(1, 4, 2)[4] == 3 and place(3, 4, 2)[3] == 1
    assert place(1, 3, 3)[:3] == (1, 0, 1) and place(2, 3, 1)[:3] == (0, 2, 3)
    with pytest.raises(InputError, match="3 processes do not divide into --stages 2: start 2, or a multiple of it"):
        place(0, 3, 2)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1])
def test_an_outline_has_the_sizes_of_the_shares_that_come(replicas, limit):
    """17 samples in mini-batches of 8: 8, 8, 1, each shared among the replicas as torch.tensor_split does."""
    wholes = [range(8), range(8), range(1)][:limit]
    for replica in range(replicas):
        outline = Outline(17, 8, len(wholes), replica, replicas)
        outline.begin()
        shares = [len(torch.tensor(whole).tensor_split(replicas)[replica]) for whole in wholes]
        assert len(outline) == len(wholes) and outline.left == [share for share in shares if share]
        assert outline.common == (2 if replicas > 1 and limit is None else len(wholes))
        for whole, share in zip(wholes, outline.left, strict=False):
            outline.advance()
            assert outline.weight == share * replicas / len(whole)


OWN = """
import torch
from torch import nn
from decoupled import decouple

def block(below, width):
    return nn.Sequential(nn.Conv2d(below, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))

def layerwise_cnn(classes, **_):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return decouple(nn.Sequential(block(3, 4), block(4, 8), block(8, 8), head), images, splits=3)
"""


def test_a_network_that_decouple_has_cut_learns_in_several_processes_as_in_one(tmp_path):
    script = (ROOT / "learning_curves/cifar_dgl.py").read_text()
    (tmp_path / "own").mkdir()
    path = tmp_path / "own/own_dgl.py"
    path.write_text(script.replace("from decoupled.network import layerwise_cnn\n", OWN))
    flags = [
        "--dataset",
        "digits",
        "--train-samples",
        "40",
        "--batch-size",
        "16",
        "--test-batch-size",
        "200",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for words in ([], torchrun):
        folder = tmp_path / f"logs{len(words)}"
        command = [sys.executable, *words, str(path), *flags, "--log-dir", str(folder)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(Finished(folder))
    alone, together = results
    assert alone.lines == together.lines and len(alone.lines) == 3
    assert alone.weights.keys() == together.weights.keys()
    assert all(torch.equal(value, together.weights[key]) for key, value in alone.weights.items())
