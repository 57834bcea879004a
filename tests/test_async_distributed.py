"""Modules that learn asynchronously in processes of their own: what they log and save, and what happens when one is
slow, is killed, hangs or is told to stop.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from running import Finished, launch, load_script

from decoupled import load
from decoupled.data.datasets import load as load_data
from decoupled.networks.evaluation import WithEnsembles, evaluate

SCRIPT = "async_buffer/cifar_buffer_distributed.py"
DATA = "--dataset digits --train-samples 48 --batch-size 16 --test-batch-size 100 --device cpu --epochs 2"
NETWORK = "--feature_size 2 --ncnn 4 --down [0] --mlp 1 --buffer 3"
COUNTS = re.compile(
    r"# process (\d), epoch (\d): .*learned from (\d+)(?:, received (\d+))?(?:, sent (\d+), dropped (\d+))?"
)


def words(*flags):
    return [SCRIPT, *DATA.split(), *NETWORK.split(), *map(str, flags)]


def said(stderr):
    """What the processes themselves wrote, without the agent's lines."""
    return [line for line in stderr.splitlines() if line.startswith((Path(SCRIPT).name, "Traceback", SCRIPT))]


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
    "slow": (4, "slow", ("--turn", 2, "--slow", "3:30"), {}),
    "compressed": (2, "compressed", ("--half", "--compress", 4, "--ensemble", 0), {}),
    "SIGTERM": (3, "stopped", ("--slow", "0:5"), {"faults": {"1": [2, "SIGTERM"]}}),
    "fewer": (2, "stopped", ("--resume",), {}),
    "SIGINT": (3, "stopped", ("--slow", "0:5", "--resume"), {"faults": {"0": [1, "SIGINT"]}}),
    "goes on": (3, "stopped", ("--resume",), {}),
    "killed": (3, "killed", (), {"faults": {"1": [4, "SIGKILL"]}, "restarts": 1}),
    "hangs": (3, "hangs", ("--timeout", 4), {"faults": {"1": [2, "SIGSTOP"]}}),
    "slow stranger": (2, "nothing", ("--slow", "2:3"), {}),
}


