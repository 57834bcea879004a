"""Every CIFAR script stops at a signal after any mini-batch, and resumes to the bit; one run has one writer."""

import errno
import fcntl
import os
import signal
import socket
import time

import pytest
import torch
from killed_run import run_forked
from running import PARALLEL, SEQUENTIAL, Finished, assert_same_run, tensors

from decoupled import InputError
from decoupled.training.checkpoint import RunFiles, read_checkpoint
from decoupled.training.console import PASSED_ON_WITHIN
from decoupled.training.run import Run

TOY = "--dataset digits --train-samples 80 --batch-size 16 --test-batch-size 100 --device cpu"  # 5 batches; test: 4
SMALL = (*TOY.split(), "--channels", "2")
SCRIPTS = [  # script, flags, calls of save_or_stop in an epoch
    (PARALLEL, f"{TOY} --epochs 2 --channels 2 --precise-statistics", 10),
    (SEQUENTIAL, f"{TOY} --epochs 1 --channels 2", 10),
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


@pytest.fixture
def at_call(monkeypatch):
    """at_call(call, act): from now on, ``act(run)`` is called in call number ``call`` of save_or_stop."""
    real = Run.save_or_stop

    def begin(call, act):
        calls = []

        def save_or_stop(run):
            calls.append(run.batch)
            if len(calls) == call:
                act(run)
            real(run)

        monkeypatch.setattr(Run, "save_or_stop", save_or_stop)

    return begin


@pytest.mark.parametrize(("script", "flags", "calls"), SCRIPTS, ids=lambda value: str(value).split(" --device")[0])
def test_stopped_amid_an_epoch_and_amid_its_evaluation_a_run_resumes_to_the_bit(
    run_script, at_call, capsys, tmp_path, script, flags, calls
):
    words = flags.split()
    whole = run_script(script, *words, folder=tmp_path / "whole")
    capsys.readouterr()
    for call, number, resume in ((3, signal.SIGTERM, ()), (calls - 5, signal.SIGINT, ("--resume",))):
        at_call(call, lambda run, number=number: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            run_script(script, *words, *resume)
        assert stop.value.code == 128 + number
        message = capsys.readouterr().err
        assert number.name in message and "--resume" in message
    at_call(0, None)
    left = run_script(script, *words, "--resume")
    assert left.log.read_text().count("# resumed after ") == 2
    assert_same_run(left, whole)


def test_killed_within_an_epoch_a_run_goes_on_from_its_last_minutes(run_script, at_call, tmp_path):
    """With --save-every, checkpoints within an epoch; none of them changes a result."""
    words = (*SMALL, "--epochs", 2)
    whole = run_script(PARALLEL, *words, folder=tmp_path / "whole")
    at_call(14, lambda run: os.kill(os.getpid(), signal.SIGKILL))  # 10 an epoch: batch 4 of the second
    code = run_forked(PARALLEL, (*words, "--save-every", 1e-9, "--log-dir", tmp_path / "logs"))
    assert code == -signal.SIGKILL
    at_call(0, None)
    left = run_script(PARALLEL, *words, "--resume")
    assert "# resumed after epoch 2, batch 3\n" in left.log.read_text()
    assert_same_run(left, whole)


def test_a_second_signal_ends_a_run_at_once(at_call, tmp_path):
    def two_signals(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()  # hangs, whatever comes

    at_call(3, two_signals)
    code = run_forked(PARALLEL, (*SMALL, "--epochs", 1, "--log-dir", tmp_path))
    assert code == 128 + signal.SIGTERM
    assert torch.load(Finished(tmp_path).checkpoint, weights_only=True)["epoch"] == 0  # the run's first


def test_torchrun_passes_on_a_signal_that_all_processes_have_received(at_call, monkeypatch, tmp_path):
    """As from a job queue: the same signal twice. A later one is a second signal."""

    def signal_twice(run):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    def signal_later(run):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(run.signals, "received_at", run.signals.received_at - PASSED_ON_WITHIN)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    ends = ((signal_twice, 128 + signal.SIGTERM, 3), (signal_later, 128 + signal.SIGINT, 0))
    for signals, code, saved_batch in ends:
        at_call(3, signals)
        folder = tmp_path / signals.__name__
        assert run_forked(PARALLEL, (*SMALL, "--epochs", 1, "--log-dir", folder)) == code
        assert torch.load(Finished(folder).checkpoint, weights_only=True)["batch"] == saved_batch


@pytest.fixture
def begun(run_script):
    return run_script(PARALLEL, *SMALL, "--epochs", 1)


def no_flock(error):
    """fcntl.flock of a file system that has none."""

    def flock(file, operation):
        raise OSError(error, os.strerror(error))

    return flock


@pytest.mark.parametrize("missing", [None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_one_process_writes_a_run_and_a_dead_one_does_not_count(fails, run_script, begun, monkeypatch, missing):
    if missing:
        monkeypatch.setattr(fcntl, "flock", no_flock(missing))
    child = os.fork()
    if child == 0:
        try:
            files = RunFiles(begun.folder, "")
            files.select(begun.checkpoint)
            files.acquire()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(1)
    os.waitpid(child, os.WUNTRACED)
    try:
        message = fails(PARALLEL, *SMALL, "--epochs", 2, "--resume")
        assert str(begun.log) in message and str(child) in message
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    left = run_script(PARALLEL, *SMALL, "--epochs", 2, "--resume", "auto")
    assert left.log == begun.log and {path.suffix for path in left.folder.iterdir()} == {".log", ".pt"}


def test_runs_of_one_second_have_files_of_their_own(tmp_path):
    runs = [RunFiles(tmp_path, "name") for _ in range(120)]
    for number, files in enumerate(runs):
        files.create_log(f"{number}\n")
    assert [files.path(".log").read_text() for files in runs] == [f"{n}\n" for n in range(120)]
    for files in runs:
        files.close()
    assert len([*tmp_path.iterdir()]) == 120


def test_the_newest_run_is_the_one_of_that_name_that_began_last(tmp_path):
    names = ("a-20260101-000000", "a-20260102-000000-2", "a-20260102-000000-10", "a-b-20270101-000000", "a-2028")
    for name in names:
        (tmp_path / f"{name}.pt").touch()
    os.utime(tmp_path / f"{names[0]}.pt", (2e9, 2e9))
    assert RunFiles(tmp_path, "a").newest_checkpoint().name == f"{names[2]}.pt"
    assert RunFiles(tmp_path, "a", "b").newest_checkpoint().name == f"{names[3]}.pt"
    assert RunFiles(tmp_path, "[a]*").newest_checkpoint() is None


def test_a_new_run_is_the_newest_even_if_the_clock_has_gone_back(tmp_path):
    (tmp_path / "a-29990101-000000.pt").touch()
    for number in (1, 2):
        files = RunFiles(tmp_path, "a")
        files.create_log("log\n")
        files.path(".pt").touch()
        assert RunFiles(tmp_path, "a").newest_checkpoint() == files.path(".pt"), number
        files.close()


def test_every_flipped_bit_is_found_or_harmless(begun):
    """What a damaged checkpoint gives is refused, or it is to the bit what was saved."""
    path = begun.checkpoint
    data = path.read_bytes()
    expected = tensors(read_checkpoint(path))
    refused = 0
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(len(data), (120,), generator=generator).tolist()
    in_directory = torch.randint(len(data) - 3000, len(data), (120,), generator=generator).tolist()  # of the archive
    for place in anywhere + in_directory:
        bit = int(torch.randint(8, (), generator=generator))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            found = tensors(read_checkpoint(path))
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert refused > 120
    path.write_bytes(data[:4096] + bytes(4096) + data[8192:])  # a lost block
    with pytest.raises(InputError, match=str(path)):
        read_checkpoint(path)


def test_processes_of_torchrun_are_counted_and_found(fails, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    message = fails(SEQUENTIAL, *SMALL)
    assert SEQUENTIAL in message and "torchrun" in message
    assert f"127.0.0.1:{port}" in fails(PARALLEL, *SMALL, "--timeout", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert "WORLD_SIZE" in fails(PARALLEL, *SMALL)
