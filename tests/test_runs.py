"""Runs: logs, checkpoints, resume after a real SIGKILL, and bad input, each on the real scripts."""

import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from unittest import mock

import pytest
import torch
from killed_run import run_killed
from running import PARALLEL, ROOT, SEQUENTIAL, Finished, assert_same_run, load_script

from decoupled import InputError
from decoupled.logs import read_log
from decoupled.training import flags
from decoupled.training import run as runs
from decoupled.training.checkpoint import RunFiles
from decoupled.training.flags import start
from decoupled.training.precision import Steps, allocate_momentum, has_bf16_instructions, pick_device

FLAGS = (
    *("--dataset", "digits", "--train-samples", "100", "--batch-size", "50", "--test-batch-size", "400"),
    *("--epochs", "3", "--device", "cpu", "--channels", "4"),
)


class Momentum(torch.optim.SGD):
    """Momentum that SGD allocates without a value has one to be noticed: nan."""

    def step(self):
        with mock.patch("torch.empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan"))):
            super().step()


def run_toy(monkeypatch, folder, main, *words):
    """Runs ``main``, a script's."""
    monkeypatch.setattr(sys, "argv", ["toy.py", "--device", "cpu", "--log-dir", str(folder), *words])
    start(main)
    return Finished(folder)


def toy_run(epochs=1):
    return runs.Run(flags.parser("", epochs=epochs, batch_size=8).parse_args())


def fp16_steps(monkeypatch, folder, fused):
    """Weights and loss scales of three modules after each of three fp16 steps, in whose first the second overflows."""
    history = []

    def main():
        run = toy_run()
        run.steps.new_scaler = lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        net = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        optimizers = [Momentum(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=fused) for m in net]
        for _ in run.epochs(net=net, optimizers=optimizers):
            for batch in range(3):
                values = torch.randn(8, 8)
                for n, (module, optimizer) in enumerate(zip(net, optimizers, strict=True)):
                    with torch.autocast("cpu", torch.float16):
                        loss = module(values).float().square().mean()
                    if (batch, n) == (0, 1):
                        loss = loss * 2.0**20
                    run.step(loss, optimizer)
                scales = [run.scaler(optimizer).get_scale() for optimizer in optimizers]
                history.append(([module.weight.detach().clone() for module in net], scales))

    run_toy(monkeypatch, folder, main)
    return history


def test_a_module_whose_first_step_overflows_skips_it_alone_and_then_learns_as_unfused(monkeypatch, tmp_path):
    fused = fp16_steps(monkeypatch, tmp_path / "fused", fused=True)
    plain = fp16_steps(monkeypatch, tmp_path / "plain", fused=False)
    torch.manual_seed(0)
    before = [torch.nn.Linear(8, 8).weight for _ in range(3)]
    assert [torch.equal(a, b) for a, b in zip(before, fused[0][0], strict=True)] == [False, True, False]
    assert fused[0][1] == [2.0**10, 2.0**9, 2.0**10]
    for (weights, scales), (expected_weights, expected_scales) in zip(fused, plain, strict=True):
        assert scales == expected_scales
        for weight, expected in zip(weights, expected_weights, strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(fused[1][0][1], fused[0][0][1])


@pytest.mark.parametrize("nesterov", [False, True])
def test_allocated_momentum_steps_bit_for_bit_as_before(nesterov):
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov, "fused": True}
    optimizers = [torch.optim.SGD(net.parameters(), **settings) for net in nets]
    allocate_momentum(optimizers[1])
    for _ in range(3):
        images = torch.randn(4, 3, 8, 8)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_step_without_a_loss_scale_is_the_plain_step():
    states = []
    for plain in (True, False):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        steps = Steps(torch.device("cpu"), half=False)
        for _ in range(3):
            loss = module(torch.ones(2, 4)).square().mean()
            if plain:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                steps.step(loss, optimizer)
        states.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*states)


# Killed and resumed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the two scripts leave when nothing stops them."""

    def run(script):
        folder = tmp_path_factory.mktemp("whole")
        argv = sys.argv
        sys.argv = [str(ROOT / script), *FLAGS, "--log-dir", str(folder)]
        try:
            start(load_script(script).main)
        finally:
            sys.argv = argv
        return Finished(folder)

    return {script: run(script) for script in (PARALLEL, SEQUENTIAL)}


