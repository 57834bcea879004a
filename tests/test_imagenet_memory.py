"""The ImageNet benchmarks: what the memory benchmark counts is what a real step takes; the input benchmark reports."""

import functools
import sys

import pytest
import torch
from running import load_script
from torch._subclasses.fake_tensor import FakeTensorMode

from decoupled.costs import LiveStorages

memory = load_script("benchmarks/imagenet_memory.py")
METHODS = [(memory.dgl, 1), (memory.dgl, 2), (memory.dgl, 3), (memory.checkpointing, 2)]
CPU = torch.device("cpu")


@pytest.fixture
def narrow(monkeypatch):
    for name in ("greedy_resnet", "greedy_vgg"):
        monkeypatch.setattr(memory, name, functools.partial(getattr(memory, name), width=4))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("build", "splits"), METHODS)
@pytest.mark.parametrize("arch", ["resnet50", "vgg11"])
def test_counting_without_computing_is_exact(narrow, arch, build, splits, half):
    """The peak of each module's part in the second of two real steps, to the byte in fp32; kernels of bf16 make some
    tensors of their own.
    """
    with FakeTensorMode():
        method = build(arch, splits, 32, half, CPU)
        saved = memory.count_saved(method, 6, 32)
        counted = [memory.count(method, 6, 32) for _ in range(2)]
    assert counted[0] == counted[1]
    method = build(arch, splits, 32, half, CPU)
    images, labels = memory.batch(6, 32, CPU)
    fixed = memory.static_bytes(method)[0] + memory.storage_bytes([images, labels])
    real = []
    with LiveStorages() as live:
        for _ in method.turns(images, labels):
            pass
        assert live.live == memory.static_bytes(method)[1]
        live.peak = live.live
        for _ in method.turns(images, labels):
            real.append(fixed + live.peak)
            live.peak = live.live
    assert counted[0] == (pytest.approx(real, rel=0.02) if half else real)
    whole = sum(memory.static_bytes(method))
    assert len(saved) == len(real) and all(whole + kept < 1.6 * peak for kept, peak in zip(saved, real, strict=True))


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40, 41])
@pytest.mark.parametrize("guess", [-3, 1, 2, 7, 39, 1000])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    assert memory.largest(fits, guess) == limit
    assert len(asked) < 25 and min(asked) >= 1


def test_saved_counts_a_storage_once_and_no_parameters():
    layer = torch.nn.Linear(4, 4)
    saved, images = memory.Saved(layer), torch.randn(8, 4, requires_grad=True)
    with saved.block():
        hidden = layer(images)
        _ = hidden * hidden.view(-1, 4) + hidden.exp()
    assert saved.bytes == 4 * (8 * 4) * 3  # images, hidden, its exponential


def test_table(narrow, monkeypatch, capsys, tmp_path):
    flags = (
        "--arch",
        "vgg11",
        "--splits",
        "2",
        "--batch-size",
        "8",
        "--image-size",
        "64",
        "--budget",
        "0.05",
        "--device",
        "cpu",
    )
    monkeypatch.setattr(sys, "argv", ["imagenet_memory.py", *flags, "--output", str(tmp_path / "memory.txt")])
    frames = []
    monkeypatch.setattr(memory, "table", lambda *args, real=memory.table: frames.append(real(*args)) or frames[0])
    memory.main()
    (frame,) = frames
    text = capsys.readouterr().out
    assert (tmp_path / "memory.txt").read_text() == text and "largest" in text and "CUDA" not in text.split("\n", 3)[3]
    plain, recomputed, *modules = (row for _, row in frame.iterrows())
    assert [row["method"] for row in modules] == ["DGL"] * 2 and [row["module"] for row in modules] == [1, 2]
    assert plain["more"] == 0 and modules[0]["largest"] > plain["largest"] and recomputed["largest"] > plain["largest"]
    assert (
        modules[0]["saved"] + modules[1]["saved"] < 1.2 * plain["saved"]
        and max(row["saved"] for row in modules) < plain["saved"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_allocator_agrees_with_the_count(narrow, monkeypatch, capsys):
    flags = ("--arch", "resnet50", "--splits", "2", "--batch-size", "64", "--image-size", "64", "--budget", "2")
    monkeypatch.setattr(sys, "argv", ["imagenet_memory.py", *flags])
    frames = []
    monkeypatch.setattr(memory, "table", lambda *args, real=memory.table: frames.append(real(*args)) or frames[0])
    memory.main()
    assert frames[0]["CUDA peak"].tolist() == pytest.approx(frames[0]["peak"].tolist(), rel=0.3)
    assert (frames[0]["CUDA largest"].dropna() > 0).all()


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
