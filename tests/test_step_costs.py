"""The benchmark of all methods' steps: bytes and FLOPs by hand, counted as in real steps, and what the tables say."""

import functools
import subprocess
import sys

import pytest
import torch
from running import load_script
from torch import nn

from decoupled import InputError
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training.flags import start

script = load_script("benchmarks/step_costs.py")
import method_steps  # noqa: E402  in its folder


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """arguments(*flags): the parsed flags, with a folder for the log."""

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["step_costs.py", "--device", "cpu", "--repeats", "1", *flags])
        args = script.parse_args()
        args.log_dir = str(tmp_path)
        return args

    return parse


class Synthesizer(nn.Conv2d):
    """A 1×1 convolution: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1, bias=False)

    def forward(self, trigger, context):
        return super().forward(trigger)


@pytest.fixture
def by_hand(monkeypatch, arguments):
    """count(method, K) of two 3×3 convolutions, 3 → 4 → 5 channels, on 2 images of one pixel, and Linear heads of 10
    classes; all without biases.
    """

    def network(args, splits):
        def module(below, channels):
            head = nn.Sequential(nn.Flatten(), nn.Linear(channels, 10, bias=False))
            return DecoupledModule(nn.Sequential(nn.Conv2d(below, channels, 3, padding=1, bias=False)), head)

        lower, upper = module(3, 4), module(4, 5)
        if splits == 1:
            upper.body = nn.Sequential(lower.body, upper.body)
        return DecoupledNetwork([lower, upper][2 - splits :])

    monkeypatch.setattr(method_steps, "ConvSynthesizer", Synthesizer)
    for name in ("back-propagation", "DGL", "sequential"):
        build = network if name in ("DGL", "sequential") else method_steps.chained
        monkeypatch.setitem(script.METHODS, name, script.METHODS[name]._replace(build=build))
    monkeypatch.setattr(method_steps, "network", network)
    args = arguments("--network", "learning_curves", "--batch-size", "2")
    args.image_size = 1
    return functools.partial(script.count, args)


# Bytes: of 2 images, their labels, the representations, logits; of the convolutions, the Linear heads, the synthesizer
IMAGES, LABELS, R1, R2, LOGITS = 2 * 4 * 3, 2 * 8, 2 * 4 * 4, 2 * 4 * 5, 2 * 4 * 10
CONV1, CONV2, HEAD1, HEAD2, SYNTHESIZER = 4 * 9 * 3 * 4, 4 * 9 * 4 * 5, 4 * 4 * 10, 4 * 5 * 10, 4 * 4 * 4
SCALAR = 4
LOSS = 2 * LOGITS + 2 * SCALAR  # logits, their log-softmax, the loss and the sum of weights that it is divided by
LAST = 3 * (CONV2 + HEAD2) + R1 + LABELS + R2 + LOSS  # the upper module alone, when its forward pass ends


def mebibytes(*sizes):
    return [size / 2**20 for size in sizes]


def test_back_propagation_by_hand(by_hand):
    """The peak is at the end of the forward pass, with the gradients of the step before."""
    row, devices = by_hand("back-propagation", 1)
    fixed = 3 * (CONV1 + CONV2 + HEAD2)
    assert [row["fixed MiB"], row["peak MiB"]] == mebibytes(fixed, fixed + IMAGES + LABELS + R1 + R2 + LOSS)
    assert devices == [row["peak MiB"]] and row["fullest MiB"] == row["peak MiB"]


def test_dgl_by_hand(by_hand):
    """On one device the representation, logits and loss of the lower module are still there in the upper one's turn."""
    row, devices = by_hand("DGL", 2)
    fixed = 3 * (CONV1 + CONV2 + HEAD1 + HEAD2)
    peak = fixed + IMAGES + LABELS + R1 + LOGITS + SCALAR + R2 + LOSS
    assert [row["fixed MiB"], row["peak MiB"]] == mebibytes(fixed, peak)
    assert devices == mebibytes(3 * (CONV1 + HEAD1) + IMAGES + LABELS + R1 + LOSS, LAST)


def test_ddg_by_hand(by_hand):
    """In the lower module's backward pass: two copies of its weights and two outputs, the gradient that has come down,
    that times the loss scale, and the scale. The loss's gradient lasts in the upper one.
    """
    row, devices = by_hand("DDG", 2)
    lower = IMAGES + 2 * CONV1 + 4 * R1 + SCALAR
    assert row["peak MiB"] == (3 * (CONV1 + CONV2 + HEAD2) + LABELS + lower + SCALAR) / 2**20
    assert devices == mebibytes(3 * CONV1 + lower, LAST + 2 * SCALAR)


