"""What auxiliary networks cost: the tables of the benchmark against counts by hand."""

import sys

import pandas as pd
import pytest
import torch
from running import load_script

from decoupled.training.flags import start

SCRIPT = "benchmarks/auxiliary_costs.py"
tables = load_script(SCRIPT)


def conv(below, channels, side):
    """Multiply-adds of a 3×3 convolution."""
    return 9 * below * channels * side**2


def mlp(channels, hidden=3):
    """Multiply-adds of an MLP of width 4C to 10 classes."""
    return hidden * (4 * channels) ** 2 + 4 * channels * 10


@pytest.fixture(scope="module")
def published():
    return tables.auxiliary_costs(channels=128, depth=6, batch_size=4)


def test_auxiliary_costs_by_hand(published):
    frame = published
    modules = [(3, 128, 32), (128, 256, 16), (256, 256, 16), (256, 512, 8), (512, 512, 8), (512, 512, 8)]
    assert list(frame.index) == [(t, n) for t in ("mlp", "mlp-sr", "cnn") for n in range(1, 6)] + [("head", 6)]
    auxiliaries = {
        "mlp": lambda channels, side: mlp(channels),
        "mlp-sr": lambda channels, side: 3 * channels**2 * (side // 4) ** 2 + mlp(channels),
        "cnn": lambda channels, side: 2 * conv(channels, channels, side) + 40 * channels,
        "head": lambda channels, side: mlp(channels, hidden=2),
    }
    hidden, affine = (lambda c: (4 * c) ** 2 + 3 * 4 * c), (lambda c: 2 * c)
    parameters = {
        "mlp": lambda c: 3 * hidden(c) + 40 * c + 10,
        "mlp-sr": lambda c: 3 * (c**2 + affine(c)) + 3 * hidden(c) + 40 * c + 10,
        "cnn": lambda c: 2 * (9 * c**2 + affine(c)) + affine(c) + 40 * c + 10,
        "head": lambda c: 2 * hidden(c) + 40 * c + 10,
    }
    for (type_aux, n), row in frame.iterrows():
        below, channels, side = modules[n - 1]
        assert row["module_mflop"] * 1e6 == pytest.approx(2 * conv(below, channels, side))
        assert row["auxiliary_mflop"] * 1e6 == pytest.approx(2 * auxiliaries[type_aux](channels, side))
        assert row["flops"] == pytest.approx(100 * auxiliaries[type_aux](channels, side) / conv(below, channels, side))
        assert row["parameters"] == parameters[type_aux](channels)
        assert row["parameters_share"] == pytest.approx(
            100 * parameters[type_aux](channels) / (9 * below * channels + 3 * channels)
        )
    assert (frame["memory"] > 0).all()


def test_definitions_beside_the_papers_figures(published):
    frame = tables.definitions(published)
    assert frame.iloc[0].to_dict() == {"mlp": 0.7, "mlp-sr": 4.0, "cnn": 200.0}
    module = conv(256, 256, 16)  # module 3, the first of the largest
    sr = 3 * 256**2 * 4**2
    assert frame.loc["module 3, the largest"].tolist() == pytest.approx(
        [100 * value / module for value in (mlp(256), sr + mlp(256), 2 * module + 10_240)]
    )
    shared, shallow = (
        frame.loc[f"module 3, {what}"] for what in ("of module and auxiliary together", "with one hidden layer")
    )
    assert shared["mlp-sr"] == pytest.approx(100 * (sr + mlp(256)) / (module + sr + mlp(256)))
    assert shallow["mlp"] == pytest.approx(100 * mlp(256, hidden=1) / module) and pd.isna(shallow["cnn"])
    # What the script's text says: each of the paper's figures is one of these, rounded as there; no definition gives
    # all three
    assert (round(shallow["mlp"], 1), round(shared["mlp-sr"], 1), round(frame["cnn"].iloc[1])) == (0.7, 4.0, 200)
    assert not any(row.round(1).tolist() == [0.7, 4.0, 200.0] for _, row in frame.iloc[1:].iterrows())
    # At modules 2 and 4, where channels double, the module costs half as much as where they stay, CNN-aux as much
    assert frame.loc["modules 1 to 5, sum", "cnn"] == pytest.approx(
        100 * 10 * module / (3 * module + conv(3, 128, 32)), rel=1e-3
    )


def test_depth_of_decoupling():
    assert tables.block_sizes(6) == {6: 1, 3: 2, 2: 3, 1: 6}
    frame = tables.decoupling_costs(channels=16, depth=4, batch_size=64)
    assert list(frame.index) == [4, 2, 1] and frame["block_size"].tolist() == [1, 2, 4]
    # One module: a convolution's gradients take two products, but the first's only one; so do the head's
    convs = [conv(*shape) for shape in ((3, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8))]
    assert frame.loc[1, "training_gflop"] * 1e9 == pytest.approx(
        2 * (3 * sum(convs) - convs[0] + 3 * mlp(64, hidden=2))
    )
    assert frame[
        "training_gflop"
    ].is_monotonic_increasing  # gradients of the layers' inputs come in as the modules grow
    assert (
        frame.loc[1, "memory"] > frame.loc[4, "memory"]
    )  # few channels and many images: activations outweigh the auxiliaries' parameters
    assert frame["parameters"].is_monotonic_decreasing


def test_added_time():
    times = pd.Series({("", 1): 2.0, ("", 2): 4.0, ("cnn", 1): 3.0, ("head", 2): 5.0})
    assert tables.added_time(times).to_dict() == {("cnn", 1): 50, ("head", 2): 25}


def test_steps_are_timed_after_a_warm_up():
    calls = []
    times = tables.measure_seconds(
        {("", 1): lambda: calls.append("alone"), ("mlp", 1): lambda: calls.append("both")}, 3, torch.device("cpu")
    )
    assert calls == ["alone", "both"] * 4
    assert (times[""][1] >= 0) and list(times.index) == [("", 1), ("mlp", 1)]


def test_cost_command(monkeypatch, capsys, tmp_path):
    flags = [
        "--channels",
        4,
        "--depth",
        2,
        "--batch-size",
        4,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--half",
        "--output",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags)])
    start(tables.main)
    printed = capsys.readouterr().out
    assert "# device: cpu" in printed and "Table 1" in printed and "K modules" in printed
    auxiliaries, decoupling = (
        tables.read(tmp_path / "out" / f"{name}.csv") for name in ("auxiliary_costs", "decoupling_costs")
    )
    assert list(auxiliaries.index) == [("mlp", 1), ("mlp-sr", 1), ("cnn", 1), ("head", 2)]
    memory = tables.network_costs("cnn", 4, channels=4, depth=2)["memory"].unstack("part").loc[1]
    assert auxiliaries["memory"]["cnn", 1] == pytest.approx(100 * (memory["module"] - memory["body"]) / memory["body"])
    assert auxiliaries["time"].notna().all()
    assert decoupling.index.tolist() == [2, 1] and (decoupling["time"] > 0).all()
    assert any(line.startswith("device: cpu") for line in decoupling.attrs["comments"])
    assert tables.read(tmp_path / "none.csv") is None


def test_cost_command_without_a_writable_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        start(tables.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
