"""The benchmark of all methods' steps: bytes and FLOPs by hand, counted as in real steps, and what the tables say."""

import sys
from argparse import Namespace

import pytest
import torch
from running import load_script
from torch import nn

from decoupled import InputError
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training.flags import start

script = load_script("benchmarks/step_costs.py")
from method_networks import chained_parts, interfaced_parts  # noqa: E402  in its folder

CPU = torch.device("cpu")


@pytest.fixture
def arguments(monkeypatch):
    """arguments(*flags): the parsed flags."""

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["step_costs.py", "--device", "cpu", "--repeats", "1", *flags])
        return script.parse_args()

    return parse


# Two 3×3 convolutions, 3 → 4 → 5 channels, on 2 images of one pixel, and Linear heads of 10 classes, without biases


class Synthesizer(nn.Conv2d):
    """A 1×1 convolution: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1, bias=False)

    def forward(self, trigger, context):
        return super().forward(trigger)


def tiny_module(in_channels, channels):
    body = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
    return DecoupledModule(body, nn.Sequential(nn.Flatten(), nn.Linear(channels, 10, bias=False)))


def tiny_network(args, splits):
    lower = tiny_module(3, 4)
    upper = tiny_module(4, 5)
    if splits == 2:
        return DecoupledNetwork([lower, upper])
    upper.body = nn.Sequential(lower.body, upper.body)
    return DecoupledNetwork([upper])


def tiny_chain(args, splits):
    return chained_parts(tiny_network(args, splits))


def tiny_interfaced(args, splits):
    return interfaced_parts(tiny_network(args, splits), args.image_size, Synthesizer)


def tiny_method(name):
    """The method with these networks."""
    builds = {"DGL": tiny_network, "sequential": tiny_network, "DNI": tiny_interfaced}
    return script.METHODS[name]._replace(build=builds.get(name, tiny_chain))


def count_by_hand(name, splits, batch_size=2, budget=None):
    args = Namespace(batch_size=batch_size, image_size=1, classes=10, device="cpu", half=False, budget=budget)
    return script.count(args, tiny_method(name), splits)


# Bytes: of 2 images, their labels, the representations, logits; of the convolutions, the Linear heads, the synthesizer
IMAGES, LABELS, R1, R2, LOGITS = 2 * 4 * 3, 2 * 8, 2 * 4 * 4, 2 * 4 * 5, 2 * 4 * 10
CONV1, CONV2, HEAD1, HEAD2, SYNTHESIZER = 4 * 9 * 3 * 4, 4 * 9 * 4 * 5, 4 * 4 * 10, 4 * 5 * 10, 4 * 4 * 4
SCALAR = 4
LOSS = 2 * LOGITS + 2 * SCALAR  # logits, their log-softmax, the loss and the sum of weights that it is divided by
LAST = 3 * (CONV2 + HEAD2) + R1 + LABELS + R2 + LOSS  # the upper module alone, when its forward pass ends


def mebibytes(*sizes):
    return [size / 2**20 for size in sizes]


def test_back_propagation_by_hand():
    """The peak is at the end of the forward pass, with the gradients of the step before."""
    row, devices = count_by_hand("back-propagation", 1)
    fixed = 3 * (CONV1 + CONV2 + HEAD2)
    assert [row["fixed MiB"], row["peak MiB"]] == mebibytes(fixed, fixed + IMAGES + LABELS + R1 + R2 + LOSS)
    assert devices == [row["peak MiB"]] and row["fullest MiB"] == row["peak MiB"]


def test_dgl_by_hand():
    """On one device the representation and the loss of the lower module are still there in the upper one's turn."""
    row, devices = count_by_hand("DGL", 2)
    fixed = 3 * (CONV1 + CONV2 + HEAD1 + HEAD2)
    peak = fixed + IMAGES + LABELS + R1 + SCALAR + R2 + LOSS
    assert [row["fixed MiB"], row["peak MiB"]] == mebibytes(fixed, peak)
    assert devices == mebibytes(3 * (CONV1 + HEAD1) + IMAGES + LABELS + R1 + LOSS, LAST)


def test_ddg_by_hand():
    """In the lower module's backward pass: two copies of its weights and two outputs, the gradient that has come down,
    that times the loss scale, and the scale. The loss's gradient lasts in the upper one.
    """
    row, devices = count_by_hand("DDG", 2)
    lower = IMAGES + 2 * CONV1 + 4 * R1 + SCALAR
    assert row["peak MiB"] == (3 * (CONV1 + CONV2 + HEAD2) + LABELS + lower + SCALAR) / 2**20
    assert devices == mebibytes(3 * CONV1 + lower, LAST + 2 * SCALAR)