def test_dni_by_hand(by_hand):
    """On one device and in the upper part, in the backward pass of its convolution: the true gradients on both sides
    of it, the loss and its gradient; above these the gradients of all weights but the synthesizer's, what enters the
    interface, leaves it, and the synthetic gradient. In the lower part, when its synthesizer learns: what enters the
    interface and leaves it, the synthetic and the true gradient, their difference, and that over the batch.
    """
    row, devices = by_hand("DNI", 2)
    weights, true = CONV1 + CONV2 + HEAD2, R1 + R2 + 2 * SCALAR
    assert row["fixed MiB"] == 3 * (weights + SYNTHESIZER) / 2**20
    peak = 3 * weights + 2 * SYNTHESIZER + IMAGES + LABELS + 3 * R1 + true + LOGITS
    assert row["peak MiB"] == peak / 2**20
    lower = 3 * CONV1 + 2 * SYNTHESIZER + IMAGES + 6 * R1
    assert devices == mebibytes(lower, 3 * (CONV2 + HEAD2) + R1 + LABELS + true)


def test_pipeline_by_hand(by_hand):
    """The lower stage: its output, and the gradient that comes down."""
    row, devices = by_hand("pipeline", 2)
    assert devices == mebibytes(3 * CONV1 + IMAGES + 2 * R1, LAST) and row == {"fullest MiB": max(devices)}


def test_flops_by_hand(by_hand):
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
    counted = {row: 1e9 * by_hand(*row)[0]["GFLOP/image"] for row in expected}
    assert counted == pytest.approx(expected)


@pytest.mark.parametrize("method", [method for method in script.METHODS if method != "pipeline"])
def test_counting_without_computing_is_exact(arguments, method):
    """Each method's row at toy size: the peaks and FLOPs of real steps, to the byte."""
    splits = 1 if method == "back-propagation" else 3
    args = arguments("--depth", "8", "--batch-size", "4", "--row", method, str(splits), "0")
    row, devices = script.count(args, method, splits)
    net = script.prepared(script.Run(args), script.METHODS[method].build(args, splits))
    peak, step = script.whole_peak(args, method, net, 4)
    assert row["peak MiB"] == peak / 2**20 and row["GFLOP/image"] == script.count_flops(step) / 4e9
    if script.METHODS[method].alone:
        assert devices == mebibytes(*script.device_peaks(args, method, splits))


def test_a_peak_is_that_of_any_later_step(monkeypatch, arguments):
    args = arguments("--depth", "8", "--batch-size", "4")
    counted = script.count(args, "DDG", 5)
    monkeypatch.setattr(script, "steps_before", lambda method, splits, k=0: splits + 2)
    assert script.count(args, "DDG", 5) == counted


def test_counting_bf16_is_nearly_exact(arguments):
    """Its kernels make some tensors of their own."""
    args = arguments("--depth", "8", "--batch-size", "4", "--half")
    row, devices = script.count(args, "DGL", 2)
    net = script.prepared(script.Run(args), script.METHODS["DGL"].build(args, 2))
    assert row["peak MiB"] == pytest.approx(script.whole_peak(args, "DGL", net, 4)[0] / 2**20, rel=0.02)
    assert devices == pytest.approx(mebibytes(*script.device_peaks(args, "DGL", 2)), rel=0.02)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 40, 41])
@pytest.mark.parametrize("guess", [-3, 1, 2, 7, 39, 1000])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= limit

    assert script.largest(fits, guess) == limit
    assert len(asked) < 25 and min(asked) >= 1


def parts(text):
    """The blocks of the output, which empty lines separate."""
    return text.rstrip("\n").split("\n\n")


