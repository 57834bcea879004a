"""The claims of the asynchronous simulation, tested on its script, and what its logs are read as."""

import os
import signal
import sys

import pytest
import torch
from naive_buffer import NaiveBuffer
from running import load_script
from torch.nn import functional as F

from decoupled.data.datasets import load
from decoupled.logs import read_log
from decoupled.networks.evaluation import evaluate
from decoupled.training import run as runs

SCRIPT = "async_buffer/cifar_buffer.py"
load_script(SCRIPT)  # its folder can be imported from now on
import async_flags  # noqa: E402
import buffer_results  # noqa: E402
from asynchronous_cnn import asynchronous_cnn, representation_shapes  # noqa: E402
from turns import ImageStream, Turns, tallies  # noqa: E402

NETWORK = {"channels": 3, "depth": 3, "down": (0, 1), "hidden_layers": 1}
SMALL = ("--feature_size", 3, "--ncnn", 3, "--down", "[0,1]", "--mlp", 1, "--device", "cpu")
FLAGS = (
    "--dataset",
    "digits",
    "--train-samples",
    100,
    "--batch_size",
    32,
    "--nepochs",
    3,
    "--epochdecay",
    2,
    "--seed",
    5,
    *SMALL,
)
LENGTH = 3  # mini-batches an epoch: the 4 images left over are dropped


def fresh(seed=5):
    """What a run with FLAGS starts from, without its code: network, optimizers, images."""
    torch.manual_seed(seed)
    net = asynchronous_cnn(**NETWORK).to(memory_format=torch.channels_last)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True) for module in net
    ]
    train, _, _ = load("digits", batch_size=32, train_samples=100, drop_last=True, seed=seed)
    return net, optimizers, train


