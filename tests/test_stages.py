"""Modules that learn at the same time in several processes give what one process gives, to the bit; and what happens
when one of them is killed, hangs, fails or is told to stop.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from running import PARALLEL, ROOT, Finished, launch

from decoupled import InputError
from decoupled.analysis.costs import costs
from decoupled.data.batches import Batches, Outline
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.parallel.balance import TensorFormat, balance, check_modules_per_stage, survey
from decoupled.parallel.mesh import Mesh, fingerprints

# 3 mini-batches per epoch, the last of 8 images; 3 of the evaluation, the last of 19.
DATA = "--dataset digits --train-samples 40 --validation 59 --batch-size 16 --test-batch-size 20 --device cpu"
AUX = "aux_nets/cifar_dgl.py"
SMALL = f"{DATA} --epochs 2 --lr-step 1 --channels 2 --depth 5"  # with AUX

# Beside learning_curves' build: a network of one's own
OWN = """
def build(args, classes):
    import torch
    from decoupled import decouple
    from torch import nn

    def block(channels, width):
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return decouple(nn.Sequential(block(3, 4), block(4, 8), block(8, 8), head), images, splits=3)


"""


def words(script, flags, folder):
    return [script, *flags.split(), "--log-dir", str(folder)]


def errors(stderr):
    """The lines by which processes ended with an error."""
    return [line for line in stderr.splitlines() if ": error: " in line or line.startswith("Traceback")]


def assert_same(left, whole):
    """The same results, and the same state to the bit, of two runs."""
    assert left.lines == whole.lines and len(whole.lines) >= 2
    assert_same_state(left.state, whole.state)


def assert_same_state(left, right):
    if isinstance(right, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(right, dict):
        assert left.keys() == right.keys()
        for key, value in right.items():
            assert_same_state(left[key], value)
    elif isinstance(right, (list, tuple)):
        assert len(left) == len(right)
        for mine, its in zip(left, right, strict=True):
            assert_same_state(mine, its)
    else:
        assert left == right


def test_any_number_of_processes_gives_what_one_gives_to_the_bit(run_script, tmp_path):
    """Weights, batch norm, momentum, meters, schedules, images' position, every line; also of a network that decouple()
    has split. And when the last process is slow, the others hold few mini-batches; images the lowest alone.
    """
    own = tmp_path / "own/own_dgl.py"
    own.parent.mkdir()
    script = (ROOT / PARALLEL).read_text().replace("\nif __name__ ==", OWN + "\nif __name__ ==")
    own.write_text(script)
    same = {  # name → (processes, script, flags, flags of several processes)
        "half": (3, AUX, f"{SMALL} --half", "--queue 1"),
        "lengths": (2, AUX, SMALL, "--modules-per-stage 4,1"),
        "statistics": (3, str(own), f"{DATA} --epochs 1 --precise-statistics", ""),
    }
    runs = {}
    for name, (processes, script, flags, parallel_flags) in same.items():
        command = words(script, f"{flags} {parallel_flags}", tmp_path / name)
        runs[name] = {"processes": processes, "words": command}
    runs["slow"] = {
        "processes": 3,
        "words": words(AUX, SMALL, tmp_path / "slow"),
        "faults": {"2": [1, "slow"]},
        "held": str(tmp_path / "held"),
    }
    for name, (outcome, stderr) in zip(runs, launch(*runs.values()), strict=True):
        assert outcome == "finished" and not errors(stderr), (name, stderr)
    for name, (processes, script, flags, _) in same.items():
        left = Finished(tmp_path / name)
        assert_same(left, run_script(script, *flags.split(), folder=tmp_path / f"alone {name}"))
        assert f"# processes: {processes}, gloo, modules " in left.log.read_text()
        assert len([*left.folder.iterdir()]) == 2  # one log, one checkpoint
    assert_same(Finished(tmp_path / "slow"), Finished(tmp_path / "lengths"))

    lowest, middle, last = (json.loads((tmp_path / f"held.{rank}").read_text()) for rank in range(3))
    assert lowest["images"] > 40 and middle["images"] == last["images"] == 0
    assert lowest["empty"] == last["pack"] == 0
    assert 0 < lowest["pack"] <= 2 and 0 < middle["pack"] <= 2  # of 6 in an epoch
    assert 0 < middle["empty"] <= 4 and 0 < last["empty"] <= 4  # 2 to arrive, the one at work, the one before


def test_signals_deaths_and_errors(run_script, tmp_path):
    """Whatever happens to one process, the others end, and what continues ends as if nothing had happened."""
    kills = {"1": [1, "SIGKILL", 0], "0": [8, "SIGKILL", 1]}  # before the first epoch is saved; in the second epoch
    whole = run_script(AUX, *SMALL.split(), folder=tmp_path / "whole")
    runs = {
        "unsaved": {
            "processes": 3,
            "restarts": 1,
            "words": words(AUX, SMALL, whole.folder),  # beside a finished run of the same name
            "faults": {"1": [0, "SIGKILL"]},
        },
        "killed": {"processes": 3, "restarts": 2, "words": words(AUX, SMALL, tmp_path / "killed"), "faults": kills},
        "SIGTERM": {
            "processes": 3,
            "words": words(AUX, f"{SMALL} --queue 1", tmp_path / "stopped"),
            "faults": {"2": [1, "SIGTERM"]},
        },
        "SIGINT": {
            "processes": 2,
            "words": words(AUX, f"{SMALL} --resume", tmp_path / "stopped"),
            "faults": {"0": [6, "SIGINT"]},
        },
        "hangs": {
            "processes": 2,
            "words": words(AUX, f"{SMALL} --timeout 2", tmp_path / "hangs"),
            "faults": {"1": [4, "SIGSTOP"]},
        },
        "error": {"processes": 2, "words": words(AUX, SMALL, tmp_path / "error"), "faults": {"0": [2, "error"]}},
        "no checkpoint": {"processes": 2, "words": words(AUX, f"{SMALL} --resume", tmp_path / "nothing")},
    }
    before = whole.checkpoint.read_bytes()
    ended = dict(zip(runs, launch(*runs.values()), strict=True))
    outcomes = {name: outcome for name, (outcome, _) in ended.items()}
    said = {name: errors(stderr) for name, (_, stderr) in ended.items()}

    # Killed before its first checkpoint: torchrun starts a run anew, and the older one stays
    assert outcomes["unsaved"] == "finished", ended["unsaved"]
    assert whole.checkpoint.read_bytes() == before
    left = Finished(whole.folder)
    assert left.log != whole.log and "# resumed after " not in left.log.read_text()
    assert_same(left, whole)

    # Killed: torchrun starts all again, and they continue from the checkpoint
    assert outcomes["killed"] == "finished", ended["killed"]
    left = Finished(tmp_path / "killed")
    assert left.log.read_text().count("# resumed after ") == 2
    assert_same(left, whole)

    # A signal to torchrun stops all processes after one mini-batch; another number of them continues
    assert (outcomes["SIGTERM"], outcomes["SIGINT"]) == ("[143]", "[130]")
    assert not said["SIGTERM"] and not said["SIGINT"]
    left = run_script(AUX, *SMALL.split(), "--resume", folder=tmp_path / "stopped")
    assert left.log.read_text().count("# resumed after epoch 1, batch ") == 1
    assert left.log.read_text().count("# resumed after ") == 2
    assert_same(left, whole)

    # One that hangs ends the others, which name it
    assert outcomes["hangs"] == "[2]" and any("process 1" in line for line in said["hangs"]), ended["hangs"]

    # One that fails says why, and the others end
    assert outcomes["error"] == "[2]"
    assert sum("this cannot be used" in line for line in said["error"]) == 1 and "Traceback" not in said["error"]

    # What process 0 cannot use is said once
    assert outcomes["no checkpoint"] == "[2]" and len(said["no checkpoint"]) == 1, ended["no checkpoint"]
    assert not [*tmp_path.glob("nothing/*")]


def test_stages_are_balanced():
    assert balance([13, 85, 160, 88], 2) == (2, 2)
    assert balance([13, 85, 160, 88], 3) == (2, 1, 1)
    assert balance([13, 85, 160, 88], 4) == (1, 1, 1, 1)
    assert balance([5, 1, 1, 1], 2) == (1, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        flops = torch.randint(1, 9, (6,), generator=generator).tolist()
        least = min(max(sum(flops[:a]), sum(flops[a:b]), sum(flops[b:])) for b in range(2, 6) for a in range(1, b))
        lengths = balance(flops, 3)
        parts = [flops[sum(lengths[:n]) : sum(lengths[: n + 1])] for n in range(3)]
        assert max(map(sum, parts)) == least and min(lengths) >= 1


def test_the_survey_counts_as_costs_does_and_leaves_the_network_alone():
    net = layerwise_cnn(channels=4, depth=3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    found = survey(net, images, nullcontext)
    expected = costs(net, images).xs("module", level="part")["training_flops"]
    assert found.flops == [2 * count for count in expected]
    assert [form.dtype for form in found.inputs] == [torch.float32] * 3
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters()) and net.training


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 4), (2, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_representation_arrives_as_it_was_in_memory_too(shape, channels_last):
    representation = torch.rand(shape).bfloat16()
    if channels_last and len(shape) == 4:
        representation = representation.contiguous(memory_format=torch.channels_last)
    form = TensorFormat(representation)
    packed = form.pack(representation)
    assert packed.is_contiguous() and packed.data_ptr() == representation.data_ptr()
    arrived = form.empty(5, "cpu")
    arrived[:2] = packed
    arrived = form.unpack(arrived[:2])
    assert torch.equal(arrived, representation) and arrived.dtype == representation.dtype
    assert arrived.stride() == representation.stride()


def test_modules_and_processes_must_fit():
    check_modules_per_stage(None, 4, 3)
    check_modules_per_stage([1, 2, 1], 4, 3)
    with pytest.raises(InputError, match="5 stages"):
        check_modules_per_stage(None, 4, 5)
    for modules_per_stage, processes in (([4], 2), ([1, 1, 1], 3), ([2, 2], 1)):
        with pytest.raises(InputError, match="--modules-per-stage"):
            check_modules_per_stage(modules_per_stage, 4, processes)


def test_replicas_have_the_same_images():
    def batches(pixel):
        images = torch.full((8, 4, 4, 3), pixel, dtype=torch.uint8)
        return Batches(images, torch.arange(8), 4, mean=(0,) * 3, std=(1,) * 3)

    first = batches(1)
    outlines = [(first.outline_arguments, first.example)] * 2
    sent = (outlines, 8, fingerprints(first, first))
    processes = SimpleNamespace(rank=1, size=2, control=None, from_first=lambda make: sent)
    mesh = Mesh(processes, stages=1)
    same = batches(1)
    assert mesh.load_data(lambda: (same, same, 8)) == (same, same, 8)
    with pytest.raises(InputError, match="process 1"):
        mesh.load_data(lambda: (same, batches(2), 8))


def test_a_mesh_numbers_the_replicas_of_a_stage_one_after_the_other():
    def place(rank, size, stages):
        mesh = Mesh(SimpleNamespace(rank=rank, size=size, control=None, group=lambda *_: None), stages)
        return mesh.stage_index, mesh.replica_index, mesh.replicas, mesh.below, mesh.above

    assert [place(rank, 4, 2)[:3] for rank in range(4)] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    assert place(1, 4, 2)[4] == 3 and place(3, 4, 2)[3] == 1
    assert place(1, 3, 3)[:3] == (1, 0, 1) and place(2, 3, 1)[:3] == (0, 2, 3)
    with pytest.raises(InputError, match="--stages 2"):
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
