"""The benchmarks of throughput and of input, run once on few images: what they count, not the clock."""

import re
import sys

import pytest
import torch
from PIL import Image
from running import load_script

script = load_script("benchmarks/throughput.py")


def test_learning_curves():
    setting = script.random_setting(torch.device("cpu"), half=False, batch_size=4, sizes=script.SMOKE)
    _, frame, conclusion = script.benchmark("learning_curves", setting, script.SMOKE, repeats=1)
    steps = [name for name in frame.index if "step" in name]
    stages = [f"sequential step, stage {n}" for n in (1, 2, 3, 4)]
    assert steps == ["DGL step", *stages, "sequential step, mean", "back-propagation step"]
    assert (frame.loc[steps] > 0).all(axis=None) and frame["% of DGL"]["DGL step"] == 100
    mean = frame.loc["sequential step, mean"]
    assert mean["GFLOP/image"] == pytest.approx(frame["GFLOP/image"][stages].mean())
    assert mean["peak MiB"] == frame["peak MiB"][stages].max()
    assert len(conclusion) == 3


def dni_flops():
    """By hand: a convolution's forward pass, its weights' gradient and its input's are as many FLOPs each; every
    synthesizer runs once.
    """
    conv = {size: 2 * 25 * 128 * 128 * size**2 / 1e9 for size in (10, 3, 1)}  # 128 to 128 channels, one forward pass
    first = 2 * 25 * 3 * 128 * 32**2 / 1e9
    head = 2 * 128 * 10 / 1e9
    context = 2 * 10 * 128 / 1e9
    backprop = 2 * first + 3 * (conv[10] + conv[3]) + 3 * head
    dni = backprop + (2 + 3 + 3) * sum(conv.values())  # the input of a synthesizer's first layer is detached
    dgl = 2 * first + 2 * (conv[10] + conv[3]) + 9 * (conv[10] + conv[3]) + 9 * head
    return {
        "back-propagation step": backprop,
        "DGL step": dgl,
        "DNI step": dni,
        "cDNI step": dni + 3 * 2 * context,
    }


def test_dni_steps_cost_their_parts(monkeypatch, capsys):
    """By the command, in bf16."""
    flags = ("--smoke", "--network", "dni", "--half", "--batch-size", "4", "--repeats", "1", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags])
    script.main()
    output = capsys.readouterr().out
    assert output.index("# commit: ") < output.index("# dni, batch 4, 1 rounds; ") and "learning_curves" not in output
    for name, flops in dni_flops().items():
        assert re.search(rf"^{name} .* {flops:.3f} ", output, re.MULTILINE)
    total, step = re.search(r"= ([\d.]+) GFLOP/image; its step counts ([\d.]+)\.\n", output).groups()
    assert total == step and float(step) == pytest.approx(dni_flops()["DGL step"], abs=1e-3)
    assert "back-propagation 0, DGL 2, DNI 3, cDNI 3." in output


def test_traffic_by_hand():
    """A layer 4 → 3 of 2 inputs, its ReLU in place, its weights' gradient: FLOPs and bytes of each operation."""
    layer = torch.nn.Linear(4, 3)
    inputs = torch.ones(2, 4)
    gradient = torch.ones(2, 3)
    with script.Traffic() as traffic:
        torch.relu_(layer(inputs)).view(6)
    assert traffic.operations == [(2 * 2 * 4 * 3, 4 * (3 + 8 + 12 + 6)), (0, 4 * (6 + 6))]
    with script.Traffic() as traffic:
        torch.nn.functional.linear(inputs, layer.weight).backward(gradient)
    flops, sizes = zip(*traffic.operations, strict=True)
    assert sum(flops) == 2 * (2 * 2 * 4 * 3) and sizes == (4 * (8 + 12 + 6), 4 * (6 + 8 + 12))


def test_input_benchmark(monkeypatch, capsys, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (40, 36), (index, 128, 0)).save(tmp_path / split / name / f"{index}.png")
    script = load_script("benchmarks/imagenet_input.py")
    words = "--arch resnet50 --channels 2 --image-size 32 -b 8 -j 0 1 --device cpu --samples 16 --steps 1"
    monkeypatch.setattr(sys, "argv", ["imagenet_input.py", str(tmp_path), *words.split()])
    script.main()
    numbers = re.findall(r"^ *([\d,.]+) images/s", capsys.readouterr().out, re.MULTILINE)
    assert len(numbers) == 4  # one core, no worker, one worker, the step
    assert all(float(number.replace(",", "")) > 0 for number in numbers)