@pytest.mark.parametrize(
    ("script", "moment", "count"),
    [
        (PARALLEL, "step", 13),  # of 8 an epoch
        (PARALLEL, "log", 8),  # the first appends the header; an epoch appends four heads and the time
        (PARALLEL, "write", 3),
        (PARALLEL, "rename", 3),
        (SEQUENTIAL, "step", 9),
        (SEQUENTIAL, "write", 8),
    ],
)
def test_a_killed_run_resumes_to_identical_weights_and_lines(run_script, whole, tmp_path, script, moment, count):
    folder = tmp_path / "logs"
    run_killed(script, (*FLAGS, "--log-dir", folder), moment, count)
    (log,) = folder.glob("*.log")
    assert len(log.read_text().splitlines()) > 3
    left = run_script(script, *FLAGS, "--resume")
    assert "# resumed after" in left.log.read_text()
    assert_same_run(left, whole[script])
    assert {path.suffix for path in folder.iterdir()} == {".log", ".pt"}


def test_more_epochs_continue_as_if_never_stopped_and_a_finished_run_stays(run_script, whole):
    run_script(PARALLEL, *FLAGS, "--epochs", 2)
    left = run_script(PARALLEL, *FLAGS, "--resume")
    assert_same_run(left, whole[PARALLEL])
    log = left.log.read_bytes()
    again = run_script(PARALLEL, *FLAGS, "--resume")
    assert_same_run(again, whole[PARALLEL])
    assert again.log.read_bytes() == log


def test_sequential_epochs_cannot_grow_once_the_first_module_is_done(fails, whole, tmp_path):
    shutil.copytree(whole[SEQUENTIAL].folder, tmp_path / "logs")
    assert "--epochs 3 (now 4)" in fails(SEQUENTIAL, *FLAGS, "--epochs", 4, "--resume")


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, epochs: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        lambda optimizer, epochs: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, epochs),
        lambda optimizer, epochs: torch.optim.lr_scheduler.StepLR(optimizer, epochs // 2),
        lambda optimizer, epochs: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / epochs)),
        lambda optimizer, epochs: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, epochs // 2),
        lambda optimizer, epochs: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs),
        lambda optimizer, epochs: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs),
        lambda optimizer, epochs: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=1),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
            ],
            [1],
        ),
        lambda optimizer, epochs: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=1),
                torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=1),
            ],
            [epochs // 2],
        ),
    ],
)
def test_more_epochs_are_refused_where_the_schedule_has_a_length(monkeypatch, capsys, tmp_path, make):
    def main():
        run = toy_run(epochs=2)
        net = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = make(optimizer, run.args.epochs)
        for _ in run.epochs(net=net, optimizers=optimizer, schedules=schedule):
            schedule.step()

    left = run_toy(monkeypatch, tmp_path, main)
    before = left.checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_toy(monkeypatch, tmp_path, main, "--resume", "--epochs", "4")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(left.checkpoint) in message and "--epochs" in message
    assert left.checkpoint.read_bytes() == before
    run_toy(monkeypatch, tmp_path, main, "--resume")


class Numbers:
    """Numbers 0 to 2, which know their place."""

    place = 3  # as Batches: an epoch must be begun

    def begin(self):
        self.place = 0

    def rest(self):
        while self.place < 3:
            self.place += 1
            yield self.place - 1

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize(
    ("mistake", "named"), [("images", "train="), ("optimizer", "optimizers="), ("evaluation", "train.")]
)
def test_what_would_not_resume_is_refused(monkeypatch, capsys, tmp_path, mistake, named):
    """Images whose epochs never begin, optimizers that are not saved, and images that evaluation takes out of place."""
    numbers = Numbers()
    seen = []

    def main():
        run = toy_run()
        net = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        other = torch.optim.SGD(net.parameters(), lr=0.1)
        state = {} if mistake == "images" else {"train": numbers}
        for _ in run.epochs(net=net, optimizers=optimizer, **state):
            for number in run.progress(numbers):
                seen.append(number)
                run.step(net(torch.ones(1, 2)).sum(), other if mistake == "optimizer" else optimizer)
            for _ in run.evaluation(numbers if mistake == "evaluation" else [1, 2]):
                pass

    with pytest.raises(SystemExit) as stop:
        run_toy(monkeypatch, tmp_path / "mistake", main)
    assert stop.value.code == 2 and named in capsys.readouterr().err
    mistake = None
    seen.clear()
    run_toy(monkeypatch, tmp_path / "right", main)
    assert seen == [0, 1, 2]