def rate(epochs_done):
    return 0.1 * 0.2 ** (epochs_done // 2)


def assert_weights(net, left):
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


@pytest.fixture
def drawn(monkeypatch):
    """The modules of the turns that a run of the script takes, in order."""
    taken, draw = [], Turns.draw

    def noted(self):
        taken.append(draw(self))
        return taken[-1]

    monkeypatch.setattr(Turns, "draw", noted)
    return taken


def test_modules_have_the_released_sizes():
    net = asynchronous_cnn(hidden_layers=0)
    counts = [sum(p.numel() for p in module.body.parameters()) for module in net]
    assert counts == [3712, 147_712, 295_424, 590_336, 1_180_672, 2_360_320]
    assert representation_shapes(net) == [
        (128, 32, 32),
        (128, 32, 32),
        (256, 16, 16),
        (256, 16, 16),
        (512, 8, 8),
        (512, 8, 8),
    ]


@pytest.mark.parametrize("downsampling", ["maxpool", "avgpool", "stride", "psi"])
def test_down_sampling(downsampling):
    net = asynchronous_cnn(4, 3, (0,), downsampling)
    assert representation_shapes(net) == [(4, 32, 32), (8, 16, 16), (8, 16, 16)]
    convolution = next(m for m in net[1].body if isinstance(m, torch.nn.Conv2d))
    assert (convolution.in_channels, convolution.stride, convolution.bias) == (
        16 if downsampling == "psi" else 4,
        (2, 2) if downsampling == "stride" else (1, 1),
        None,
    )


def kinds(layers):
    return " ".join(type(layer).__name__ for layer in layers)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(monkeypatch, *flags):
    """The network that the script builds with those flags."""
    made = []

    def noted(*arguments, **options):
        made.append(asynchronous_cnn(*arguments, **options))
        raise InterruptedError

    module = load_script(SCRIPT)
    monkeypatch.setattr(module.async_flags, "asynchronous_cnn", noted)
    monkeypatch.setattr(module.Run, "data", lambda self, **options: (None, None, 10))
    monkeypatch.setattr(sys, "argv", ["cifar_buffer.py", "--device", "cpu", *map(str, flags)])
    with pytest.raises(InterruptedError):
        module.main()
    return made[0]


BODY, MLP, CONV = "Conv2d BatchNorm2d ReLU", "AveragePool Flatten", "Conv2d BatchNorm2d ReLU "
WIDTHS, SIZES = (128, 128, 256, 256, 512, 512), (32, 32, 16, 16, 8, 8)
HEADS = [  # flags, layers of a body and a head, parameters of a body in → out, of a head by channels and halvings
    (
        (),
        BODY,
        MLP + 3 * " Linear BatchNorm1d ReLU" + " Linear",
        lambda a, b: 9 * a * b + 2 * b,
        lambda c, h: 3 * (4 * c * (4 * c + 1) + 8 * c) + 10 * (4 * c + 1),
    ),
    (
        ("--mlp", 0),
        BODY,
        "AveragePool BatchNorm2d Flatten Linear",
        lambda a, b: 9 * a * b + 2 * b,
        lambda c, h: 2 * c + 10 * (4 * c + 1),
    ),
    (
        ("--bn", 0, "--mlp", 1),
        "Conv2d ReLU",
        MLP + " Linear ReLU Linear",
        lambda a, b: 9 * a * b + b,
        lambda c, h: 4 * c * (4 * c + 1) + 10 * (4 * c + 1),
    ),
    (
        ("--bn", 0, "--mlp", 0, "--nlin", 1, "--width_aux", 8),
        "Conv2d ReLU",
        "Conv2d ReLU AveragePool Flatten Linear",
        lambda a, b: 9 * a * b + b,
        lambda c, h: 9 * c * 8 * 2**h + 10 * (4 * 8 * 2**h + 1),
    ),
    (
        ("--nlin", 2, "--mlp", 0),
        BODY,
        CONV + CONV + "AveragePool BatchNorm2d Flatten Linear",
        lambda a, b: 9 * a * b + 2 * b,
        lambda c, h: 2**h * 256 * (9 * (c + 2**h * 256) + 6) + 10 * (4 * 2**h * 256 + 1),
    ),
    (
        ("--avg_size", 8, "--mlp", 0),
        BODY,
        "AveragePool BatchNorm2d Flatten Linear",
        lambda a, b: 9 * a * b + 2 * b,
        lambda c, h: 2 * c + 10 * (16 * c + 1),
    ),
    (
        ("--avg_size", 32, "--mlp", 1),
        BODY,
        MLP + " Linear BatchNorm1d ReLU Linear",
        lambda a, b: 9 * a * b + 2 * b,
        lambda c, h: c * (c + 1) + 2 * c + 10 * (c + 1),
    ),
]


@pytest.mark.parametrize(
    ("flags", "body", "head", "body_count", "head_count"), HEADS, ids=[str(flags) for flags, *_ in HEADS]
)
def test_flags_build_the_released_networks(monkeypatch, flags, body, head, body_count, head_count):
    with torch.device("meta"):
        net = build(monkeypatch, *flags)
    for index, (module, below, width) in enumerate(zip(net, (3, *WIDTHS), WIDTHS, strict=False)):
        assert kinds(module.body) == "MaxPool2d " * (index in (2, 4)) + body
        assert kinds(module.auxiliary) == head
        assert count(module.body) == body_count(below, width)
        assert count(module.auxiliary) == head_count(width, index // 2)


def test_convolutions_of_a_head_are_3x3_without_bias_at_full_size(monkeypatch):
    with torch.device("meta"):
        for flags in ((), ("--bn", 0)):
            net = build(monkeypatch, "--nlin", 2, "--width_aux", 6, *flags)
            representation = torch.zeros(2, 3, 32, 32)
            for index, (module, size) in enumerate(zip(net, SIZES, strict=True)):
                representation = module.body(representation)
                convolutions = [layer for layer in module.auxiliary if isinstance(layer, torch.nn.Conv2d)]
                assert [(c.kernel_size, c.bias, c.out_channels) for c in convolutions] == 2 * [
                    ((3, 3), None, 6 * 2 ** (index // 2))
                ]
                pool = kinds(module.auxiliary).split().index("AveragePool")
                assert module.auxiliary[:pool](representation).shape[2:] == (size, size)


@pytest.mark.parametrize(("window", "side"), [(4, 8), (8, 4), (16, 2), (32, 1)])
def test_the_pooling_window_is_the_flags_and_halved_with_the_size(window, side):
    net = asynchronous_cnn(2, 6, (1, 3), pool=window, hidden_layers=0).eval()
    representation = torch.randn(2, 3, 32, 32)
    for index, module in enumerate(net):
        representation = module.body(representation)
        pooled = F.avg_pool2d(representation, window // 2 ** (index // 2))
        torch.testing.assert_close(module.auxiliary[0](representation), pooled)
        assert pooled.shape[2:] == (side, side)
        assert module.auxiliary[-1].in_features == pooled[0].numel()


def test_a_batch_norm_after_the_pooling_is_drawn_and_learns():
    net = asynchronous_cnn(8, 2, (), hidden_layers=0)
    for module in net:
        weight = module.auxiliary[1].weight
        assert 0 <= weight.min() < weight.max() < 1
        assert weight in set(module.parameters())


def test_ensembles_are_of_logits_weighted_by_powers_of_two(run_script):
    evaluated = []
    run_script(
        SCRIPT,
        *FLAGS,
        "--nepochs",
        1,
        evaluate=lambda net, *args, **options: evaluated.append(net) or evaluate(net, *args, **options),
    )
    first, second, third, *ensembles = evaluated[0].eval()(torch.randn(4, 3, 32, 32))
    for ensemble, expected in zip(
        ensembles, (first, (first + 2 * second) / 3, (first + 2 * second + 4 * third) / 7), strict=True
    ):
        torch.testing.assert_close(ensemble, expected)


def test_without_a_buffer_it_is_synchronous_dgl_bit_for_bit(run_script):
    left = run_script(SCRIPT, *FLAGS)
    net, optimizers, train = fresh()
    for epoch in range(3):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate(epoch)
        for images, labels in train:
            representation = images
            for module, optimizer in zip(net, optimizers, strict=True):
                representation, logits = module(representation.detach())
                optimizer.zero_grad()
                F.cross_entropy(logits, labels).backward()
                optimizer.step()
    assert_weights(net, left)
    counted = tallies(read_log(left.log).attrs["comments"])
    assert (
        (counted.turns == LENGTH).all()
        and not counted[["skipped", "frozen"]].any().any()
        and counted.staleness.max() == counted.reuse.max() == 0
    )


SETTINGS = [
    ("--buffer", 3, "--buffer-sampling", "priority_lifo"),
    ("--buffer", 1, "--noise", 0.6, "--layer_noise", 1),
    ("--buffer", 3, "--noise", 0.7, "--layer_noise", 2, "--max-buffer-reuse", 1),
    ("--buffer", 4, "--noise", 0.8, "--max-buffer-reuse", 2, "--buffer-sampling", "fifo"),
    ("--buffer", 2, "--layer-sequence", "sequential"),
]


@pytest.mark.parametrize("flags", SETTINGS)
def test_it_is_algorithm_2(run_script, drawn, flags):
    """The turns drawn, replayed with plain PyTorch and the naive buffer: the same weights to the bit, the same skips,
    staleness and reuse.
    """
    left = run_script(SCRIPT, *FLAGS, *flags)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    net, optimizers, train = fresh()
    buffers = [
        NaiveBuffer(given["--buffer"], given.get("--max-buffer-reuse"), given.get("--buffer-sampling", "priority_lifo"))
        for _ in range(2)
    ]
    images, learned, skipped, stale, reused = iter(()), [0, 0, 0], 0, [], []
    for n in drawn:
        if learned[n:] == [3 * LENGTH] * (3 - n):  # nobody needs what it makes any more
            continue
        if n == 0:
            item, uses = next(images, None), 0
            if item is None:
                images = iter(train)
                item = next(images)
            item = (*item, 0)
        else:
            found = buffers[n - 1].read()
            if found is None:
                skipped += 1
                continue
            item, uses = found
        values, labels, step = item
        if learned[n] < 3 * LENGTH:
            for group in optimizers[n].param_groups:
                group["lr"] = rate(learned[n] // LENGTH)
            values, logits = net[n](values)
            optimizers[n].zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizers[n].step()
            learned[n] += 1
            if n:
                stale.append(learned[n - 1] - step)
                reused.append(uses)
        else:
            with torch.no_grad():
                values = net[n].eval().body(values)
        if n < 2:
            buffers[n].write((values.detach().clone(memory_format=torch.preserve_format), labels, learned[n]))
    assert learned == [3 * LENGTH] * 3
    assert_weights(net, left)
    counted = tallies(read_log(left.log).attrs["comments"])
    assert counted.turns.sum() == len(drawn) and counted.skipped.sum() == skipped
    assert counted.frozen.sum() == len(drawn) - skipped - 9 * LENGTH
    assert (counted.staleness_max.max(), counted.reuse_max.max()) == (max(stale), max(reused))
    lines = counted[counted.staleness.notna()]
    weights = lines.turns - lines.skipped - lines.frozen
    for name, values in (("staleness", stale), ("reuse", reused)):
        assert (lines[name] * weights).sum() / weights.sum() == pytest.approx(sum(values) / len(values), abs=1e-3)
    if "--max-buffer-reuse" in given:
        assert counted.reuse_max.max() < given["--max-buffer-reuse"]
    if given.get("--max-buffer-reuse") == 1:
        assert skipped > 0


def test_modules_are_drawn_by_their_weights():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    turns = Turns(4, 10, 1, weights=[1, 1, 0.5, 1], warm_up=False, seed=1)
    draws = torch.tensor([turns.draw() for _ in range(20_000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    assert (shares - torch.tensor([2, 2, 1, 2]) / 7).abs().max() < 5 * (0.25 / len(draws)) ** 0.5
    assert torch.equal(torch.get_rng_state(), before)  # initialization and images do not depend on the draws


def test_the_slow_modules_weight_is_one_minus_the_noise(run_script):
    made = []

    def noted(*arguments, **options):
        made.append(options["weights"])
        return Turns(*arguments, **options)

    run_script(SCRIPT, *FLAGS, "--nepochs", 1, "--buffer", 2, "--noise", 0.25, "--layer_noise", 2, Turns=noted)
    assert made == [[1, 1, 0.75]]


@pytest.mark.parametrize("sequence", ["random", "sequential"])
def test_the_warm_up_fills_the_chain_once(run_script, drawn, sequence):
    """Not again when a module's learning rate falls, here after each epoch."""
    run_script(SCRIPT, *FLAGS, "--epochdecay", 1, "--buffer", 2, "--layer-sequence", sequence)
    assert drawn[:6] == [0, 0, 1, 1, 2, 2]
    if sequence == "sequential":
        assert drawn[6:] == [turn % 3 for turn in range(len(drawn) - 6)]
    else:
        generator = torch.Generator().manual_seed(5)
        assert drawn[6:] == [
            torch.multinomial(torch.ones(3).double(), 1, generator=generator).item() for _ in drawn[6:]
        ]


def test_rates_fall_and_learning_stops_by_each_modules_own_epochs(run_script, monkeypatch):
    rates, nets, final = {n: [] for n in (1, 2, 3)}, [], {}

    def build(*arguments):
        nets.append(async_flags.build(*arguments))
        return nets[0]

    class Watched(runs.Run):
        def step(self, loss, optimizer):
            super().step(loss, optimizer)
            n, _ = self.steps.learner(optimizer)
            rates[n].append(optimizer.param_groups[0]["lr"])
            if len(rates[n]) == 3 * LENGTH:
                final[n] = {key: value.clone() for key, value in nets[0][n - 1].state_dict().items()}

    names = {"Run": Watched, "build": build}
    left = run_script(SCRIPT, *FLAGS, "--buffer", 2, "--noise", 0.9, "--layer_noise", 1, **names)
    for n in rates:
        assert rates[n] == pytest.approx([rate(k // LENGTH) for k in range(3 * LENGTH)])
        for key, value in final[
            n
        ].items():  # a module that has learned all its epochs stays as it is, batch norm statistics included
            assert torch.equal(value, left.weights[f"{n - 1}.{key}"]), key
    counted = tallies(read_log(left.log).attrs["comments"]).groupby("n").frozen.sum()
    assert counted[0] > 0 and counted[2] > 0 and counted[1] == 0
    assert (
        left.state["buffers"][0]["writes"] > 3 * LENGTH + counted[0] / 2
    )  # the lowest goes on writing for the slow one above
    frame = read_log(left.log)
    assert frame[frame.n == 1].own_epoch.tolist() == [1, 2, 3] and (frame.own_epoch >= frame.epoch).all()
    assert frame[frame.n == 0].own_epoch.tolist()[1:] == [3, 3]


class Stopped(runs.Run):
    """A run that gets SIGTERM amid its second epoch."""

    steps = 0

    def step(self, loss, optimizer):
        super().step(loss, optimizer)
        Stopped.steps += self.epoch == 2
        if Stopped.steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "flags",
    [
        ("--buffer", 3, "--noise", 0.5, "--layer_noise", 1),
        ("--buffer", 2, "--compress", 4, "--max-buffer-reuse", 1),
        ("--buffer", 2, "--compress", 8, "--half", "--layer-sequence", "sequential"),
        (),
    ],
)
def test_a_stopped_run_resumes_exactly(run_script, monkeypatch, tmp_path, flags):
    whole = run_script(SCRIPT, *FLAGS, *flags, folder=tmp_path / "whole")
    monkeypatch.setattr(Stopped, "steps", 0)
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT, *FLAGS, *flags, Run=Stopped)
    assert stop.value.code == 143
    left = run_script(SCRIPT, *FLAGS, *flags, "--resume")
    assert "# resumed after epoch 2, batch" in left.log.read_text()
    told = [
        [line for line in run.log.read_text().splitlines() if line.startswith(("n: ", "# module", "# buffer"))]
        for run in (left, whole)
    ]
    assert told[0] == told[1] and len(left.lines) == 9
    assert_same(left.state, whole.state)


def assert_same(left, right):
    """Two checkpoints' states, to the bit."""
    if isinstance(right, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(right, (list, tuple)):
        assert len(left) == len(right)
        for mine, its in zip(left, right, strict=True):
            assert_same(mine, its)
    elif isinstance(right, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_the_image_stream_resumes_amid_a_pass():
    train, _, _ = load("digits", batch_size=32, train_samples=100, seed=1)
    stream = ImageStream(train)
    for taken in range(10):  # 4 a pass
        state = stream.state_dict()
        other = ImageStream(load("digits", batch_size=32, train_samples=100, seed=2)[0])
        other.load_state_dict(state)
        assert_same(other.state_dict(), state)
        assert torch.equal(stream.read().representation, other.read().representation), taken


def test_more_epochs_only_before_a_module_has_stopped_learning(run_script, fails, tmp_path):
    run_script(SCRIPT, *FLAGS, "--nepochs", 2, "--buffer", 2)
    assert "a module has stopped learning after its epoch 2: resume with --nepochs 2" in fails(
        SCRIPT, *FLAGS, "--buffer", 2, "--resume"
    )
    run_script(SCRIPT, *FLAGS, "--nepochs", 2, folder=tmp_path / "synchronous")
    left = run_script(SCRIPT, *FLAGS, "--resume", folder=tmp_path / "synchronous")
    assert left.lines == run_script(SCRIPT, *FLAGS, folder=tmp_path / "whole").lines


def test_without_ensembles(run_script):
    frame = read_log(run_script(SCRIPT, *FLAGS, "--nepochs", 1, "--ensemble", 0).log)
    assert frame.n.tolist() == [0, 1, 2] and frame.ensemble_top1.isna().all() and frame.test_top1.notna().all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--buffer", 3, "--noise", 1), "argument --noise: '1' must be a number ≥ 0 and < 1"),
        (("--buffer", 3, "--noise", "-0.1"), "argument --noise: '-0.1' must be a number"),
        (("--buffer", 3, "--noise", "nan"), "argument --noise: 'nan' must be a number"),
        (("--buffer", 3, "--noise", "much"), "argument --noise: 'much' must be a number"),
        (("--lr", 0), "argument --lr: '0' must be a number > 0"),
        (("--buffer", 3, "--noise", 0.1, "--layer_noise", 3), "--layer_noise 3 is no module: there are 3, from 0"),
        (
            ("--buffer", 3, "--noise", 0.1, "--layer_noise", -1),
            "argument --layer_noise: '-1' must be an integer ≥ 0",
        ),
        (("--buffer", 3, "--buffer-sampling", "newest"), "argument --buffer-sampling: invalid choice: 'newest'"),
        (("--buffer", 3, "--layer-sequence", "cyclic"), "argument --layer-sequence: invalid choice: 'cyclic'"),
        (("--buffer", -1), "argument --buffer: '-1' must be an integer ≥ 0"),
        (("--buffer", 3, "--max-buffer-reuse", 0), "argument --max-buffer-reuse: '0' must be an integer ≥ 1"),
        (("--buffer", 3, "--compress", 5), "argument --compress: invalid choice: 5"),
        (
            ("--buffer", 3, "--noise", 0.1, "--layer-sequence", "sequential"),
            "--noise has no effect with --layer-sequence sequential",
        ),
        (("--noise", 0.1), "--noise has no effect without --buffer: the run is synchronous"),
        (("--max-buffer-reuse", 2), "--max-buffer-reuse has no effect without --buffer"),
        (("--compress", 8), "--compress has no effect without --buffer"),
        (("--width_aux", 64), "--width_aux has no effect without --nlin"),
        (("--down", "1;2"), "argument --down: '1;2' is no list of modules such as [1,3]"),
        (("--down", "[0,2]"), "--down [0, 2] must list different modules from 0 to 1"),
        (("--ncnn", 8, "--down", "0,1,2,3,4,5"), "halves the size too often: 32x32 cannot be halved 6 times"),
        (
            ("--ncnn", 8, "--down", "0,1,2,3,4"),
            "--avg_size 16 does not fit: it must divide 32x32 and be halved 5 times (--down [0, 1, 2, 3, 4]): choose "
            "from 32",
        ),
        (("--avg_size", 6), "--avg_size 6 does not fit: it must divide 32x32 and be halved 2 times (--down [0, 1])"),
        (("--avg_size", 2), "--avg_size 2 does not fit"),
        (("--avg_size", 64), "choose from 4, 8, 16, 32"),
        (("--avg_size", 0), "argument --avg_size: '0' must be an integer ≥ 1"),
        (("--buffer", 3, "--buffer-sampling", "lifo"), "argument --buffer-sampling: invalid choice: 'lifo'"),
        (("--ncnn", 1), "argument --ncnn: '1' must be an integer ≥ 2"),
        (("--ds-type", "sum"), "argument --ds-type: invalid choice: 'sum'"),
        (("--buffer", 10**9), "the buffers need "),
    ],
)
def test_bad_flags(fails, flags, message):
    assert message in fails(SCRIPT, *FLAGS, *flags)


# What runs came to


def test_results_of_complete_logs_with_their_setting_and_spread(run_script, tmp_path):
    for seed in (0, 1):
        for flags in ((), ("--noise", 0.5, "--layer_noise", 2)):
            quick = (*FLAGS[: FLAGS.index("--nepochs")], "--nepochs", 1, *SMALL)
            run_script(SCRIPT, *quick, "--buffer", 2, *flags, "--seed", seed, "--name", f"{seed}{len(flags)}")
    last = run_script(SCRIPT, *FLAGS[: FLAGS.index("--nepochs")], "--nepochs", 1, *SMALL, "--name", "cut").log
    last.write_text("".join(line for line in last.read_text().splitlines(True) if not line.startswith("n: 2")))
    frame = buffer_results.results(tmp_path / "logs")
    assert sorted(zip(frame["slow_down"], frame["seed"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(set(frame["setting"])) == 1 and "feature_size=3" in frame["setting"][0]
    table = buffer_results.table(frame).droplevel("setting")
    assert list(table.index) == [(2, "-", 1.0), (2, "2", 2.0)] and list(table["seeds"]) == [2, 2]
    two = frame[frame["slow_down"] == 2]["test_top1"]
    assert table.loc[(2, "2", 2.0), "test_top1"] == pytest.approx(two.mean(), abs=0.006)
    assert table.loc[(2, "2", 2.0), "spread"] == pytest.approx(two.std(), abs=0.006)
    assert [complete for path, _, _, complete in buffer_results.read_runs(tmp_path / "logs") if path == last] == [False]
