"""Whatever happens to checkpoints and logs between a stop and what reads them: what is damaged is refused in one line,
and what is not is what was saved.
"""

import errno
import os
import random
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from running import PARALLEL

from decoupled import InputError, logs
from decoupled.analysis import plots
from decoupled.logs import read_log
from decoupled.training.checkpoint import read_checkpoint

TOY = "--dataset digits --train-samples 64 --batch-size 32 --device cpu --epochs 1 --channels 1"
FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    return run_script(PARALLEL, *TOY.split()).checkpoint


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


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("zipfile.ZipFile.__init__", fail)
    with pytest.raises(InputError, match=os.strerror(errno.EIO)):
        read_checkpoint(finished)


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
    with pytest.raises(InputError, match="line 3"):
        read_log(path)
    path.write_text(f"{LINES[0]}\n{LINES[0]}\n")
    with pytest.raises(InputError, match="line 2"):
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
    assert "line 2" in capsys.readouterr().out
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
        assert [log.name for log in plots.choose_logs(tmp_path)] == [name]
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        plots.choose_logs(tmp_path)
    shutil.rmtree(tmp_path)
