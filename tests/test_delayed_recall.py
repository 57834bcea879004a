"""The example of the dni library: what its curves count, and that the committed ones say what the pages claim."""

import io
import sys

import pandas as pd
import pytest
from running import ROOT, load_script

from decoupled.training.flags import start

script = load_script("dni/delayed_recall.py")


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["delayed_recall.py", *map(str, flags)])
    start(script.main)


def read(text):
    return pd.read_csv(io.StringIO(text), comment="#")


@pytest.mark.parametrize("method", script.METHODS)
def test_every_method_learns_to_recall_a_bit_of_the_step_before(monkeypatch, capsys, method):
    """Were bits and recalls not aligned, there would be nothing to learn. The curve ends near its budget."""
    run(monkeypatch, "--delay", 1, "--gflop", 1, "--lr", 0.01, "--seeds", 5, "--methods", method)
    curve = read(capsys.readouterr().out)
    assert len(curve) == script.POINTS and set(curve["seed"]) == {5} and set(curve["method"]) == {method}
    assert curve["gflop"].iloc[-1] == pytest.approx(1, rel=0.5)
    assert curve["recalled"].iloc[0] < 99 < curve["recalled"].iloc[-1]


def test_the_output_is_a_file_on_request(monkeypatch, capsys, tmp_path):
    few_updates = ("--batch-size", 256, "--gflop", 1, "--methods", "truncation", "DNI")
    run(monkeypatch, *few_updates, "--lr", 0.1, 0.2, "--seeds", 7, "--output", tmp_path / "curves.csv")
    assert capsys.readouterr().out == ""
    frame = read((tmp_path / "curves.csv").read_text())
    assert list(frame.columns) == ["method", "lr", "seed", "gflop", "recalled"]
    runs = [(method, lr, 7) for method in ("truncation", "DNI") for lr in (0.1, 0.2)]
    assert list(frame.groupby(["method", "lr", "seed"], sort=False).groups) == runs
    assert len(frame) == 4 * script.POINTS and frame.recalled.between(0, 100).all()


def test_a_learning_rate_of_0_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--lr", 0)
    assert stop.value.code == 2
    assert "--lr" in capsys.readouterr().err


def test_with_its_context_the_synthetic_gradient_beats_truncation_in_the_committed_curves():
    """At each method's best rate, every seed of it above every seed of the others with segments as short."""
    curves = pd.read_csv(ROOT / "results" / "dni" / "delayed_recall.csv", comment="#")
    last = curves.groupby(["method", "lr", "seed"]).tail(1)
    assert len(last) == len(script.METHODS) * 3 * 3
    budgets = last.groupby("method")["gflop"].max()
    assert budgets.max() / budgets.min() < 1.01
    of_rate = {key: rows["recalled"] for key, rows in last.groupby(["method", "lr"])}
    best = {}
    for (method, _), recalled in of_rate.items():
        if method not in best or recalled.mean() > best[method].mean():
            best[method] = recalled
    assert best["cDNI"].min() > 99
    assert max(best["truncation"].max(), best["DNI"].max()) < 80
