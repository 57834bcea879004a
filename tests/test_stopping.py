"""Every CIFAR script stops at a signal after any mini-batch, and resumes to the bit; one run has one writer."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from running import PARALLEL, ROOT, SEQUENTIAL, small

from decoupled.training import run as runs
from decoupled.training.checkpoint import Checkpoint, read_checkpoint

TOY = "--dataset digits --train-samples 80 --batch-size 16 --test-batch-size 100 --device cpu"  # 5 batches; test: 4
SCRIPTS = [  # script, flags, calls of pause an epoch
    (PARALLEL, f"{TOY} --epochs 2 --precise-statistics", 10),
    (SEQUENTIAL, f"{TOY} --epochs 1", 10),
    ("aux_nets/cifar_dgl.py", f"{TOY} --epochs 2 --channels 2 --depth 3 --lr-step 1", 10),
    ("dni/cifar_cnn_dni.py", f"{TOY} --epochs 2 --channels 2 --dni --context", 10),
    ("dni/cifar_dgl.py", f"{TOY} --epochs 2 --channels 2 --half", 10),
    ("ddg_comparison/cifar_dgl.py", f"{TOY} --epochs 2 --depth 8 --milestones 2", 10),
    ("ddg_comparison/cifar_ddg.py", f"{TOY} --epochs 2 --depth 8 --splits 3 --milestones 2", 10),
    ("ddg_comparison/cifar_backprop.py", f"{TOY} --epochs 2 --depth 8 --checkpointing", 10),
    ("async_buffer/cifar_buffer.py", f"{TOY} --epochs 2 --feature_size 2 --ncnn 3 --down [0] --epochdecay 1", 20),
    (
        "async_buffer/cifar_buffer.py",
        f"{TOY} --epochs 2 --feature_size 2 --ncnn 3 --down [0] --buffer 2 --noise .5",
        24,
    ),
]


def names(script, run=runs.Run):
    return {"Run": run} | ({"layerwise_cnn": small(channels=2, depth=3)} if script in (PARALLEL, SEQUENTIAL) else {})


def signalled(call, number):
    """A Run that sends itself the signal ``number`` in call number ``call`` of pause."""

    class Signalled(runs.Run):
        calls = 0

        def checkpoint_or_stop(self):
            Signalled.calls += 1
            if Signalled.calls == call:
                os.kill(os.getpid(), number)
            super().checkpoint_or_stop()

    return Signalled


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in branches for leaf in tensors(branch)]


def assert_same(left, whole):
    told = [
        [
            line
            for line in run.log.read_text().splitlines()
            if line.startswith(("n: ", "# head", "# module")) and " took " not in line
        ]
        for run in (left, whole)
    ]
    assert told[0] == told[1] and len(told[0]) >= 2
    mine, its = tensors(left.state), tensors(whole.state)
    assert len(mine) == len(its) > 5 and all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize(("script", "flags", "calls"), SCRIPTS, ids=lambda value: str(value).split(" --device")[0])
def test_stopped_amid_an_epoch_and_amid_its_evaluation_a_run_resumes_to_the_bit(
    run_script, capsys, tmp_path, script, flags, calls
):
    whole = run_script(script, *flags.split(), folder=tmp_path / "whole", **names(script))
    stops = ((3, signal.SIGTERM, ()), (calls - 5, signal.SIGINT, ("--resume",)), (8, signal.SIGTERM, ("--resume",)))
    for call, number, resume in stops:
        with pytest.raises(SystemExit) as stop:
            run_script(script, *flags.split(), *resume, **names(script, signalled(call, number)))
        assert stop.value.code == 128 + number
        message = capsys.readouterr().err
        assert f"{number.name}: finishing this batch" in message and "--resume continues there" in message
    left = run_script(script, *flags.split(), "--resume", **names(script))
    assert left.log.read_text().count("# resumed after ") == 3
    assert_same(left, whole)


def test_killed_within_an_epoch_a_run_goes_on_from_its_last_minutes(run_script, monkeypatch, tmp_path):
    """With --save-every, checkpoints within an epoch; none of them changes a result."""
    flags = (*TOY.split(), "--epochs", 2)
    whole = run_script(PARALLEL, *flags, folder=tmp_path / "whole", **names(PARALLEL))

    class Killed(Exception):
        pass

    class Dying(runs.Run):
        def checkpoint_or_stop(self):
            super().checkpoint_or_stop()
            if (self.epoch, self.batch) == (2, 3):
                raise Killed

    with pytest.raises(Killed):
        run_script(PARALLEL, *flags, "--save-every", 1e-9, **names(PARALLEL, Dying))
    left = run_script(PARALLEL, *flags, "--resume", **names(PARALLEL))
    assert "# resumed after epoch 2, batch 3\n" in left.log.read_text()
    assert_same(left, whole)


def start(folder, *flags, python=()):
    command = [sys.executable, *python, str(ROOT / PARALLEL), *TOY.split(), "--log-dir", str(folder), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(folder, text):
    for _ in range(1200):
        logs = [*folder.glob("*.log")] if folder.exists() else []
        if logs and text in logs[0].read_text():
            return logs[0]
        time.sleep(0.05)
    raise AssertionError(f"no log with {text}")


def test_a_second_process_is_told_who_writes_and_a_second_signal_ends_at_once(fails, tmp_path):
    folder = tmp_path / "logs"
    running = start(folder, "--epochs", "1000")
    try:
        log = wait_for(folder, "n: 4, epoch 1,")
        second = start(folder, "--epochs", "1000", "--resume")
        message = second.communicate(timeout=300)[1]
        assert second.returncode == 2 and message.count("\n") == 1
        assert f"{log} is being written by process {running.pid}" in message
        running.send_signal(signal.SIGSTOP)  # so that both are there before it looks
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGCONT)
        running.wait(timeout=300)
        assert running.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        running.kill()
        running.communicate()
    assert not [line for line in log.read_text().splitlines() if "resumed" in line]


def test_runs_of_one_second_have_files_of_their_own(tmp_path):
    checkpoints = [Checkpoint(tmp_path, "name") for _ in range(120)]
    for number, checkpoint in enumerate(checkpoints):
        checkpoint.create(f"{number}\n")
    assert [checkpoint.path(".log").read_text() for checkpoint in checkpoints] == [f"{n}\n" for n in range(120)]
    for checkpoint in checkpoints:
        checkpoint.close()
    assert len([*tmp_path.iterdir()]) == 120


def test_the_newest_run_is_the_one_that_began_last(tmp_path):
    names = ("a-20260101-000000", "a-20260102-000000-2", "a-20260102-000000-10", "a-b-20270101-000000", "a-2028")
    for name in names:
        (tmp_path / f"{name}.pt").touch()
    os.utime(tmp_path / f"{names[0]}.pt", (2e9, 2e9))
    assert Checkpoint(tmp_path, "a").newest().name == f"{names[2]}.pt"
    assert Checkpoint(tmp_path, "[a]*").newest() is None


def test_every_flipped_bit_is_found_or_harmless(run_script, tmp_path):
    """What a damaged checkpoint gives is refused, or it is to the bit what was saved."""
    from decoupled import InputError

    path = run_script(PARALLEL, *TOY.split(), "--epochs", 1, **names(PARALLEL)).checkpoint
    data, expected, refused = path.read_bytes(), tensors(read_checkpoint(path)), 0
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (150,), generator=generator).tolist()
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            found = tensors(read_checkpoint(path))
        except InputError:
            refused += 1
            continue
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert refused > 75
    path.write_bytes(data[:4096] + bytes(4096) + data[8192:])  # a lost block
    with pytest.raises(InputError, match="damaged"):
        read_checkpoint(path)


def test_resume_auto_begins_where_there_is_nothing(run_script):
    left = run_script(PARALLEL, *TOY.split(), "--epochs", 1, "--resume", "auto", **names(PARALLEL))
    again = run_script(PARALLEL, *TOY.split(), "--epochs", 2, "--resume", "auto", **names(PARALLEL))
    assert again.log == left.log and "# resumed after epoch 1\n" in again.log.read_text()


def test_a_cifar_script_says_that_it_runs_on_one_process(fails, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert "runs on one process, not on 2: start it without torchrun" in fails(SEQUENTIAL, *TOY.split())
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "contradict each other" in fails(PARALLEL, *TOY.split())
    monkeypatch.delenv("WORLD_SIZE")
    assert "WORLD_SIZE is not set" in fails(PARALLEL, *TOY.split())


def test_processes_that_do_not_find_each_other_say_so_within_the_timeout(fails, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    assert f"process 0 has not found the others at 127.0.0.1:{port}" in fails(PARALLEL, *TOY.split(), "--timeout", 1)


def test_when_torchrun_dies_its_processes_end_and_say_so_once(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    agent = start(tmp_path, "--epochs", "1000", python=torchrun)
    try:
        log = wait_for(tmp_path, "n: 4, epoch 1,")
        agent.kill()
        message = agent.communicate(timeout=120)[1]  # stderr ends when the last process that has it does
    finally:
        agent.kill()
    said = [line for line in message.splitlines() if line.startswith("cifar_dgl.py")]
    assert said == ["cifar_dgl.py: error: torchrun has died; --resume goes on from the last checkpoint"]
    assert "Traceback" not in message
    Checkpoint(tmp_path, log.stem.rsplit("-", 2)[0]).read(None, lambda *saved: None)  # takes the run's lock
