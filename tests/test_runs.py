"""Runs: logs, checkpoints, resume after a real SIGKILL, and every bad input, each on the real scripts."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from unittest import mock

import pytest
import torch
from running import PARALLEL, ROOT, SEQUENTIAL, Finished, load_script, small

from decoupled import InputError
from decoupled.logs import read_log
from decoupled.training import checkpoint as checkpoints
from decoupled.training import flags
from decoupled.training import run as runs
from decoupled.training.flags import start
from decoupled.training.precision import Steps, momentum_from_zeros

FLAGS = ("--dataset", "digits", "--train-samples", "100", "--batch-size", "50", "--epochs", "3", "--device", "cpu")


def assert_same(left, whole):
    assert left.lines == whole.lines
    for name, value in whole.weights.items():
        assert torch.equal(value, left.weights[name]), name
    for mine, its in zip(left.state["optimizers"], whole.state["optimizers"], strict=True):
        for key, value in its["state"].items():
            assert torch.equal(value["momentum_buffer"], mine["state"][key]["momentum_buffer"])


class Momentum(torch.optim.SGD):
    """Momentum that SGD allocates without a value has one to be noticed: nan."""

    def step(self):
        with mock.patch("torch.empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan"))):
            super().step()


def fp16_steps(fused, tmp_path):
    """Weights and loss scales of three modules after each of three fp16 steps, in whose first the second overflows."""
    history = []

    def main():
        run = runs.Run(flags.parser("", epochs=1, batch_size=8).parse_args())
        run.steps.scaler = lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        net = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        optimizers = [Momentum(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=fused) for m in net]
        for _ in run.epochs(net=net, optimizers=optimizers):
            for batch in range(3):
                values = torch.randn(8, 8)
                for n, (module, optimizer) in enumerate(zip(net, optimizers, strict=True)):
                    with torch.autocast("cpu", torch.float16):
                        loss = module(values).float().square().mean() * (2.0**20 if (batch, n) == (0, 1) else 1)
                    run.step(loss, optimizer)
                scales = [run.scaler(optimizer).get_scale() for optimizer in optimizers]
                history.append(([module.weight.detach().clone() for module in net], scales))

    argv, sys.argv = sys.argv, ["toy.py", "--device", "cpu", "--log-dir", str(tmp_path / f"fused{fused}")]
    try:
        start(main)
    finally:
        sys.argv = argv
    return history


def test_a_module_whose_first_step_overflows_skips_it_alone_and_then_learns_as_unfused(tmp_path):
    fused, plain = (fp16_steps(fused, tmp_path) for fused in (True, False))
    torch.manual_seed(0)
    before = [torch.nn.Linear(8, 8).weight for _ in range(3)]
    assert [torch.equal(a, b) for a, b in zip(before, fused[0][0], strict=True)] == [False, True, False]
    assert fused[0][1] == [2.0**10, 2.0**9, 2.0**10]
    for (weights, scales), (expected, its) in zip(fused, plain, strict=True):
        assert scales == its
        for weight, other in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(fused[1][0][1], fused[0][0][1])


def test_momentum_from_zeros_steps_bit_for_bit_as_before():
    for nesterov in (False, True):
        nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov, "fused": True}
        optimizers = [torch.optim.SGD(net.parameters(), **settings) for net in nets]
        momentum_from_zeros(optimizers[1])
        for _ in range(3):
            images = torch.randn(4, 3, 8, 8)
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                net(images).square().sum().backward()
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


# (script, moment, how often it has happened): 4 modules, 2 batches an epoch; writes to the log: 1 of the header, then
# heads and one of the time.
KILLS = [
    (PARALLEL, "step", 13),
    (PARALLEL, "log", 8),
    (PARALLEL, "write", 3),
    (PARALLEL, "replace", 3),
    (PARALLEL, "renamed", 3),
    (SEQUENTIAL, "step", 9),
    (SEQUENTIAL, "write", 8),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the two scripts leave when nothing stops them."""

    def run(script):
        folder = tmp_path_factory.mktemp("whole")
        module = load_script(script)
        module.layerwise_cnn = small()
        argv, sys.argv = sys.argv, [str(ROOT / script), *FLAGS, "--log-dir", str(folder)]
        try:
            start(module.main)
        finally:
            sys.argv = argv
        return Finished(folder)

    return {script: run(script) for script in (PARALLEL, SEQUENTIAL)}