def test_dni_by_hand():
    """On one device and in the upper part, in the backward pass of its convolution: the true gradients on both sides
    of it, the logits, the loss and its gradient; above these the gradients of all weights but the synthesizer's, what
    enters the interface, leaves it, and the synthetic gradient. In the lower part, when its synthesizer learns: what
    enters the interface and leaves it, the synthetic and the true gradient, their difference, and that over the batch.
    """
    row, devices = count_by_hand("DNI", 2)
    weights, true = CONV1 + CONV2 + HEAD2, R1 + R2 + 2 * SCALAR
    assert row["fixed MiB"] == 3 * (weights + SYNTHESIZER) / 2**20
    peak = 3 * weights + 2 * SYNTHESIZER + IMAGES + LABELS + 3 * R1 + true + LOGITS
    assert row["peak MiB"] == peak / 2**20
    lower = 3 * CONV1 + 2 * SYNTHESIZER + IMAGES + 6 * R1
    assert devices == mebibytes(lower, 3 * (CONV2 + HEAD2) + R1 + LABELS + true + LOGITS)


def test_pipeline_by_hand():
    """The lower stage: its output, and the gradient that comes down."""
    row, devices = count_by_hand("pipeline", 2)
    assert devices == mebibytes(3 * CONV1 + IMAGES + 2 * R1, LAST) and row == {"fullest MiB": max(devices)}


def test_flops_by_hand():
    """A multiply-add is 2; as many for the gradient by weights, and for that by the input where one is needed."""
    conv1, conv2, head1, head2, synthesizer = 2 * 9 * 3 * 4, 2 * 9 * 4 * 5, 2 * 4 * 10, 2 * 5 * 10, 2 * 4 * 4
    backprop = 2 * conv1 + 3 * conv2 + 3 * head2
    dgl = 2 * conv1 + 3 * head1 + 2 * conv2 + 3 * head2
    expected = {
        ("back-propagation", 1): backprop,
        ("checkpointing", 2): backprop,  # recomputing stops before a convolution whose output nobody needs
        ("DGL", 2): dgl,
        ("sequential", 2): dgl + conv1,
        ("DDG", 2): backprop,
        ("DNI", 2): backprop + 2 * synthesizer,
    }
    counted = {row: 1e9 * count_by_hand(*row).columns["GFLOP/image"] for row in expected}
    assert counted == pytest.approx(expected)


def real_peaks(args, name, splits):
    """(peak MiB on one device, GFLOP per image, [peak MiB of each device]) of steps that compute."""
    method = script.METHODS[name]
    net = script.prepare(method.build(args, splits), CPU)
    peak, step = script.one_device_peak(args, method, net, args.batch_size)
    devices = script.device_peaks(args, method, splits) if method.make_device_step else []
    return peak / 2**20, script.count_flops(step) / args.batch_size / 1e9, devices


@pytest.mark.parametrize(
    ("name", "splits"),
    [("back-propagation", 1), ("checkpointing", 2), ("DGL", 2), ("sequential", 2), ("DDG", 3), ("DNI", 2)],
)
def test_counting_without_computing_is_exact(arguments, name, splits):
    """The peaks and FLOPs of real steps, to the byte."""
    args = arguments("--depth", "8", "--batch-size", "2")
    row, devices = script.count(args, script.METHODS[name], splits)
    peak, flops, real_devices = real_peaks(args, name, splits)
    assert (row["peak MiB"], row["GFLOP/image"]) == (peak, flops)
    assert devices == (real_devices or ([peak] if splits == 1 else []))


def test_counting_bf16_is_nearly_exact(arguments):
    """Its kernels make some tensors of their own."""
    args = arguments("--depth", "8", "--batch-size", "2", "--half")
    row, devices = script.count(args, script.METHODS["DGL"], 2)
    peak, _, real_devices = real_peaks(args, "DGL", 2)
    assert row["peak MiB"] == pytest.approx(peak, rel=0.02)
    assert devices == pytest.approx(real_devices, rel=0.02)


def test_a_peak_is_that_of_any_later_step():
    """What DDG has in flight is all there after K steps, and not before."""
    args = Namespace(image_size=1, classes=10, device="cpu", half=False)
    method = tiny_method("DDG")
    peaks = []
    for before in (1, script.steps_to_settle(method, 2), 5):
        net = script.prepare(tiny_chain(args, 2), CPU)
        images, labels = script.random_batch(args, 2, CPU)
        held = [*net.parameters(), images, labels]
        make_step = script.functools.partial(method.make_step, args, net, images, labels)
        peaks.append(script.peak_bytes(make_step, held, before, CPU)[0])
    first, settled, later = peaks
    assert first < settled == later


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40, 41])
@pytest.mark.parametrize("guess", [-3, 1, 2, 7, 39, 1000])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    assert script.largest(fits, guess) == limit
    assert len(asked) < 25 and min(asked) >= 1


