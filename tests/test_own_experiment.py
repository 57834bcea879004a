"""An own network and own data (examples/own_experiment.py), killed, resumed and shared by processes; the recipes of
docs/own_script.md; and the Loader.
"""

import argparse
import itertools
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from killed_run import run_killed
from running import ROOT, Finished, assert_same_run, launch, load_script, tensors
from torch.utils.data import Dataset, default_collate

import decoupled
from decoupled import InputError
from decoupled.data.loader import Loader
from decoupled.logs import read_log
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.parallel.balance import TensorFormat
from decoupled.training.steps import Steps

SCRIPT = "examples/own_experiment.py"
SMALL = "--device cpu --epochs 2 --images 80 --batch-size 32"  # 2 mini-batches of 32 images per epoch
PAGE = (ROOT / "docs/own_script.md").read_text()
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```diff\n(.*?)```", PAGE, re.S))
TOGETHER = {  # name of a script → the recipes that it follows
    "weights": ("tokens", "freeze", "optimizers", "ema", "similarity"),
    "mixed": ("mixup", "norms", "smoothing"),
    "reconstructed": ("reconstruction", "clip"),
}
TOO_SMALL = "the last mini-batch is too small to give each of 2 replicas a share"
NOT_TOGETHER = "each replica would train a network of its own"


def changed(text, recipe):
    """``text`` with the changes of a ``recipe``: hunks separated by empty lines, of lines that begin with -, + or a
    space.
    """
    for hunk in recipe.strip("\n").split("\n\n"):
        lines = hunk.split("\n")
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
        assert text.count(old) == 1, hunk
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """{name: path} of the scripts of TOGETHER."""
    folder = tmp_path_factory.mktemp("recipes")
    paths = {}
    for name, recipes in TOGETHER.items():
        text = (ROOT / SCRIPT).read_text()
        for recipe in recipes:
            text = changed(text, RECIPES[recipe])
        paths[name] = folder / f"{name}.py"
        paths[name].write_text(text)
    replicas = changed((ROOT / SCRIPT).read_text(), RECIPES["replicas"])
    paths["replicas"] = folder / "replicas.py"
    paths["replicas"].write_text(replicas)
    paths["apart"] = folder / "apart.py"
    paths["apart"].write_text(replicas.replace("run.mesh.data_parallel(stage.modules_here)", "stage.modules_here"))
    return paths


@pytest.fixture(scope="module")
def in_two_processes(scripts, tmp_path_factory):
    """{name: (outcome, stderr, log folder)} of runs in two processes."""
    folder = tmp_path_factory.mktemp("together")
    runs = {}
    for name, script in {"killed": SCRIPT, "stopped": SCRIPT, **scripts}.items():
        runs[name] = {"processes": 2, "words": [str(script), *SMALL.split(), "--log-dir", str(folder / name)]}
    runs["killed"]["words"] += ["--workers", "1", "--save-every", "1e-6"]
    runs["killed"] |= {"restarts": 1, "faults": {"1": [5, "SIGKILL", 0]}}  # each epoch has 2 + 1 mini-batches
    runs["stopped"]["words"] += ["--workers", "1", "--half"]
    runs["stopped"] |= {"faults": {"0": [1, "SIGTERM"]}}
    too_small = ["--images", "81", "--log-dir", str(folder / "too small")]  # mini-batches of 32, 32 and 1
    runs["too small"] = {"processes": 2, "words": [str(scripts["replicas"]), *SMALL.split(), *too_small]}
    ended = {}
    for name, (outcome, stderr) in zip(runs, launch(*runs.values()), strict=True):
        ended[name] = (outcome, stderr, folder / name)
    return ended


@pytest.fixture(scope="module")
def wholes():
    return {}


@pytest.fixture
def whole(run_script, wholes, tmp_path):
    """whole(script, *flags): what it leaves when nothing stops it, in one process."""

    def run(script, *flags):
        key = (str(script), *flags)
        if key not in wholes:
            wholes[key] = run_script(str(script), *SMALL.split(), *flags, folder=tmp_path / "whole")
        return wholes[key]

    return run


