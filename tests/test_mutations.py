"""Whatever happens to checkpoints and logs between a stop and what reads them: what is damaged is refused in one line,
and what is not is what was saved.
"""

import os
import random
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from running import PARALLEL, small

from decoupled import InputError, logs
from decoupled.analysis import plots
from decoupled.logs import read_log
from decoupled.training import run as runs
from decoupled.training.checkpoint import read_checkpoint

TOY = ("--dataset", "digits", "--train-samples", "64", "--batch-size", "32", "--device", "cpu", "--epochs", "1")
NAMES = {"layerwise_cnn": small(channels=1, depth=2, downsample=(1,))}
FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def leaves(tree, path=()):
    """[(path, value), …] of everything in nested dicts, lists and tuples, themselves included."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [(path, tree), *(leaf for key, branch in branches for leaf in leaves(branch, (*path, key)))]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def finished(run_script):
    return run_script(PARALLEL, *TOY, **NAMES).checkpoint


@FEW
@given(data=st.data())
def test_changed_bytes_of_a_checkpoint_are_found_or_harmless(finished, data):
    whole, saved = finished.read_bytes(), read_checkpoint(finished)
    place = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.sampled_from([0, 1, 4, 512, 4096]))
    new = data.draw(st.one_of(st.binary(max_size=16), st.just(bytes(length))))
    changed = finished.with_name("changed.pt")
    changed.write_bytes(whole[:place] + new + whole[place + length :])
    try:
        assert same(read_checkpoint(changed), saved)
    except InputError as error:
        assert "\n" not in str(error) and str(changed) in str(error)


VALUES = [None, -1, 0, 2, 10**18, float("nan"), "x", [], {}, [0], torch.zeros(0), torch.zeros(3, 3), True, b"x"]


def changed_at(tree, path, change):
    """``tree`` with ``change`` applied to the container of what is at ``path``, and its key there."""
    key, *rest = path
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        tree[key] = changed_at(tree[key], rest, change)
    else:
        change(tree, key)
    return tree


@FEW
@given(data=st.data())
def test_a_whole_checkpoint_of_other_contents_ends_in_one_line_or_resumes(run_script, finished, capsys, data):
    """Its checksums are right: something else has written it."""
    saved = torch.load(finished, weights_only=True)
    path = data.draw(st.sampled_from([path for path, _ in leaves(saved) if path]))
    value = data.draw(st.sampled_from(["missing", *VALUES]))
    whole, text = finished.read_bytes(), finished.with_suffix(".log").read_bytes()
    removed = changed_at(
        saved, path, lambda tree, key: tree.pop(key) if value == "missing" else tree.__setitem__(key, value)
    )
    try:
        torch.save(removed, finished)
        run_script(PARALLEL, *TOY, "--resume", **NAMES)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.count("\n") == 1 and str(finished) in message, message
    finally:
        for other in finished.parent.glob("*.edited*.log"):
            other.unlink()
        finished.write_bytes(whole)
        finished.with_suffix(".log").write_bytes(text)


def test_arguments_of_any_kind_are_refused_in_a_line(fails, finished):
    saved = torch.load(finished, weights_only=True)
    for name in ("epochs", "batch_size"):
        for value in VALUES:
            if not (name == "epochs" and type(value) is int and value < 1):  # of a shorter run, which goes on
                torch.save(saved | {"arguments": saved["arguments"] | {name: value}}, finished)
                assert f"is of a run with --{name.replace('_', '-')}" in fails(PARALLEL, *TOY, "--resume", **NAMES)


@pytest.mark.parametrize("field", ["stage", "epoch", "batch", "seconds"])
def test_a_place_that_the_run_does_not_have_is_refused(fails, finished, field):
    saved = torch.load(finished, weights_only=True)
    for value in (-1, 99) if field in ("stage", "epoch") else (-1,):
        torch.save(saved | {field: type(saved[field])(value)}, finished)
        assert "says it was left in" in fails(PARALLEL, *TOY, "--resume", **NAMES)


@pytest.mark.parametrize("error", [5, 13, 24])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished, monkeypatch, error):
    def fail(*args, **options):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("zipfile.ZipFile.__init__", fail)
    with pytest.raises(InputError, match=rf"cannot be read \({os.strerror(error)}\)"):
        read_checkpoint(finished)


def test_a_run_that_cannot_save_at_first_leaves_nothing(run_script, monkeypatch, tmp_path):
    def full(value, file):
        file.write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit):
        run_script(PARALLEL, *TOY, **NAMES)
    assert not [*(tmp_path / "logs").iterdir()]


@pytest.mark.parametrize("change", ["gone", "longer", "shorter", "a folder"])
def test_a_log_that_is_changed_while_the_run_goes_is_written_anew(run_script, tmp_path, change):
    whole = run_script(PARALLEL, *TOY, folder=tmp_path / "whole", **NAMES)

    class Changing(runs.Run):
        def checkpoint_or_stop(self):
            super().checkpoint_or_stop()
            log = self.checkpoint.path(".log")
            if self.within and self.batch == 1 and not [*log.parent.glob("*.edited.log")]:
                if change in ("gone", "a folder"):
                    log.unlink()
                else:
                    os.truncate(log, log.stat().st_size + (5 if change == "longer" else -5))
                if change == "a folder":
                    log.mkdir()

    left = run_script(PARALLEL, *TOY, **NAMES, Run=Changing)
    (log,) = (path for path in left.folder.glob("*.log") if ".edited" not in path.name)
    assert re.findall("^n: .*", log.read_text(), re.MULTILINE) == whole.lines
    assert log.read_text().startswith("Namespace(") and "written anew from here up" in log.read_text()


# Logs

LINES = [
    logs.head_line(1, 1, 0.5, 10, 20),
    logs.lower_head_line(2, 1, 0.5, 10, 20),
    logs.async_line(0, 1, 1, 10, 20, 30),
    logs.imagenet_line(1, 1, (1, 2), (3, 4), (5, 6)),
    logs.imagenet_backprop_line(0.1, 1, (1, 2), (3, 4)),
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace(" \n", "\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "  \t\n"),
        lambda text: text.replace("\n", "\n\n"),
    ],
    ids=["BOM", "stripped", "CRLF", "blanks", "empty lines"],
)
def test_what_editors_do_to_a_log_changes_no_number(tmp_path, line, change):
    path = tmp_path / "run.log"
    path.write_text(text := f"Namespace(epochs=1)\n# commit: x\n{line}\n# epoch 1 took 2.50 s\n")
    expected = read_log(path)
    path.write_bytes(change(text).encode())
    frame = read_log(path)
    assert frame.equals(expected) and len(frame) == 1
    assert frame.attrs == expected.attrs | {"damaged": []}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("number", ["nan", "inf", "-1", "1.5", "9" * 30, "x", ""])
def test_a_head_or_epoch_that_is_no_number_is_a_damaged_line(tmp_path, line, number):
    bad = re.sub(r"epoch \d+", f"epoch {number}", line)
    (tmp_path / "run.log").write_text(f"{bad}\n{line}\n")
    frame = read_log(tmp_path / "run.log")
    assert len(frame) == 1 and frame.attrs["damaged"] == [1] and frame["epoch"].tolist() == [1]


def test_two_logs_in_one_file(tmp_path):
    path, text = tmp_path / "run.log", f"Namespace(epochs=1)\n{LINES[0]}\n"
    path.write_text(text + text.replace("epoch 1", "epoch 2"))
    with pytest.raises(InputError, match="holds two logs, the second from line 3 on: split it"):
        read_log(path)
    path.write_text(f"{LINES[0]}\n{LINES[0]}\n")
    with pytest.raises(InputError, match="has n 1, epoch 1 a second time in line 2: two logs"):
        read_log(path)


def test_back_propagation_is_head_1(tmp_path):
    (tmp_path / "run.log").write_text(f"{LINES[-1]}\n# n: 1, epoch 1, loss: 2.50000\n")
    frame = read_log(tmp_path / "run.log")
    assert frame["n"].tolist() == [1] and frame["loss"].tolist() == [2.5] and logs.final(frame).index.tolist() == [1]


TEXT = (
    "Namespace(batch_size=128, epochs=50, name='a, b', no_cuda=False, dataset='digits', down=(1, 3))\n"
    "# command: python x.py\n# device: cpu\nNet(\n  (0): Conv2d(3, 4)\n)\n"
    + "".join(re.sub("epoch 1", f"epoch {epoch}", line) + "\n" for epoch in (1, 2, 30) for line in LINES[:4])
    + "# n: 1, epoch 2, loss: 2.00000\n# module 2, epoch 1 took 2.50 s\n# epoch 1 took 2.50 s\n"
)


def mutated(text, generator):
    for _ in range(generator.randint(1, 4)):
        place, length = generator.randrange(len(text) + 1), generator.choice([0, 0, 1, 1, 2, 30, 300])
        start = generator.randrange(len(text) + 1)
        pieces = [
            "",
            "nan",
            "-",
            "9" * 25,
            "e",
            ".",
            ".5.5",
            "\n",
            "\0",
            "(" * 300,
            "**x",
            "[]:",
            "\ud800",
            "é",
            "Name",
        ]
        new = generator.choice([*pieces, text[start : start + 80], TEXT[:120]])
        text = text[:place] + new + text[place + length :]
    return text


def test_no_mutated_log_ends_in_a_traceback(tmp_path):
    """And what is read of it are rows of numbers, each head and epoch once."""
    path, generator, read = tmp_path / "run.log", random.Random(0), 0
    for _ in range(int(os.environ.get("MUTATED_LOGS", 1500))):
        path.write_bytes(mutated(TEXT, generator).encode(errors="surrogatepass"))
        try:
            frame = read_log(path)
        except InputError as error:
            assert str(path) in str(error)
            continue
        read += 1
        assert frame[["n", "epoch"]].dtypes.tolist() == [int, int]
        assert not frame.duplicated(["n", "epoch"]).any()
        logs.final(frame)
        if read % 300 == 0:
            plots.learning_curves({"a": [frame]}, title="$x")
            pyplot.close("all")
    assert read > 100


@pytest.mark.parametrize("line", [*LINES, LINES[2].replace("ense 30", "ense nan")])
def test_every_experiments_log_is_drawn(tmp_path, monkeypatch, capsys, line):
    (tmp_path / "run.log").write_text(f"{line}\nn: 1, epoch x\n")
    words = ["plots.py", str(tmp_path / "run.log"), "--output", str(tmp_path / "curves.png")]
    monkeypatch.setattr("sys.argv", words)
    plots.main()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "left out" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words[:-1], str(tmp_path / "curves.xyz")])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    assert stop.value.code == 2 and "curves.xyz must end in one of" in capsys.readouterr().err
    pyplot.close("all")


def test_the_newest_log_is_that_of_the_run_that_began_last(tmp_path):
    names = ["a-20260102-000000-10.log", "a-20260102-000000-2.log", "z-20260101-000000.log", "old.log"]
    for age, name in enumerate([*names, "a-20260103-000000.edited.log", "a-20260103-000000.edited-1.log"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    for name in names:
        assert plots.newest_log(tmp_path).name == name
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="there is no log in"):
        plots.newest_log(tmp_path)
    shutil.rmtree(tmp_path)
