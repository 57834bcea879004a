"""Figures: they show the log's numbers under the right labels. And the package's command line."""

import os
import subprocess
import sys

import pandas
import pytest
from matplotlib.figure import Figure
from running import ROOT

from decoupled import __main__
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
    axes = Figure().subplots()
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
    axes = Figure().subplots()
    (line,) = plots.curves(axes, frames, "test_top1", heads=[1])
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [41, 42])
    (band,) = axes.collections
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == (21, 72)
    assert all(tick == int(tick) for tick in axes.get_xticks())
    bars = plots.points(axes, pandas.Series([1.0, 3.0, 8.0, 5.0], index=[2, 2, 2, 4]))
    assert list(bars[0].get_ydata()) == [4, 5]
    assert [segment[:, 1].tolist() for segment in bars[2][0].get_segments()] == [[1, 8], [5, 5]]


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


def test_seeds_are_compared_where_all_have_results(tmp_path):
    """Of a run that was cut off, no later epoch and no further head counts; single runs have theirs."""
    whole, cut = (write(tmp_path / f"a-seed{seed}.log", seed, 20 * seed) for seed in (1, 2))
    lines = cut.read_text().splitlines(keepends=True)
    first_epoch = [line for line in lines if not line.startswith("n: ") or line.startswith("n: 1, epoch 1,")]
    cut.write_text("".join(first_epoch))
    frames = [read_log(log) for log in (whole, cut)]
    (line,) = plots.curves(Figure().subplots(), frames, "test_top1")
    mean = sum(frame.loc[(frame.n == 1) & (frame.epoch == 1), "test_top1"].item() for frame in frames) / 2
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1], [mean])
    (line,) = plots.curves(Figure().subplots(), frames, "test_top1", heads="last")
    assert line.get_label() == "head 1"  # the last that all have
    (score,) = plots.final_scores(frames)
    assert score.startswith(f"head 1 {mean:.2f} % (epoch 1,")
    assert plots.final_scores(frames[:1]) == ["head 1 22.00 %", "head 2 32.00 %"]


@pytest.fixture
def plot(monkeypatch, capsys):
    """plot(*words): what python -m decoupled plot prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, words)])
        capsys.readouterr()
        start(plots.main)
        return capsys.readouterr().out

    return run


def test_command_overlays_logs_in_the_format_of_the_suffix(tmp_path, plot, capsys):
    logs = [write(tmp_path / f"{lr}-{seed}.log", seed, 20, lr=lr) for lr in (0.1, 0.2) for seed in (1, 2)]
    one_head = tmp_path / "async.log"
    one_head.write_text("n: 5, epoch 1,epochtrue 1, train 60.0, test 50.0,ense 51.0 \n")
    printed = plot(*logs, "--output", tmp_path / "a.svg")
    assert "lr 0.1 (2 seeds), test top-1 at the end: head 1 22.00 %, head 2 32.00 %" in printed
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("lr 0.1 (2 seeds)", "lr 0.2 (2 seeds)", "mean and range over seeds", "loss"))
    plot(*logs, one_head, "--heads", "1,2", "--output", tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert all(word in text for word in (">head 1<", ">head 2<", "train top-1 (%)")) and "training loss" not in text
    plot(logs[0], "--output", tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    for words in (("--heads", "7"), ("--heads", "x"), ("--authors", "ddg"), ("--output", "a.xyz")):
        with pytest.raises(SystemExit) as stop:
            plot(logs[0], *words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words[1] in error and error.count("\n") == 1


def test_a_table_of_all_logs_of_a_folder(tmp_path, plot, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lr, seed, top1 in ((0.1, 1, 20), (0.1, 2, 30), (0.2, 1, 40)):
        write(tmp_path / f"run-{lr}-2026010{seed}-000000.log", seed, top1, lr=lr)
    (tmp_path / "run-0.1-20260101-000000.edited.log").write_text("changed")
    assert plot(tmp_path, "--all", "--table").splitlines() == [
        "| run | head 1 | head 2 | seeds |",
        "| --- | --- | --- | --- |",
        "| lr 0.1 | 27.00 (22.00–32.00) | 37.00 (32.00–42.00) | 2 |",
        "| lr 0.2 | 42.00 | 52.00 | 1 |",
    ]
    assert not [*tmp_path.glob("*.png")]
    printed = plot(tmp_path, "--table")
    assert "run-0.1-20260102-000000.log" in printed.splitlines()[0] and "--all" in printed.splitlines()[0]


def test_the_authors_curves_are_drawn_beneath(tmp_path):
    frame = read_log(write(tmp_path / "a.log", 1, 20))
    figure = plots.learning_curves({"a": [frame]}, beneath=plots.authors_curves(["parallel", "sequential"]))
    grey = [line for line in figure.axes[1].lines if line.get_color() == "0.75"]
    assert len(grey) == 4 and grey[3].get_label() == "sequential, authors"  # of heads 1 and 2, as our log has
    assert (grey[0].get_ydata()[[0, -1]] == [39.36, 78.35]).all() and grey[0].get_linestyle() != grey[3].get_linestyle()


# python -m decoupled


def test_a_folders_newest_log_is_drawn_whatever_backend_a_notebook_has_set(log):
    (log.parent / "run-20260101-000000.log").write_text(log.read_text().replace("test top1:43", "test top1:77"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "nonsense"}
    command = [sys.executable, "-m", "decoupled", "plot", str(log.parent)]
    done = subprocess.run(command, cwd=log.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "" and "head 2 77.00 %" in done.stdout
    assert (log.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def decoupled(monkeypatch, capsys):
    """decoupled(*words): (exit code, stdout, stderr) of python -m decoupled."""
    monkeypatch.setenv("MPLBACKEND", "agg")  # which the command sets

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_the_command_line_lists_its_commands_and_says_whose_error_it_is(decoupled, tmp_path):
    code, printed, _ = decoupled("--help")
    assert code == 0 and all(f"\n  {command} " in printed for command in ("plot", "predict", "export"))
    assert decoupled()[0] == 2 and decoupled("draw")[0] == 2
    code, printed, _ = decoupled("export", "--help")
    assert code == 0 and printed.startswith("usage: python -m decoupled export ")
    code, _, error = decoupled("export", tmp_path / "none.log", "--csv", tmp_path / "a.csv")
    assert code == 2 and error.startswith("python -m decoupled export: error: ") and error.count("\n") == 1
