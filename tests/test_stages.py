"""Modules that learn at the same time in several processes give what one process gives, to the bit; and what happens
when one of them is killed, hangs, is told to stop or cannot go on.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import PARALLEL, ROOT, Finished, launch, small
from test_stopping import assert_same

from decoupled import InputError
from decoupled.data.batches import Outline
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.parallel.balance import Layout, check_lengths, cut, survey
from decoupled.parallel.mesh import Mesh

# 3 batches an epoch, the last of 8; 4 of test images, the last of 59: a process sends 7 mini-batches an epoch.
TOY = "--dataset digits --train-samples 40 --batch-size 16 --test-batch-size 100 --device cpu --epochs 2"


def toy(script, *flags):
    return [script, *TOY.split(), *map(str, flags)]


def said(stderr):
    """What the processes themselves wrote, without the agent's lines."""
    return [line for line in stderr.splitlines() if line.startswith(("cifar_dgl.py", "Traceback", PARALLEL))]


def names(script):
    """What to replace in a script of ours, so that its network is small."""
    ours = not Path(script).is_absolute() and "layerwise_cnn" in (ROOT / script).read_text()
    return {"layerwise_cnn": small()} if ours else {}


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


SAME = [  # processes, script, flags
    (2, "aux_nets/cifar_dgl.py", "--channels 2 --depth 5 --lr-step 1 --modules-per-stage 4,1"),
    (3, "dni/cifar_dgl.py", "--channels 2 --log-interval 1"),
    (3, "ddg_comparison/cifar_dgl.py", "--depth 20 --splits 3 --milestones 2 --half --queue 1"),
    (3, PARALLEL, "--half"),
    (4, PARALLEL, "--precise-statistics"),
]


def test_any_number_of_processes_gives_what_one_gives_to_the_bit(run_script, tmp_path):
    """Weights, batch norm, momentum, meters, schedules, images' place, every line; also of a network that decouple()
    has cut. And where the highest is slow, the others hold few mini-batches; images the lowest alone.
    """
    script = (ROOT / PARALLEL).read_text()
    (tmp_path / "own").mkdir()
    own = tmp_path / "own/own_dgl.py"
    own.write_text(script.replace("from decoupled.networks.modules import layerwise_cnn\n", OWN))
    same = [*SAME, (2, str(own), "")]
    runs = []
    for number, (processes, script, flags) in enumerate(same):
        words = toy(script, *flags.split(), "--log-dir", tmp_path / str(number))
        runs.append({"processes": processes, "words": words})
    runs[3] |= {"faults": {"2": [1, "slow"]}, "held": str(tmp_path / "held")}
    for number, (outcome, stderr) in enumerate(launch(*runs)):
        assert outcome == "finished" and not said(stderr), stderr
        processes, script, flags = same[number]
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


def test_signals_deaths_and_errors(run_script, tmp_path):
    """Whatever happens to one process, the others end well, one says why, and what goes on ends as if nothing had."""
    whole = run_script(*toy(PARALLEL), folder=tmp_path / "whole", **names(PARALLEL))
    again, stopped, other, late = (
        ["--log-dir", str(tmp_path / name)] for name in ("again", "stopped", "other", "late")
    )
    kills = {"1": [1, "SIGKILL", 0], "0": [9, "SIGKILL", 1], "2": [5, "SIGKILL", 2]}
    runs = [
        {"processes": 3, "restarts": 3, "words": toy(PARALLEL, *again), "faults": kills},
        {"processes": 3, "words": toy(PARALLEL, *stopped, "--queue", 1), "faults": {"2": [1, "SIGTERM"]}},
        {"processes": 2, "words": toy(PARALLEL, *stopped, "--resume"), "faults": {"0": [3, "SIGINT"]}},
        {"processes": 4, "words": toy(PARALLEL, *stopped, "--resume", "--queue", 1), "faults": {"1": [5, "SIGTERM"]}},
        {"processes": 3, "words": toy(PARALLEL, *late, "--timeout", 4), "faults": {"2": [4, "SIGSTOP"]}},
        {"processes": 3, "words": toy(PARALLEL, *other), "faults": {"1": [2, "error"]}},
        {"processes": 5, "words": toy(PARALLEL, *other)},
        {"processes": 2, "words": toy(PARALLEL, *other, "--batch-size", "none")},
    ]
    outcomes, messages = zip(*launch(*runs), strict=True)
    killed, *stops, hung, broken, many, wrong = map(said, messages)

    # Killed before there is an epoch's checkpoint, amid an epoch, amid evaluation: started again from the checkpoint
    assert outcomes[0] == "finished", messages[0]
    for rank, line in zip((1, 0, 2), killed, strict=True):
        assert f"process {rank} has ended" in line
    left = Finished(tmp_path / "again")
    assert left.log.read_text().count("# resumed after ") == 2  # that of a run killed before it saved is forgotten
    assert_same(left, whole)

    # A signal to any stops all after one mini-batch, and another number of processes goes on
    assert outcomes[1:4] == ("[143]", "[130]", "[143]"), messages[1:4]
    for stop in stops:
        assert len(stop) == 1 and "stopped after epoch" in stop[0]
    left = run_script(*toy(PARALLEL, "--resume"), folder=tmp_path / "stopped", **names(PARALLEL))
    assert left.log.read_text().count("# resumed after ") == 3
    assert_same(left, whole)

    # One that hangs is named, not its neighbor, which waits for it while another waits for that one
    assert outcomes[4] != "finished" and len(hung) == 1, messages[4]
    assert "process 2 has not answered for 4 s" in hung[0] and "--timeout" in hung[0]

    # What one process cannot use ends all and is said once
    assert outcomes[5:] == ("[2]",) * 3, messages[5:]
    assert broken == ["cifar_dgl.py: error: this cannot be used: use something else"]
    assert len(many) == 1 and "5 stages are more than the 4 modules: start 4 processes or fewer" in many[0]
    assert len(wrong) == 1 and "'none' must be an integer" in wrong[0]


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

    from decoupled.analysis.costs import costs

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
    with pytest.raises(InputError, match="--stages 2 needs 2 processes or a multiple of that, not 3"):
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
