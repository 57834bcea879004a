"""The benchmarks of throughput and of input, run once on few images: what they count, not the clock."""

import re
import sys

import pytest
import torch
from running import load_script

BENCHMARK = "benchmarks/throughput.py"


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """benchmark(*flags): runs it as small as it gets; returns the frame printed last and the output."""

    def run(*flags):
        script, frames = load_script(BENCHMARK), []
        for name, value in {
            "SECONDS": 1e-9,
            "SIDE": {"cpu": 64},
            "STREAM": {"cpu": 64},
            "TRAIN": 64,
            "TEST": 16,
            "TEST_BATCH": 8,
        }.items():
            monkeypatch.setattr(script, name, value)
        table = script.table
        monkeypatch.setattr(script, "table", lambda *args: frames.append(table(*args)) or frames[-1])
        monkeypatch.setattr(sys, "argv", [BENCHMARK, "--batch-size", "4", "--repeats", "1", "--device", "cpu", *flags])
        script.main()
        return frames[-1], capsys.readouterr().out

    return run


def test_learning_curves(benchmark):
    frame, output = benchmark("--network", "learning_curves")
    steps = [name for name in frame.index if "step" in name]
    sequential = [f"sequential step, {which}" for which in ("stage 1", "stage 2", "stage 3", "stage 4", "mean")]
    assert steps == ["DGL step", *sequential, "back-propagation step"]
    assert (frame.loc[steps] > 0).all(axis=None) and frame["% of DGL"]["DGL step"] == 100
    assert "# learning_curves, batch 4, 1 rounds" in output and "An epoch of DGL" in output and "# dni" not in output


@pytest.mark.parametrize("half", [(), ("--half",)])
def test_dni_steps_cost_their_parts(benchmark, half):
    """By hand: a convolution's forward pass, its weights' gradient and its input's are as many FLOPs each; every
    synthesizer runs once.
    """
    frame, output = benchmark("--network", "dni", *half)
    conv = {size: 2 * 25 * 128 * 128 * size**2 / 1e9 for size in (10, 3, 1)}  # 128 to 128 channels, one forward pass
    first, head, context = 2 * 25 * 3 * 128 * 32**2 / 1e9, 2 * 128 * 10 / 1e9, 2 * 10 * 128 / 1e9
    backprop = 2 * first + 3 * (conv[10] + conv[3]) + 3 * head
    dni = backprop + (2 + 3 + 3) * sum(conv.values())  # the input of a synthesizer's first layer is detached
    dgl = 2 * first + 2 * (conv[10] + conv[3]) + 9 * (conv[10] + conv[3]) + 9 * head
    expected = {"back-propagation step": backprop, "DGL step": dgl, "DNI step": dni, "cDNI step": dni + 3 * 2 * context}
    assert frame["GFLOP/image"].to_dict() == pytest.approx(expected)
    assert (frame > 0).all(axis=None) and frame["% of DGL"]["DGL step"] == 100
    total, step = map(float, re.search(r"= ([\d.]+) GFLOP/image; its step counts ([\d.]+)\.\n", output).groups())
    assert total == step == pytest.approx(dgl, abs=1e-3)
    assert "in a step: back-propagation 0, DGL 2, DNI 3, cDNI 3." in output


def test_traffic_by_hand():
    """A layer 4 → 3 of 2 inputs, its ReLU in place, its weights' gradient: FLOPs and bytes of each operation."""
    script, layer = load_script(BENCHMARK), torch.nn.Linear(4, 3)
    inputs, gradient = torch.ones(2, 4), torch.ones(2, 3)
    with script.Traffic() as traffic:
        torch.relu_(layer(inputs)).view(6)
    assert traffic.operations == [(2 * 2 * 4 * 3, 4 * (3 + 8 + 12 + 6)), (0, 4 * (6 + 6))]
    with script.Traffic() as traffic:
        torch.nn.functional.linear(inputs, layer.weight).backward(gradient)
    flops, sizes = zip(*traffic.operations, strict=True)
    assert sum(flops) == 2 * (2 * 2 * 4 * 3) and sizes == (4 * (8 + 12 + 6), 4 * (6 + 8 + 12))


def test_both_by_default(benchmark):
    _, output = benchmark()
    assert (
        output.index("# learning_curves, batch 4")
        < output.index("# dni, batch 4")
        < output.index("Runs of synthesizers")
    )


def test_input_benchmark(monkeypatch, capsys, tmp_path):
    from test_imagenet import write_folders

    write_folders(tmp_path)
    script = load_script("benchmarks/imagenet_input.py")
    flags = (
        "--arch",
        "resnet50",
        "--image-size",
        "32",
        "-b",
        "8",
        "-j",
        "0",
        "1",
        "--device",
        "cpu",
        "--samples",
        "16",
        "--steps",
        "1",
    )
    monkeypatch.setattr(sys, "argv", ["imagenet_input.py", str(tmp_path), *flags])
    monkeypatch.setattr(script, "greedy_resnet", lambda *args, real=script.greedy_resnet: real(*args, width=2))
    script.main()
    out = capsys.readouterr().out
    assert all(
        words in out
        for words in (
            "# commit: ",
            "decoded by one core",
            "with 1 worker",
            "the step consumes",
            "cores that keep it busy",
        )
    )