def test_killed_in_an_epoch_and_resumed_with_other_workers(whole, run_script, tmp_path):
    folder = tmp_path / "killed"
    words = (*SMALL.split(), "--save-every", "1e-6")
    run_killed(SCRIPT, [*words, "--workers", "2", "--log-dir", str(folder)], "step", 3 * 3 + 1)  # of three modules
    left = run_script(SCRIPT, *words, "--resume", folder=folder)
    assert "# resumed after epoch 2, batch 1" in left.log.read_text()
    assert_same_run(left, whole(SCRIPT))
    assert "dataset" not in left.log.read_text().splitlines()[0]


def test_two_processes_killed_and_restarted(in_two_processes, whole):
    outcome, stderr, folder = in_two_processes["killed"]
    assert outcome == "finished", stderr
    assert Finished(folder).log.read_text().count("# resumed after epoch 2, batch 1") == 1
    assert_same_run(Finished(folder), whole(SCRIPT))


def test_two_processes_stopped_and_resumed_in_one(in_two_processes, whole, run_script):
    outcome, stderr, folder = in_two_processes["stopped"]
    assert outcome == "[143]", stderr
    left = run_script(SCRIPT, *SMALL.split(), "--half", "--resume", folder=folder)
    assert "# resumed after epoch 1, batch " in left.log.read_text()
    assert_same_run(left, whole(SCRIPT, "--half"))


# Recipes


@pytest.mark.parametrize("name", TOGETHER)
def test_recipes_run_and_two_processes_do_what_one_does(name, scripts, in_two_processes, whole):
    left = whole(scripts[name])
    assert len(left.lines) == 6 and left.lines != whole(SCRIPT).lines
    outcome, stderr, folder = in_two_processes[name]
    assert outcome == "finished", stderr
    assert_same_run(Finished(folder), left)