def test_batches_that_cannot_resume_are_refused_before_a_step(monkeypatch, capsys, tmp_path):
    """They would silently begin the epoch anew."""
    seen = []

    def main():
        run = toy_run()
        net = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in run.epochs(net=net, optimizers=optimizer):
            for batch in run.progress([1, 2, 3]):
                seen.append(batch)

    with pytest.raises(SystemExit) as stop:
        run_toy(monkeypatch, tmp_path, main)
    assert stop.value.code == 2 and not seen
    message = capsys.readouterr().err
    assert "rest()" in message and "state_dict()" in message


def test_same_seed_same_run_other_seed_another(run_script, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "keep_freed_memory", lambda: None)  # which changes no result either
    again = run_script(PARALLEL, *FLAGS)
    assert_same_run(again, whole[PARALLEL])
    other = run_script(PARALLEL, *FLAGS, "--epochs", 1, "--seed", 2, folder=tmp_path / "other")
    assert other.lines != again.lines[:4]


def test_half_precision_trains_and_resumes(run_script, tmp_path):
    half = (*FLAGS, "--epochs", 2, "--half")
    run_script(PARALLEL, *half, "--epochs", 1)
    left = run_script(PARALLEL, *half, "--resume")
    assert "bf16 mixed" in left.log.read_text()
    assert_same_run(left, run_script(PARALLEL, *half, folder=tmp_path / "whole"))
    sequential = run_script(SEQUENTIAL, *half, "--epochs", 1, folder=tmp_path / "sequential")
    for run in (left, sequential):
        assert all(value.dtype in (torch.float32, torch.int64) for value in run.weights.values())
        assert read_log(run.log).loss.notna().all()


