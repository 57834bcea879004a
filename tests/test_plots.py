"""Figures: they show the log's numbers under the right labels."""

import sys

import pytest
from matplotlib import pyplot

from decoupled import InputError, plots
from decoupled.flags import start
from decoupled.logs import head_line, read_log


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
    (line,) = plots.reference_curves(axes, read_log(log), "loss", heads=[1], linestyle="--")
    assert (line.get_label(), line.get_ydata()[0], line.get_color()) == ("authors' log", 1, "0.75")
    assert line.get_zorder() < lines[0].get_zorder()
    pyplot.close("all")


def test_command_draws_the_newest_log_of_a_folder(log, monkeypatch, capsys):
    output = log.parent / "curves.png"
    monkeypatch.setattr(sys, "argv", ["plots.py", str(log.parent), "--output", str(output)])
    start(plots.main)
    assert output.read_bytes().startswith(b"\x89PNG") and f"learning curves: {output}" in capsys.readouterr().out
    assert plots.newest_log(log.parent) == log
    pyplot.close("all")


def test_folder_without_a_log(tmp_path):
    with pytest.raises(InputError, match="there is no log in"):
        plots.newest_log(tmp_path)