def test_replicas_learn_what_one_process_learns(scripts, in_two_processes, whole):
    expected = whole(scripts["replicas"])
    assert_same_run(expected, whole(SCRIPT))
    outcome, stderr, folder = in_two_processes["replicas"]
    assert outcome == "finished", stderr
    left = Finished(folder)
    losses = [read_log(run.log)["loss"].tolist() for run in (left, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("name, message", [("apart", NOT_TOGETHER), ("too small", TOO_SMALL)])
def test_replicas_that_cannot_train_one_network(name, message, in_two_processes):
    outcome, stderr, folder = in_two_processes[name]
    assert outcome == "[2]" and message in stderr
    assert not folder.exists()


def test_without_torchrun_the_lines_and_weights_are_the_same(whole, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(changed((ROOT / SCRIPT).read_text(), RECIPES["alone"]))
    left = whole(script)
    expected = whole(SCRIPT)
    assert left.lines == expected.lines
    assert left.weights.keys() == expected.weights.keys()
    assert all(torch.equal(left.weights[key], weight) for key, weight in expected.weights.items())


def test_every_recipe_runs():
    assert sorted([*itertools.chain(*TOGETHER.values()), "alone", "replicas"]) == sorted(RECIPES)


def test_what_recipes_do(scripts, whole):
    left = whole(scripts["weights"])
    torch.manual_seed(1)
    untrained = load_script(str(scripts["weights"])).build(None, 10).state_dict()
    stayed = {key: torch.equal(value, left.weights[key]) for key, value in untrained.items()}
    assert all(same for key, same in stayed.items() if key.startswith("0."))
    assert not any(same for key, same in stayed.items() if key.startswith(("1.", "2.")))
    rates = [state["param_groups"][0]["initial_lr"] for state in left.state["optimizers"]]
    assert rates == [0.05, 3e-3, 1e-3]
    averages = left.state["averages"][2]
    assert averages.pop("n_averaged") == 4
    for key, value in averages.items():
        trained = left.weights[key.replace("module.", "2.", 1)]
        assert torch.equal(value, trained) == ("running" in key or "tracked" in key)
    norms = re.findall(r"# gradient norm of module \d in epoch \d: (.*)", whole(scripts["mixed"]).log.read_text())
    assert len(norms) == 6 and all(0 < float(norm) < 100 for norm in norms)
    assert "0.decoder.weight" in whole(scripts["reconstructed"]).weights


def test_python_blocks(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(images=400, seed=1, workers=0, batch_size=32, test_batch_size=100)
    train, test, _ = load_script(SCRIPT).load_data(args, "cpu")
    names = {"checkpoint": whole(SCRIPT).checkpoint, "train": train, "test": test}
    probe, onnx = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(probe, "own_script.md", "exec"), names)
    assert names["accuracy"] > 0.7
    pytest.importorskip("onnxscript")
    exec(compile(onnx, "own_script.md", "exec"), names)
    assert (tmp_path / "net.onnx").is_file()


# A step


def test_a_step_clips_the_gradient_and_leaves_what_is_frozen():
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    steps = Steps(torch.device("cpu"), half=False)
    before = [parameter.detach().clone() for parameter in module.parameters()]

    def norm():
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in module.parameters()]).item()

    steps.step(100 * module(torch.ones(2, 4)).square().mean(), optimizer)
    assert norm() > 10
    steps.step(100 * module(torch.ones(2, 4)).square().mean(), optimizer, clip=0.5)
    assert norm() == pytest.approx(0.5, rel=1e-4)
    module.requires_grad_(False)
    after = [parameter.clone() for parameter in module.parameters()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    steps.step(module(torch.ones(2, 4)).square().mean(), optimizer)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), after, strict=True))
    module.bias.requires_grad_(True)
    steps.step(module(torch.ones(2, 4)).square().mean(), optimizer)
    assert torch.equal(module.weight, after[0]) and not torch.equal(module.bias, after[1])


# Auxiliary networks


class Attention(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.classify = torch.nn.Linear(shape[0], classes)

    def forward(self, representation):
        return self.classify(representation.mean((2, 3)))


def test_a_layerwise_cnn_takes_an_auxiliary_of_ones_own():
    net = layerwise_cnn(channels=4, depth=3, auxiliary=Attention, classes=7)
    assert [type(module.auxiliary) for module in net[:2]] == [Attention] * 2
    assert net[1].auxiliary.classify.in_features == 8
    assert [logits.shape for logits in net.eval()(torch.rand(2, 3, 32, 32))] == [(2, 7)] * 3


# The Loader


class Noise(Dataset):
    """Samples that all three sources of random numbers make."""

    def __init__(self, count=10, shift=0.0):
        self.count = count
        self.shift = shift

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= 10:
            raise InputError(f"sample {index} cannot be read: take another one")
        numbers = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return torch.tensor([index + self.shift, *numbers]), index


def noisy_collate(samples):
    inputs, labels = default_collate(samples)
    return inputs + torch.rand(()), labels


def same(one, other):
    return all(torch.equal(mine, its) for mine, its in zip(tensors(one), tensors(other), strict=True))


def test_neither_workers_nor_a_stop_change_what_comes():
    settings = {"shuffle": True, "seed": 3, "collate": noisy_collate}
    loader = Loader(Noise(), 4, **settings)
    before = torch.get_rng_state(), random.getstate()
    _ = loader.samples[1, 2]
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    first, second = [*loader], [*loader]
    assert [len(labels) for _, labels in first] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(10))
    everything = torch.cat([inputs[:, 1:] for inputs, _ in first + second]).flatten()
    assert len(everything.unique()) == 60
    for workers in (1, 2):
        stopped = Loader(Noise(), 4, workers=workers, **settings)
        assert same([*stopped], first)
        iterator = iter(stopped)
        assert same([next(iterator)], second[:1])
        resumed = Loader(Noise(), 4, workers=2 - workers, **settings)
        resumed.load_state_dict(stopped.state_dict())
        assert same([*resumed.rest()], second[1:])
        for used in (stopped, resumed):
            used.close()
    assert not same([*Loader(Noise(), 4, shuffle=True, seed=4)], first)