def test_half_warns_on_a_cpu_without_bf16_instructions(run_script, monkeypatch, capsys, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    for words, expected in (("fma avx512_bf16", True), ("Features : asimd bf16", True), ("fma avx2", False)):
        cpuinfo.write_text(f"flags : {words} sse\n")
        assert has_bf16_instructions(cpuinfo) is expected
    assert has_bf16_instructions(tmp_path / "none")
    tiny = (*FLAGS, "--epochs", 1, "--channels", 1)
    for has, words, warnings in ((True, ["--half"], 0), (False, [], 0), (False, ["--half"], 1)):
        monkeypatch.setattr("decoupled.training.precision.has_bf16_instructions", lambda has=has: has)
        run_script(PARALLEL, *tiny, *words)
        assert capsys.readouterr().err.count("\n") == warnings


# Logs and names


def test_the_log_says_how_it_was_made(whole):
    text = whole[PARALLEL].log.read_text()
    assert re.match(r"Namespace\(epochs=3, .*dataset='digits'.*\)\n# command: python ", text)
    torch_version = re.escape(metadata.version("torch"))
    for expected in (
        rf"# versions: python {sys.version.split()[0]} torch {torch_version} torchvision \S+ numpy \S+",
        r"# commit: ([0-9a-f]{12}\+?|unknown)",
        r"# device: cpu \(\w+\), \d+ threads, fp32",
        r"# train: 100 images of digits \(scikit-learn\)",
        r"# test: 359 images of digits \(scikit-learn\)",
        r"DecoupledNetwork\(",
    ):
        assert re.search(f"^{expected}", text, re.MULTILINE), expected
    frame = read_log(whole[PARALLEL].log)
    assert len(frame) == 12 and frame.attrs["arguments"]["train_samples"] == 100
    assert len(frame.attrs["seconds"]) == 3 and all(seconds > 0 for seconds in frame.attrs["seconds"])
    assert frame.epoch.unique().tolist() == [1, 2, 3] and frame.n.tolist() == [1, 2, 3, 4] * 3
    assert len(read_log(whole[SEQUENTIAL].log).attrs["seconds"]) == 12


def test_resume_takes_the_newest_of_that_name_or_the_one_given(run_script):
    tiny = (*FLAGS, "--channels", 1, "--train-samples", 50)
    first = run_script(PARALLEL, *tiny, "--epochs", 1, "--name", "a").log
    second = run_script(PARALLEL, *tiny, "--epochs", 1, "--name", "b").log
    run_script(PARALLEL, *tiny, "--epochs", 2, "--name", "a", "--resume", "auto")
    assert len(read_log(first)) == 8 and len(read_log(second)) == 4
    run_script(PARALLEL, *tiny, "--epochs", 2, "--name", "b", "--resume", second.with_suffix(".pt"))
    assert len(read_log(second)) == 8
    begun = run_script(PARALLEL, *tiny, "--epochs", 1, "--name", "c", "--resume", "auto").log
    assert begun not in (first, second) and len(read_log(begun)) == 4


@pytest.mark.parametrize("change", ["edited", "shortened", "continued", "gone"])
def test_a_changed_log_is_kept_and_written_anew(run_script, whole, change):
    first = run_script(PARALLEL, *FLAGS, "--epochs", 1)
    text = first.log.read_text()
    changed = {
        "edited": text.replace("epoch 1", "epoch 9"),
        "shortened": text[:-20],
        "continued": text + "my best run so far\n",
        "gone": None,
    }[change]
    if changed is None:
        first.log.unlink()
    else:
        first.log.write_text(changed)
    left = run_script(PARALLEL, *FLAGS, "--epochs", 2, "--resume")
    assert left.log == first.log and left.lines == whole[PARALLEL].lines[:8]
    assert left.log.read_text().startswith(text)
    kept = first.log.with_name(f"{first.log.stem}.edited.log")
    assert (kept.read_text() if kept.exists() else None) == changed
    assert (kept.name in left.log.read_text()) == (changed is not None)


def test_the_lost_log_of_a_finished_run_is_written_anew(run_script):
    tiny = (*FLAGS, "--channels", 1, "--train-samples", 50, "--epochs", 1)
    log = run_script(PARALLEL, *tiny).log
    text = log.read_text()
    noted = f"{text}# my note\n"
    log.write_text(noted)
    run_script(PARALLEL, *tiny, "--resume")
    assert log.read_text() == noted
    log.unlink()
    run_script(PARALLEL, *tiny, "--resume")
    assert log.read_text() == text


def test_a_script_runs_from_its_own_folder(tmp_path):
    words = [*FLAGS, "--epochs", "1", "--channels", "1", "--log-dir", str(tmp_path)]
    command = [sys.executable, "cifar_sequential_greedy.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT / "learning_curves", env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"n: ") == 4 and not done.stderr


# Bad input


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--dataset", "mnist"), ("--dataset", "mnist")),
        (("--data-dir", "/nonexistent/data", "--dataset", "folder"), ("/nonexistent/data",)),
        (("--epochs", "0"), ("--epochs", "'0'")),
        (("--batch-size", "12.5"), ("--batch-size", "12.5")),
        (("--dataset", "digits", "--train-samples", "2000"), ("--train-samples 2000", "1438", "digits")),
        (("--dataset", "digits", "--train-samples", "100"), ("100", "128")),
        (("--device", "tpu"), ("--device tpu",)),
        (("--device", "cuda:99"), ("--device cuda:99",)),
        (("--epoch-s", "3"), ("--epoch-s",)),
        (("--dataset", "digits", "--resume"), ("--resume",)),
        (("--dataset", "digits", "--resume", "/nonexistent.pt"), ("/nonexistent.pt",)),
    ],
)
def test_bad_flags(fails, words, named):
    message = fails(PARALLEL, *words)
    assert all(text in message for text in named)