@pytest.mark.parametrize(("script", "moment", "count"), KILLS)
def test_a_killed_run_resumes_to_identical_weights_and_lines(run_script, whole, tmp_path, script, moment, count):
    command = [
        sys.executable,
        ROOT / "tests" / "killed_run.py",
        moment,
        str(count),
        script,
        *FLAGS,
        "--log-dir",
        str(tmp_path / "logs"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = (tmp_path / "logs").glob("*.log").__next__().read_text()
    left = run_script(script, *FLAGS, "--resume", layerwise_cnn=small())
    assert len(before.splitlines()) > 3 and "# resumed after" in left.log.read_text()
    assert_same(left, whole[script])
    assert not list(left.folder.glob("*.tmp"))


def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(fails, tmp_path):
    fails(PARALLEL, *FLAGS, "--resume")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "learning_curves-cifar_dgl-20260101-000000.log").write_text("Namespace()\n")
    assert "nothing to resume" in fails(PARALLEL, *FLAGS, "--resume")


def test_the_log_says_how_it_was_made(whole):
    text = whole[PARALLEL].log.read_text()
    assert re.match(r"Namespace\(epochs=3, .*dataset='digits'.*\)\n# command: python ", text)
    for expected in (
        rf"# versions: python {sys.version.split()[0]} torch {re.escape(metadata.version('torch'))} "
        rf"torchvision \S+ numpy \S+",
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


def test_more_epochs_continue_as_if_never_stopped(run_script, whole):
    run_script(PARALLEL, *FLAGS, "--epochs", 2, layerwise_cnn=small())
    left = run_script(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())
    assert_same(left, whole[PARALLEL])


def test_resuming_a_finished_run_changes_no_result(run_script, whole, tmp_path):
    shutil.copytree(whole[PARALLEL].folder, tmp_path / "logs")
    left = run_script(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())
    assert_same(left, whole[PARALLEL])
    assert left.log.read_bytes() == whole[PARALLEL].log.read_bytes()


def test_same_seed_same_run_other_seed_another(run_script, whole, tmp_path):
    again = run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    assert_same(again, whole[PARALLEL])
    other = run_script(PARALLEL, *FLAGS, "--seed", 2, folder=tmp_path / "other", layerwise_cnn=small())
    assert other.lines != again.lines


def test_two_runs_in_one_second_do_not_share_a_log(run_script, tmp_path):
    for _ in range(3):
        run_script(
            PARALLEL,
            *FLAGS,
            "--epochs",
            1,
            "--train-samples",
            50,
            layerwise_cnn=small(channels=1, depth=1, downsample=()),
        )
    assert len(list((tmp_path / "logs").glob("*.log"))) == len(list((tmp_path / "logs").glob("*.pt"))) == 3


def test_resume_takes_the_newest_of_that_name_or_the_one_given(run_script, tmp_path):
    tiny = small(channels=1, depth=1, downsample=())
    first = run_script(PARALLEL, *FLAGS, "--epochs", 1, "--name", "a", layerwise_cnn=tiny).log
    second = run_script(PARALLEL, *FLAGS, "--epochs", 1, "--name", "b", layerwise_cnn=tiny).log
    run_script(PARALLEL, *FLAGS, "--name", "a", "--resume", layerwise_cnn=tiny)
    assert len(read_log(first)) == 3 and len(read_log(second)) == 1
    run_script(PARALLEL, *FLAGS, "--name", "b", "--resume", second.with_suffix(".pt"), layerwise_cnn=tiny)
    assert len(read_log(second)) == 3


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_half_precision_trains_and_resumes(run_script, script, tmp_path):
    if script == PARALLEL:  # from a checkpoint after one epoch
        run_script(script, *FLAGS, "--epochs", 1, "--half", layerwise_cnn=small())
        left = run_script(script, *FLAGS, "--half", "--resume", layerwise_cnn=small())
        assert "bf16 mixed" in left.log.read_text()
        assert_same(left, run_script(script, *FLAGS, "--half", folder=tmp_path / "whole", layerwise_cnn=small()))
    else:
        left = run_script(script, *FLAGS, "--half", layerwise_cnn=small())
    assert all(value.dtype in (torch.float32, torch.int64) for value in left.weights.values())
    assert read_log(left.log).loss.notna().all()


def test_keeping_freed_memory_changes_no_result(run_script, whole, monkeypatch):
    monkeypatch.setattr(flags, "keep_freed_memory", lambda: None)
    assert_same(run_script(PARALLEL, *FLAGS, layerwise_cnn=small()), whole[PARALLEL])


def test_scripts_run_from_their_own_folder_and_from_the_root(tmp_path):
    for folder, script in ((ROOT, PARALLEL), (ROOT / "learning_curves", "cifar_sequential_greedy.py")):
        command = [
            sys.executable,
            script,
            *FLAGS[:4],
            "--batch-size",
            "100",
            "--epochs",
            "1",
            "--log-dir",
            str(tmp_path),
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("n: ") == 4 and "finished: " in done.stdout
    assert len(list(tmp_path.glob("*.log"))) == 2


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "mnist"), "argument --dataset: invalid choice: 'mnist'"),
        (("--data-dir", "/nonexistent/data"), "--data-dir /nonexistent/data is no folder"),
        (("--epochs", "0"), "argument --epochs: '0' must be an integer ≥ 1"),
        (("--batch-size", "-4"), "argument --batch-size: '-4' must be an integer ≥ 1"),
        (("--batch-size", "12.5"), "argument --batch-size: '12.5' must be an integer ≥ 1"),
        (
            ("--dataset", "digits", "--train-samples", "2000"),
            "--train-samples 2000 is more than the 1438 training images of digits",
        ),
        (("--dataset", "digits", "--train-samples", "100"), "100 training images are fewer than one batch of 128"),
        (("--device", "tpu"), "--device tpu is unknown: choose from auto, cpu, cuda, cuda:N, mps"),
        (("--device", "cuda:99"), "--device cuda:99 is not on this machine"),
        (("--epoch-s", "3"), "unrecognized arguments: --epoch-s 3"),
        (("--dataset", "digits", "--resume"), "nothing to resume in "),
        (("--dataset", "digits", "--resume", "/nonexistent.pt"), "no checkpoint /nonexistent.pt"),
    ],
)
@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_bad_flags(fails, script, flags, message):
    assert message in fails(script, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_one(fails):
    assert "--device cuda is not on this machine (0 such devices): --device cpu always works" in fails(
        PARALLEL, "--device", "cuda"
    )


def test_truncated_image_ends_the_script(fails, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            (tmp_path / "data" / split / name / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "train/cat/0.jpg is damaged" in fails(PARALLEL, "--dataset", "folder", "--data-dir", tmp_path / "data")


def test_log_folder_that_cannot_be_written_to(fails, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "logs"):
        assert "cannot be written to" in fails(PARALLEL, *FLAGS, folder=folder)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run: its folder and checkpoint."""
    shutil.copytree(whole[PARALLEL].folder, tmp_path / "logs")
    return next((tmp_path / "logs").glob("*.pt"))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated_checkpoint(fails, finished, keep):
    data = finished.read_bytes()
    finished.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    assert "is truncated, damaged or no checkpoint" in fails(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())


def test_checkpoint_that_is_something_else(fails, finished):
    torch.save({"weights": torch.zeros(3)}, finished)
    assert "is no checkpoint of these scripts" in fails(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())


def test_checkpoint_of_another_script(fails, finished):
    message = fails(SEQUENTIAL, *FLAGS, "--resume", finished, layerwise_cnn=small())
    assert (
        "is a checkpoint of learning_curves/cifar_dgl.py, not of learning_curves/cifar_sequential_greedy.py" in message
    )


@pytest.mark.parametrize("other", [{"channels": 8}, {"depth": 3}, {"block_size": 2}])
def test_checkpoint_of_another_network(fails, finished, other):
    assert "is a checkpoint of another network" in fails(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small(**other))


def test_other_arguments_are_named(fails, finished):
    message = fails(PARALLEL, *FLAGS, "--seed", 9, "--half", "--resume", layerwise_cnn=small())
    assert "is of a run with --seed 1 (now 9), --half False (now True): resume it with the same arguments" in message
    assert "--epochs 3 (now 2)" in fails(PARALLEL, *FLAGS, "--epochs", 2, "--resume", layerwise_cnn=small())


def test_sequential_epochs_cannot_grow_once_the_first_module_is_done(run_script, fails):
    run_script(SEQUENTIAL, *FLAGS, layerwise_cnn=small(depth=2))
    assert "--epochs 3 (now 4)" in fails(SEQUENTIAL, *FLAGS, "--epochs", 4, "--resume", layerwise_cnn=small(depth=2))


@pytest.mark.parametrize("change", ["edited", "shortened", "gone"])
def test_a_changed_log_is_kept_and_written_anew(run_script, whole, tmp_path, change):
    first = run_script(PARALLEL, *FLAGS, "--epochs", 1, layerwise_cnn=small())
    text = first.log.read_text()
    changed = {"edited": text.replace("epoch 1", "epoch 9"), "shortened": text[:-20], "gone": None}[change]
    first.log.unlink() if changed is None else first.log.write_text(changed)
    left = run_script(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())
    assert left.log == first.log
    assert_same(left, whole[PARALLEL])
    kept = first.log.with_name(f"{first.log.stem}.edited.log")
    assert (kept.read_text() if kept.exists() else None) == changed
    told = "the log was gone" if changed is None else f"the log had been changed: that one is kept as {kept.name}"
    assert f"# {told}" in left.log.read_text()
    assert len(read_log(left.log)) == 12


class FullDisk:
    """open() on a disk with room for ``room`` more bytes in files of that suffix: the write that does not fit is done
    in part and fails.
    """

    def __init__(self, room, suffix):
        self.room, self.suffix = room, suffix

    def __call__(self, path, mode="r", **options):
        file = open(path, mode, **options)  # noqa: SIM115
        if str(path).endswith(self.suffix) and mode != "rb":
            file = mock.MagicMock(wraps=file)
            file.__enter__.return_value = file
            file.__exit__.side_effect = lambda *error: file.close()
            file.write.side_effect = lambda data: self.write(file._mock_wraps, data)
        return file

    def write(self, file, data):
        taken = min(len(data), self.room)
        self.room -= taken
        file.write(bytes(data)[:taken])
        if taken < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken


@pytest.mark.parametrize("suffix", [".log", ".pt.tmp"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_log(run_script, whole, monkeypatch, capsys, tmp_path, suffix):
    size = whole[PARALLEL].log.stat().st_size if suffix == ".log" else 2 * whole[PARALLEL].checkpoint.stat().st_size
    monkeypatch.setattr(checkpoints, "open", FullDisk(size - 150, suffix), raising=False)
    with pytest.raises(SystemExit) as stop:
        run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2 and message.count("\n") == 1 and "cannot be written (No space left on device)" in message
    )
    (log,) = (tmp_path / "logs").glob("*.log")
    assert log.read_text().endswith("\n")
    assert {path.suffix for path in (tmp_path / "logs").iterdir()} == {".log", ".pt"}


def test_after_a_full_disk_the_run_resumes(run_script, whole, monkeypatch, capsys):
    room = 2 * whole[PARALLEL].checkpoint.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "open", FullDisk(room, ".pt.tmp"), raising=False)
        with pytest.raises(SystemExit):
            run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    assert_same(run_script(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small()), whole[PARALLEL])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    run_script, fails, monkeypatch, capsys, tmp_path
):
    def build(**settings):
        net = small()(**settings)
        calls = []

        def poison(module, inputs, output):
            if module.training:
                calls.append(1)
                if len(calls) == 2 + 2:  # epoch 2, batch 2
                    return output * float("nan")

        net[2].auxiliary.register_forward_hook(poison)
        return net

    with pytest.raises(SystemExit) as stop:
        run_script(PARALLEL, *FLAGS, layerwise_cnn=build)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert "the loss of module 3 became nan in epoch 2, batch 2: the last good checkpoint stays in " in message
    (checkpoint,) = (tmp_path / "logs").glob("*.pt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    assert read_log(checkpoint.with_suffix(".log")).epoch.max() == 1


def test_step_with_the_scale_off_is_the_plain_step():
    """Half precision off: run.step is zero_grad, backward, step, to the bit."""
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


def test_device_names():
    assert flags.pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="unknown"):
        flags.pick_device("gpu")