def test_in_order_all_epochs_are_the_same():
    loader = Loader(Noise(), 4, drop_last=True)
    first = [*loader]
    assert same([*loader], first) and [labels.tolist() for _, labels in first] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_replicas_share_each_mini_batch():
    whole = [*Loader(Noise(), 4, shuffle=True)]
    shares = [Loader(Noise(), 4, shuffle=True, replica=replica, replicas=3) for replica in range(3)]
    assert [share.common for share in shares] == [2, 2, 2]
    assert [Loader(Noise(), size, replicas=replicas).common for size, replicas in ((4, 5), (3, 2), (2, 2))] == [0, 3, 5]
    weights = []
    parts = []
    for share in shares:
        for inputs, _ in share:
            parts.append(inputs)
            weights.append(share.weight)
    assert torch.equal(torch.cat(parts).sort(0).values, torch.cat([inputs for inputs, _ in whole]).sort(0).values)
    assert weights[:2] == [1.5, 1.5] and len(weights) == 3 + 3 + 2


def test_other_data_are_not_resumed():
    state = Loader(Noise(), 4).state_dict()
    for other in (Noise(9), Noise(shift=0.5)):
        with pytest.raises(InputError, match="other data"):
            Loader(other, 4).load_state_dict(state)
    Loader(Noise(9), 4, fingerprint=state["fingerprint"]).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_input_error_of_a_sample_ends_the_run(workers):
    loader = Loader(Noise(12), 4, workers=workers, fingerprint=0)
    with pytest.raises(InputError, match="sample 10"):
        list(loader)
    loader.close()
    with pytest.raises(InputError, match="no samples"):
        Loader(Noise(0), 4)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_outlive_the_signals_that_stop_a_run():
    loader = Loader(Noise(), 1, workers=1)
    iterator = iter(loader)
    next(iterator)
    (worker,) = loader.loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len([*iterator]) == 9 and worker.is_alive()
    loader.close()
    del iterator


# What stages send


def test_a_tensor_of_another_form_is_refused_before_it_is_sent():
    form = TensorFormat(torch.zeros(2, dtype=torch.int64))
    assert form.pack(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    for labels in (torch.zeros(5, 10), torch.zeros(5), torch.zeros(5, 2, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"int64 \(B\)"):
            form.pack(labels)


def test_a_representation_whose_batch_is_not_first_in_memory_arrives_as_it_was():
    """As nn.GRU's with batch_first."""
    form = TensorFormat(torch.zeros(7, 2, 5).transpose(0, 1))
    representation = torch.rand(7, 3, 5).transpose(0, 1)
    packed = form.pack(representation)
    assert packed.data_ptr() == representation.data_ptr()
    arrived = form.unpack(form.empty(3, "cpu").copy_(packed))
    assert torch.equal(arrived, representation) and arrived.stride() == representation.stride()


# load


def test_load_asks_for_the_number_of_classes_and_warns_of_another_script(whole, scripts, recwarn):
    left = whole(SCRIPT)
    with pytest.raises(InputError, match="classes="):
        decoupled.load(left.checkpoint)
    net = decoupled.load(left.checkpoint, classes=10)
    assert len(net) == 3 and not recwarn.list
    with pytest.warns(UserWarning, match=re.escape(str(scripts["mixed"]))):
        decoupled.load(left.checkpoint, classes=10, script=scripts["mixed"])
    with pytest.raises(InputError, match="script="):
        decoupled.load(whole(scripts["mixed"]).checkpoint, classes=10)
    with pytest.raises(InputError, match="device=cuda:99"):
        decoupled.load(left.checkpoint, classes=10, device="cuda:99")
