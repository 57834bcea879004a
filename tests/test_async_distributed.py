"""Modules that learn asynchronously in processes of their own: what they log and save, and what happens when one is
slow, is killed, hangs or is told to stop.
"""

import math
import re

import pytest
import torch
from running import Finished, launch, load_script

from decoupled.data import datasets
from decoupled.networks.evaluation import WithEnsembles, evaluate

SCRIPT = "async_buffer/cifar_buffer_distributed.py"
load_script(SCRIPT)  # its folder can be imported from now on
from asynchronous_cnn import asynchronous_cnn  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402
from replay_stage import Inbox  # noqa: E402

from decoupled.parallel.balance import TensorFormat  # noqa: E402

DATA = "--dataset digits --train-samples 48 --validation 60 --batch-size 16 --device cpu --epochs 2"
NETWORK = "--feature_size 2 --ncnn 4 --down [0] --mlp 1 --buffer 3"
COUNTS = re.compile(
    r"# process (\d), epoch (\d): .*learned from (\d+)(?:, received (\d+))?(?:, sent (\d+), dropped (\d+))?"
)
COMPRESSED = ("--half", "--compress", 4, "--ensemble", 0, "--slow", "0:5")


def words(*flags):
    return [SCRIPT, *DATA.split(), *NETWORK.split(), *map(str, flags)]


def errors(stderr):
    """The lines by which processes ended with an error."""
    return [line for line in stderr.splitlines() if ": error: " in line or line.startswith("Traceback")]


def rows(left):
    """[(module, epoch, own epoch, test, ensemble), …] of the log."""
    pattern = r"n: (\d), epoch (\d),epochtrue (\d), train \S+, test (\S+),ense (\S+) "
    found = [re.match(pattern, line) for line in left.log.read_text().splitlines() if line.startswith("n: ")]
    return [tuple(map(float, match.groups())) for match in found]


def counts(left):
    """[(process, epoch, learned, received, sent, dropped), …] of the log."""
    found = map(COUNTS.match, left.log.read_text().splitlines())
    return [tuple(int(group or 0) for group in match.groups()) for match in found if match]


RUNS = {  # name → (processes, folder, flags, faults and restarts)
    "slow": (3, "slow", ("--turn", 2, "--slow", "2:30"), {}),
    "SIGTERM": (2, "stopped", COMPRESSED, {"faults": {"1": [2, "SIGTERM"]}}),
    "more": (3, "stopped", (*COMPRESSED, "--resume"), {}),
    "goes on": (2, "stopped", (*COMPRESSED, "--resume"), {}),
    "killed": (2, "killed", (), {"faults": {"1": [4, "SIGKILL"]}, "restarts": 1}),
    "hangs": (2, "hangs", ("--timeout", 2), {"faults": {"1": [2, "SIGSTOP"]}}),
    "slow stranger": (2, "nothing", ("--slow", "2:3"), {}),
}