def test_every_row_is_measured_and_told(monkeypatch, capsys, tmp_path, arguments):
    """DGL and checkpointing take less memory than back-propagation, DDG more, and the tables say so. A row as its own
    process prints it, without the process.
    """
    monkeypatch.setattr(script, "SECONDS", 1e-9)
    flags = ("--depth", "14", "--batch-size", "8", "--splits", "2", "--output", str(tmp_path / "table.txt"))
    frames = []

    def alone(command, **_):
        words = command[command.index("--row") :]
        arguments(*flags, *words)
        script.main()
        *_, row = capsys.readouterr().out.splitlines()
        return subprocess.CompletedProcess(command, 0, row)

    monkeypatch.setattr(script.subprocess, "run", alone)
    monkeypatch.setattr(script.provenance, "environment", lambda device, half: [f"# {device}, {half}"])
    monkeypatch.setattr(script, "tables", lambda args, real=script.tables: frames.append(real(args)) or frames[0])
    arguments(*flags)
    script.main()
    text = capsys.readouterr().out
    ((frame, devices),) = frames
    assert (tmp_path / "table.txt").read_text() == text
    assert [*frame.index] == [("back-propagation", 1), *((method, 2) for method in [*script.METHODS][1:])]
    timed = frame.drop("pipeline", level="method")
    assert (timed[["ms/step", "images/s", "GFLOP/image", "fixed MiB", "peak MiB"]] > 0).all(axis=None)
    peak, fullest = frame["peak MiB"].droplevel("K"), frame["fullest MiB"].droplevel("K")
    assert max(peak["checkpointing"], peak["DGL"], peak["sequential"]) < peak["back-propagation"] < peak["DDG"]
    about, main, _, listed, _, saved = parts(text)
    assert about == "# cpu, False\n# ResNet-14, 32×32, batch 8, 1 rounds" and "largest" not in main
    assert f"\nDGL, 2: {' '.join(f'{mib:.1f}' for mib in devices['DGL', 2, 'counted'])}\n" in listed
    assert max(devices["DGL", 2, "counted"]) == fullest["DGL"]
    told = {line.split()[0]: line for line in saved.splitlines()}
    assert script.words(peak["DGL"], peak["back-propagation"]) in told["DGL"]
    assert told["DGL"].endswith(script.words(fullest["DGL"], fullest["pipeline"]))
    assert script.words(peak["DDG"], peak["back-propagation"]) in told["DDG"]


def test_words():
    told = [script.words(*peaks) for peaks in ((0.62, 1), (1.17, 1), (1.004, 1), (0.996, 1), (float("nan"), 1))]
    assert told == ["saves 38 %", "saves nothing: 17 % more", "saves nothing", "saves nothing", ""]


def test_the_largest_batch_in_a_budget(arguments):
    args = arguments(
        "--network", "learning_curves", "--batch-size", "8", "--splits", "2", "--methods", "DGL", "--count"
    )
    args.budget = 0.125
    frame, _ = script.tables(args)
    plain, dgl = frame["largest"]
    assert 8 < plain < dgl and frame["more"].tolist() == [0, pytest.approx(100 * (dgl / plain - 1))]
    with script.FakeTensorMode():
        net = script.prepared(script.Run(args), script.METHODS["DGL"].build(args, 2))
        for fits in (True, False):
            peak, _ = script.whole_peak(args, "DGL", net, int(dgl) + (not fits))
            assert (peak <= args.budget * 2**30) == fits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--depth", "9"), "--depth 9 is no CIFAR ResNet's"),
        (("--depth", "8", "--splits", "6"), "--splits 6 leaves a module without weights"),
        (("--depth", "8", "--splits", "8"), "7 pieces do not split into 8 parts"),
        (("--network", "learning_curves", "--splits", "3"), "learning_curves has no 3 modules of equally many layers"),
        (("--network", "vgg11", "--splits", "9"), "vgg11 has no 9 modules"),
        (("--network", "resnet50", "--splits", "19"), "17 pieces do not split into 19 parts"),
        (("--network", "alexnet"), "invalid choice: 'alexnet'"),
        (("--splits", "1"), "'1' must be an integer ≥ 2"),
        (("--image-size", "64"), "cifar_resnet has 32×32 images: leave --image-size out"),
        (("--network", "vgg11", "--depth", "8"), "--depth is of cifar_resnet: leave it out with vgg11"),
        (("--depth", "8", "--output", "/dev/null/table.txt"), "/dev/null/table.txt"),
        (("--device", "tpu"), "--device tpu is unknown"),
        (("--row", "SGD", "2", "0"), "--row SGD 2 0: the method is one of back-propagation, pipeline, "),
    ],
)
def test_bad_input(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["step_costs.py", *flags])
    with pytest.raises(SystemExit) as stop:
        start(script.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("step_costs.py: error: ") and error.count("\n") == 1
    assert message in error


def test_a_row_whose_process_fails(monkeypatch, arguments):
    args = arguments("--depth", "8")
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, ""))
    with pytest.raises(InputError, match=r"DDG, K = 2: its own process ended with -9; its step needs 1.0 GiB"):
        script.measured_alone(args, "DDG", 2, {"peak MiB": 1024})
    assert script.measured_alone(args, "DDG", 2, {"peak MiB": 2**30}) == ({}, [])  # more than there is: not tried


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["back-propagation", "DGL", "DDG", "DNI"])
def test_the_allocator_agrees_with_the_count(arguments, method):
    splits = 1 if method == "back-propagation" else 2
    args = arguments("--device", "cuda", "--depth", "20", "--batch-size", "256", "--budget", "1")
    row, counted = script.count(args, method, splits)
    more, allocated = script.measure(args, method, splits, int(row["largest"]))
    assert more["CUDA peak MiB"] == pytest.approx(row["peak MiB"], rel=0.3) and more["CUDA largest"] > 0
    assert allocated == pytest.approx(counted, rel=0.3)