class Ran:
    """What RUNS leave: ``outcome`` and what they ``said`` by name, ``left`` by folder."""

    def __init__(self, root):
        runs = [
            {"processes": processes, "words": words("--log-dir", root / folder, *flags), **more}
            for processes, folder, flags, more in RUNS.values()
        ]
        ended = dict(zip(RUNS, launch(*runs), strict=True))
        self.outcome = {name: outcome for name, (outcome, _) in ended.items()}
        self.said = {name: said(stderr) for name, (_, stderr) in ended.items()}
        self.root = root

    def left(self, folder):
        return Finished(self.root / folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return Ran(tmp_path_factory.mktemp("runs"))


def test_every_module_learns_its_own_epochs_and_nobody_waits_for_a_slow_one(ran):
    assert ran.outcome["slow"] == ran.outcome["compressed"] == "finished"
    assert not ran.said["slow"] and not ran.said["compressed"]
    slow, compressed = ran.left("slow"), ran.left("compressed")
    assert [row[:2] for row in rows(slow)] == [(n, epoch) for epoch in (1, 2) for n in range(4)]
    first = {int(n): own for n, epoch, own, *_ in rows(slow) if epoch == 1}
    assert first[3] == 1 and [first[n] for n in range(3)] == [2, 2, 2]  # the others have all behind them
    assert [pace["learned"] for pace in slow.state["pace"]] == [6, 6, 6, 6]
    assert len(rows(compressed)) == 8 and all(math.isnan(row[4]) for row in rows(compressed))  # no ensembles asked for
    for left in (slow, compressed):
        text = left.log.read_text()
        assert not re.search(r"# module 0, .*staleness", text) and re.search(r"# module [23], .*staleness mean", text)
        assert all(value.isfinite().all() for value in left.weights.values())


def test_what_is_sent_arrives(ran):
    for folder, processes in (("slow", 4), ("compressed", 2)):
        told = counts(ran.left(folder))
        assert len(told) == 2 * processes
        for process in range(1, processes):
            below, here = ([row for row in told if row[0] == number] for number in (process - 1, process))
            assert [row[4] for row in below] == [row[3] for row in here]
        for _, _, learned, _, sent, dropped in (row for row in told if row[0] == 0):
            assert sent + dropped >= learned  # and what it has only forwarded


def test_the_heads_are_those_of_one_network_at_one_time(ran):
    """What the processes evaluated together is what the saved network gives in one."""
    left = ran.left("slow")
    net = load(left.checkpoint)
    _, test, _ = load_data("digits", "data", batch_size=16, test_batch_size=100, train_samples=48, device="cpu")
    scores = [score.top1 for score in evaluate(WithEnsembles(net, probabilities=False), test)]
    last = [row for row in rows(left) if row[1] == 2]
    assert [row[3] for row in last] == pytest.approx(scores[:4], abs=1e-3)
    assert [row[4] for row in last] == pytest.approx(scores[4:], abs=1e-3)


def test_after_a_signal_to_any_process_all_that_was_sent_is_in_the_buffers_and_the_run_goes_on(ran):
    outcomes = [ran.outcome[name] for name in ("SIGTERM", "fewer", "SIGINT", "goes on")]
    assert outcomes == ["[143]", "[2]", "[130]", "finished"], ran.said
    assert ["stopped after epoch" in line for line in ran.said["SIGTERM"] + ran.said["SIGINT"]] == [True, True]
    (line,) = ran.said["fewer"]
    assert "resume with --nproc-per-node 3 and --modules-per-stage " in line
    left = ran.left("stopped")
    assert [pace["learned"] for pace in left.state["pace"]] == [6] * 4
    written = [buffer.get("writes", 0) for buffer in left.state["buffers"]]
    assert [count > 0 for count in written] == [n in starts(left) for n in range(4)]
    assert len(rows(left)) == 8 and left.log.read_text().count("# resumed after ") == 2


def starts(left):
    """The lowest modules of all processes but the first."""
    modules = left.state["pace"][0]["modules"]
    return [sum(modules[:n]) for n in range(1, len(modules))]


def test_killed_it_is_started_again_and_one_that_hangs_is_named(ran):
    assert ran.outcome["killed"] == "finished" and ran.outcome["hangs"] != "finished"
    assert [pace["learned"] for pace in ran.left("killed").state["pace"]] == [6] * 4
    assert ran.left("killed").log.read_text().count("# resumed after ") == 1
    (killed,), (hangs,) = ran.said["killed"], ran.said["hangs"]
    assert "process 1 has ended" in killed and "process 1 has not answered for 4 s" in hangs


def test_bad_flags_are_one_line(ran, fails):
    assert ran.outcome["slow stranger"] == "[2]"
    (line,) = ran.said["slow stranger"]
    assert "--slow 2:3 names no process: there are 2, from 0" in line
    alone = words()[1:]
    assert "start it with torchrun" in fails(SCRIPT, *alone)
    assert "RANK:FACTOR" in fails(SCRIPT, *alone, "--slow", "1")
    assert "RANK:FACTOR" in fails(SCRIPT, *alone, "--slow", "1:.5")
    assert "must be an integer ≥ 1" in fails(SCRIPT, *alone, "--buffer", "0")


def test_what_is_read_stays_when_the_buffer_is_written_again():
    load_script(SCRIPT)
    from replay_buffer import ReplayBuffer
    from replay_stage import Inbox

    from decoupled.parallel.balance import Layout

    buffer = ReplayBuffer(1, 2, (3, 4, 4))
    inbox = Inbox(buffer, Layout(torch.zeros(2, 3, 4, 4)), 2, 0, None)
    buffer.write(torch.ones(2, 3, 4, 4), torch.ones(2, dtype=torch.int64), 3)
    inbox.newest = 5
    sample, age = inbox.read()
    buffer.write(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 6)
    assert (sample.representation == 1).all() and (sample.labels == 1).all() and age == 2