def test_every_row_is_measured_and_told(arguments):
    """DGL and checkpointing take less memory than back-propagation, DDG more, and the tables say so."""
    args = arguments("--depth", "8", "--batch-size", "16", "--splits", "2")

    def measure_here(args, name, splits, counted):
        return script.measure(args, script.METHODS[name], splits, 0)

    frame, devices = script.make_tables(args, measure_here)
    assert [*frame.index] == [("back-propagation", 1), *((name, 2) for name in script.OTHERS)]
    timed = frame.drop("pipeline", level="method")
    assert (timed[["ms/step", "images/s", "GFLOP/image", "fixed MiB", "peak MiB"]] > 0).all(axis=None)
    peak = frame["peak MiB"].droplevel("K")
    fullest = frame["fullest MiB"].droplevel("K")
    assert max(peak["checkpointing"], peak["DGL"], peak["sequential"]) < peak["back-propagation"] < peak["DDG"]
    assert max(devices["DGL", 2, "counted"]) == fullest["DGL"]

    about, main, _, listed, _, saved = script.report(args, frame, devices).rstrip("\n").split("\n\n")
    assert about.endswith("\n# ResNet-8, 32×32, batch 16, 1 rounds") and "largest" not in main
    assert f"\nDGL, 2: {' '.join(f'{mib:.1f}' for mib in devices['DGL', 2, 'counted'])}\n" in listed
    told = {line.split()[0]: line for line in saved.splitlines()}
    assert script.describe_saving(peak["DGL"], peak["back-propagation"]) in told["DGL"]
    assert told["DGL"].endswith(script.describe_saving(fullest["DGL"], fullest["pipeline"]))
    assert script.describe_saving(peak["DDG"], peak["back-propagation"]) in told["DDG"]


def test_the_command_prints_what_it_writes(arguments, capsys, tmp_path):
    flags = ("--network", "learning_curves", "--batch-size", "8", "--splits", "2", "--methods", "DGL")
    arguments(*flags, "--count", "--budget", "0.125", "--output", str(tmp_path / "table.txt"))
    script.main()
    text = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == text
    backprop, dgl = [line.split() for line in text.splitlines() if line.startswith(("back-propagation 1 ", "DGL "))][:2]
    assert 8 < int(backprop[-2]) < int(dgl[-2])
    assert int(dgl[-1]) == pytest.approx(100 * (int(dgl[-2]) / int(backprop[-2]) - 1), abs=0.5)


def test_a_row_in_a_process_of_its_own(arguments):
    args = arguments("--network", "learning_curves", "--batch-size", "2")
    row, devices = script.measure_in_process(args, "back-propagation", 1, {})
    assert row["ms/step"] > 0 and row["images/s"] == pytest.approx(2000 / row["ms/step"]) and devices == []
    assert script.measure_in_process(args, "DDG", 2, {"peak MiB": 2**30}) == ({}, [])  # more than there is: not tried


def test_a_row_whose_process_fails(arguments, monkeypatch):
    args = arguments("--depth", "8")
    monkeypatch.setattr(sys, "executable", "false")  # a program that exits with 1
    with pytest.raises(InputError, match=r"DDG, K = 2: .* 1.*1\.0 GiB"):
        script.measure_in_process(args, "DDG", 2, {"peak MiB": 1024})


@pytest.mark.parametrize(
    ("peak", "text"),
    [
        (0.62, "saves 38 %"),
        (1.17, "saves nothing: 17 % more"),
        (1.004, "saves nothing"),
        (0.996, "saves nothing"),
        (float("nan"), ""),
    ],
)
def test_savings_in_words(peak, text):
    assert script.describe_saving(peak, 1) == text


def test_the_largest_batch_in_a_budget():
    """Every image needs as much again, so the peak of the next larger batch is over a budget that one just fits in."""
    peak = 2**20 * count_by_hand("DGL", 2, batch_size=30).columns["peak MiB"]
    for budget, expected in ((peak, 30), (peak - 1, 29)):
        assert count_by_hand("DGL", 2, budget=budget / 2**30).columns["largest"] == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--depth", "9"), "--depth 9"),
        (("--depth", "8", "--splits", "6"), "--splits 6"),
        (("--depth", "8", "--splits", "8"), "8"),
        (("--network", "learning_curves", "--splits", "3"), "--splits"),
        (("--network", "vgg11", "--splits", "9"), "--splits"),
        (("--network", "alexnet"), "--network"),
        (("--splits", "1"), "--splits"),
        (("--image-size", "64"), "--image-size"),
        (("--network", "vgg11", "--depth", "8"), "--depth"),
        (("--depth", "8", "--output", "/dev/null/table.txt"), "/dev/null/table.txt"),
        (("--device", "tpu"), "--device tpu"),
        (("--row", "SGD", "2", "0"), "--row SGD"),
    ],
)
def test_bad_input(capsys, monkeypatch, flags, named):
    monkeypatch.setattr(sys, "argv", ["step_costs.py", *flags])
    with pytest.raises(SystemExit) as stop:
        start(script.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("step_costs.py: error: ") and error.count("\n") == 1
    assert named in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["back-propagation", "DGL", "DDG", "DNI"])
def test_the_allocator_agrees_with_the_count(arguments, name):
    method = script.METHODS[name]
    splits = 1 if name == "back-propagation" else 2
    args = arguments("--device", "cuda", "--depth", "20", "--batch-size", "256", "--budget", "1")
    row, counted = script.count(args, method, splits)
    more, allocated = script.measure(args, method, splits, int(row["largest"]))
    assert more["CUDA peak MiB"] == pytest.approx(row["peak MiB"], rel=0.3) and more["CUDA largest"] > 0
    assert allocated == pytest.approx(counted, rel=0.3)