def test_truncated_image_ends_the_script(fails, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "train/cat/0.jpg" in fails(PARALLEL, "--dataset", "folder", "--data-dir", tmp_path / "data")


def test_log_folder_that_cannot_be_written_to(fails, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "logs"):
        assert str(folder) in fails(PARALLEL, *FLAGS, folder=folder)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run: its checkpoint."""
    shutil.copytree(whole[PARALLEL].folder, tmp_path / "logs")
    return next((tmp_path / "logs").glob("*.pt"))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated_checkpoint(fails, finished, keep):
    data = finished.read_bytes()
    finished.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    assert str(finished) in fails(PARALLEL, *FLAGS, "--resume")


def rewritten(path, **fields):
    """Writes the checkpoint at ``path`` with other fields."""
    torch.save({**torch.load(path, weights_only=True), **fields}, path)


def test_checkpoint_that_is_something_else_or_older(fails, finished):
    rewritten(finished, format=3)
    message = fails(PARALLEL, *FLAGS, "--resume")
    assert str(finished) in message and "2391bbc" in message
    torch.save({"weights": torch.zeros(3)}, finished)
    assert str(finished) in fails(PARALLEL, *FLAGS, "--resume")


def test_checkpoint_of_another_script_or_other_arguments(fails, finished):
    message = fails(SEQUENTIAL, *FLAGS, "--resume", finished)
    assert PARALLEL in message and SEQUENTIAL in message
    message = fails(PARALLEL, *FLAGS, "--seed", 9, "--half", "--resume")
    assert "--seed 1 (now 9)" in message and "--half False (now True)" in message
    assert "--epochs 3 (now 2)" in fails(PARALLEL, *FLAGS, "--epochs", 2, "--resume")


def test_checkpoint_of_another_network(fails, finished):
    saved = torch.load(finished, weights_only=True)
    rewritten(finished, arguments=saved["arguments"] | {"channels": 8})
    assert str(finished) in fails(PARALLEL, *FLAGS, "--channels", 8, "--resume")
    rewritten(finished, arguments=saved["arguments"], state=saved["state"] | {"optimizers": []})
    assert str(finished) in fails(PARALLEL, *FLAGS, "--resume")


@contextlib.contextmanager
def largest_file(size):
    """No file can become larger: as on a full disk, the write that does not fit is done in part and fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_the_last_checkpoint_stays_and_resumes(run_script, whole, capsys, tmp_path):
    size = whole[PARALLEL].checkpoint.stat().st_size
    with largest_file(size // 2), pytest.raises(SystemExit) as stop:
        run_script(PARALLEL, *FLAGS)
    assert stop.value.code == 2 and not list((tmp_path / "logs").iterdir())  # nothing of a run that was never saved
    before = run_script(PARALLEL, *FLAGS, "--epochs", 1).checkpoint.read_bytes()
    capsys.readouterr()
    with largest_file(size // 2), pytest.raises(SystemExit) as stop:
        run_script(PARALLEL, *FLAGS, "--resume")
    left = Finished(tmp_path / "logs")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert str(left.checkpoint) in message and os.strerror(errno.EFBIG) in message
    assert left.checkpoint.read_bytes() == before
    assert {path.suffix for path in left.folder.iterdir()} == {".log", ".pt"}
    assert_same_run(run_script(PARALLEL, *FLAGS, "--resume"), whole[PARALLEL])


def test_on_a_disk_without_any_room_nothing_is_left(tmp_path):
    with largest_file(0), pytest.raises(InputError):
        RunFiles(tmp_path, "script").create_log("log\n")
    assert not list(tmp_path.iterdir())


def test_a_line_that_does_not_fit_is_not_in_the_log(tmp_path):
    files = RunFiles(tmp_path, "script")
    files.create_log("x" * 600 + "\n")
    with largest_file(1000), pytest.raises(InputError, match=re.escape(str(files.path(".log")))):
        files.append_to_log("y" * 600 + "\n")
    assert files.path(".log").read_text() == files.log_text == "x" * 600 + "\n"
    files.close()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(run_script, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_script(PARALLEL, *FLAGS, "--lr", 1e30)
    message = capsys.readouterr().err
    left = Finished(tmp_path / "logs")
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "module 1" in message and "epoch 1, batch 2" in message and str(left.checkpoint) in message
    assert torch.load(left.checkpoint, weights_only=True)["epoch"] == 0
    assert not left.lines and all(weight.isfinite().all() for weight in left.weights.values())


def test_device_names():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="gpu"):
        pick_device("gpu")