class Ran:
    """What RUNS leave: their ``outcome`` and ``errors`` by name; what is ``left`` by folder."""

    def __init__(self, root):
        runs = []
        for processes, folder, flags, more in RUNS.values():
            runs.append({"processes": processes, "words": words("--log-dir", root / folder, *flags), **more})
        ended = dict(zip(RUNS, launch(*runs), strict=True))
        self.outcome = {name: outcome for name, (outcome, _) in ended.items()}
        self.errors = {name: errors(stderr) for name, (_, stderr) in ended.items()}
        self.root = root

    def left(self, folder):
        return Finished(self.root / folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return Ran(tmp_path_factory.mktemp("runs"))


def test_every_module_learns_its_own_epochs_and_nobody_waits_for_a_slow_one(ran):
    assert ran.outcome["slow"] == "finished" and not ran.errors["slow"]
    left = ran.left("slow")
    assert [row[:2] for row in rows(left)] == [(n, epoch) for epoch in (1, 2) for n in range(4)]
    first = [own for n, epoch, own, *_ in rows(left) if epoch == 1]
    assert first[3] == 1 and first[:2] == [2, 2]  # the others have all behind them
    assert [pace["learned"] for pace in left.state["pace"]] == [6, 6, 6, 6]
    text = left.log.read_text()
    assert not re.search(r"# module 0, .*staleness", text) and re.search(r"# module [23], .*staleness mean", text)
    assert all(value.isfinite().all() for value in left.weights.values())


def test_what_is_sent_arrives(ran):
    told = counts(ran.left("slow"))
    assert len(told) == 2 * 3
    for process in (1, 2):
        below, here = ([row for row in told if row[0] == number] for number in (process - 1, process))
        assert [row[4] for row in below] == [row[3] for row in here]
    for _, _, learned, _, sent, dropped in (row for row in told if row[0] == 0):
        assert sent + dropped >= learned  # and what it has only forwarded


def test_the_heads_are_those_of_one_network_at_one_time(ran):
    """What the processes evaluated together is what the saved network gives in one."""
    left = ran.left("slow")
    net = asynchronous_cnn(2, 4, (0,), hidden_layers=1)
    net.load_state_dict(left.weights)
    _, test, _ = datasets.load("digits", batch_size=16, train_samples=48, validation=60)
    scores = [score.top1 for score in evaluate(WithEnsembles(net, probabilities=False), test)]
    last = [row for row in rows(left) if row[1] == 2]
    assert [row[3] for row in last] == pytest.approx(scores[:4], abs=1e-3)
    assert [row[4] for row in last] == pytest.approx(scores[4:], abs=1e-3)


def test_after_a_signal_all_that_was_sent_is_in_the_buffers_and_the_run_goes_on(ran):
    assert [ran.outcome[name] for name in ("SIGTERM", "more", "goes on")] == ["[143]", "[2]", "finished"], ran.errors
    assert not ran.errors["SIGTERM"] and any("--nproc-per-node 2" in line for line in ran.errors["more"])
    left = ran.left("stopped")
    assert [pace["learned"] for pace in left.state["pace"]] == [6] * 4
    written = [buffer.get("writes", 0) for buffer in left.state["buffers"]]
    lowest_of_second = left.state["pace"][0]["modules"][0]
    assert [count > 0 for count in written] == [n == lowest_of_second for n in range(4)]
    assert left.log.read_text().count("# resumed after ") == 1
    assert len(rows(left)) == 8 and all(math.isnan(row[4]) for row in rows(left))  # no ensembles asked for


def test_killed_it_is_started_again_and_one_that_hangs_is_named(ran):
    assert ran.outcome["killed"] == "finished" and ran.outcome["hangs"] == "[2]"
    assert [pace["learned"] for pace in ran.left("killed").state["pace"]] == [6] * 4
    assert ran.left("killed").log.read_text().count("# resumed after ") == 1
    assert any("process 1" in line for line in ran.errors["hangs"])


def test_bad_flags_are_one_line(ran, fails):
    assert ran.outcome["slow stranger"] == "[2]" and "--slow 2:3" in ran.errors["slow stranger"][0]
    alone = words()[1:]
    assert "torchrun" in fails(SCRIPT, *alone)
    assert "--slow" in fails(SCRIPT, *alone, "--slow", "1")
    assert "--slow" in fails(SCRIPT, *alone, "--slow", "1:.5")
    assert "--buffer" in fails(SCRIPT, *alone, "--buffer", "0")


def test_what_is_read_stays_when_the_buffer_is_written_again():
    buffer = ReplayBuffer(1, 2, (3, 4, 4))
    inbox = Inbox(buffer, TensorFormat(torch.zeros(2, 3, 4, 4)), 2, 0, None)
    buffer.write(torch.ones(2, 3, 4, 4), torch.ones(2, dtype=torch.int64), 3)
    inbox.newest_step = 5
    sample, staleness = inbox.read()
    buffer.write(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 6)
    assert (sample.representation == 1).all() and (sample.labels == 1).all() and staleness == 2
