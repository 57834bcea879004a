"""Figures: they show the log's numbers under the right labels."""

import sys

import pandas
import pytest
from matplotlib import pyplot

from decoupled import InputError
from decoupled.analysis import plots
from decoupled.logs import head_line, read_log
from decoupled.training.flags import start


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    rows = [head_line(n, epoch, 1 / (n * epoch), 10 * n, 20 * n + epoch) for epoch in (1, 2, 3) for n in (1, 2)]
    path.write_text("\n".join(["Namespace(dataset='digits')", *rows]) + "\n")
    return path


def test_curves_draw_the_heads_asked_for_under_their_own_labels(log):
    _, axes = pyplot.subplots()
    lines = plots.curves(axes, read_log(log), "test_top1")
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in lines] == [
        ("head 1", [1, 2, 3], [21, 22, 23]),
        ("head 2", [1, 2, 3], [41, 42, 43]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "test top-1 (%)")
    (line,) = plots.curves(axes, read_log(log), "loss", heads=[2], label="layer {n}", color="C5")
    assert (line.get_label(), list(line.get_ydata()), line.get_color()) == (
        "layer 2",
        [0.5, 0.25, pytest.approx(0.16667)],
        "C5",
    )
    (line,) = plots.curves(axes, read_log(log), "loss", heads="last")
    assert line.get_label() == "head 2"
    (line,) = plots.reference_curves(axes, read_log(log), "loss", heads=[1], linestyle="--")
    assert (line.get_label(), line.get_ydata()[0], line.get_color()) == ("authors' log", 1, "0.75")
    assert line.get_zorder() < lines[0].get_zorder()
    pyplot.close("all")


def write(path, seed, top1, command="learning_curves/cifar_dgl.py", epochs=2, **arguments):
    """A log at ``path``: two heads, head 1 with a test top-1 of ``top1``, head 2 of ten more."""
    arguments = {"seed": seed, "lr": 0.1, "name": f"a-seed{seed}", "log_dir": str(path), **arguments}
    rows = [head_line(n, e, 1.0, 50, top1 + 10 * n - 10 + e) for e in range(1, epochs + 1) for n in (1, 2)]
    namespace = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines = [f"Namespace({namespace})", f"# command: python {command}", "# train: 9 images of digits", *rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_seeds_are_drawn_as_mean_and_range_where_all_have_come(tmp_path):
    frames = [read_log(write(tmp_path / f"{s}.log", s, top1, epochs=s + 1)) for s, top1 in ((1, 20), (2, 30), (3, 70))]
    _, axes = pyplot.subplots()
    (line,) = plots.curves(axes, frames, "test_top1", heads=[1])
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [41, 42])
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (21, 72)
    assert all(tick == int(tick) for tick in axes.get_xticks())
    bars = plots.points(axes, pandas.Series([1.0, 3.0, 8.0, 5.0], index=[2, 2, 2, 4]))
    assert list(bars[0].get_ydata()) == [4, 5]
    assert [segment[:, 1].tolist() for segment in bars[2][0].get_segments()] == [[1, 8], [5, 5]]
    pyplot.close("all")


def test_logs_that_differ_in_the_seed_only_are_one_group(tmp_path):
    def grouped(*logs):
        return {label: len(seeds) for label, seeds in plots.group_seeds({log: read_log(log) for log in logs}).items()}

    first, second = (write(tmp_path / f"a-seed{seed}.log", seed, 20) for seed in (1, 2))
    assert grouped(first, second) == {"a (2 seeds)": 2}
    slow = [write(tmp_path / f"slow-seed{seed}.log", seed, 20, lr=0.01) for seed in (1, 2)]
    assert grouped(first, second, *slow) == {"lr 0.1 (2 seeds)": 2, "lr 0.01 (2 seeds)": 2}
    other = write(tmp_path / "other.log", 1, 20, command="learning_curves/cifar_sequential_greedy.py", splits=2)
    assert grouped(first, second, other) == {"cifar_dgl (2 seeds)": 2, "cifar_sequential_greedy": 1}
    again = write(tmp_path / "again-20260101-000000.log", 1, 20)  # not a second seed
    assert grouped(first, again) == {"a-seed1": 1, "again": 1}
    named = write(tmp_path / "b.log", 2, 20, name="b")
    assert grouped(first, named) == {"a-seed1": 1, "b": 1}


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, words)])
    start(plots.main)


def test_command_draws_the_newest_log_of_a_folder(log, monkeypatch, capsys):
    output = log.parent / "curves.png"
    command(monkeypatch, log.parent, "--output", output)
    assert output.read_bytes().startswith(b"\x89PNG") and f"learning curves: {output}" in capsys.readouterr().out
    assert plots.newest_log(log.parent) == log
    pyplot.close("all")


def test_command_overlays_logs_in_the_format_of_the_suffix(tmp_path, monkeypatch, capsys):
    logs = [write(tmp_path / f"{lr}-{seed}.log", seed, 20, lr=lr) for lr in (0.1, 0.2) for seed in (1, 2)]
    one_head = tmp_path / "async.log"
    one_head.write_text("n: 5, epoch 1,epochtrue 1, train 60.0, test 50.0,ense 51.0 \n")
    command(monkeypatch, *logs, "--output", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "lr 0.1 (2 seeds), test top-1 at the end: head 1 22.00 %, head 2 32.00 %" in capsys.readouterr().out
    assert all(word in text for word in ("lr 0.1 (2 seeds)", "lr 0.2 (2 seeds)", "mean and range over seeds", "loss"))
    command(monkeypatch, *logs, one_head, "--heads", "1,2", "--output", tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert all(word in text for word in (">head 1<", ">head 2<", "train top-1 (%)")) and "training loss" not in text
    command(monkeypatch, *logs, "--output", tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    for words, message in ((("--heads", "7"), "no log has head 7"), (("--heads", "x"), "'x' must be all, last, or")):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *logs, *words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    pyplot.close("all")


def test_command_draws_the_authors_curves_beneath(tmp_path, monkeypatch, capsys):
    log = write(tmp_path / "a.log", 1, 20)
    command(monkeypatch, log, "--authors", "parallel", "sequential", "--output", tmp_path / "a.svg")
    grey = [line for line in pyplot.gcf().axes[1].lines if line.get_color() == "0.75"]
    assert len(grey) == 4 and grey[3].get_label() == "sequential, authors"  # of heads 1 and 2, as our log has
    assert (grey[0].get_ydata()[[0, -1]] == [39.36, 78.35]).all() and grey[0].get_linestyle() != grey[3].get_linestyle()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, log, "--authors", "ddg", "--output", tmp_path / "b.svg")
    assert stop.value.code == 2 and "the authors have no log 'ddg': choose from" in capsys.readouterr().err
    pyplot.close("all")


def test_folder_without_a_log(tmp_path):
    with pytest.raises(InputError, match="there is no log in"):
        plots.newest_log(tmp_path)
