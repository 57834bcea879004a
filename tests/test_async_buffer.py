"""The claims of the asynchronous simulation, tested on its script, and what its logs are read as."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch
from naive_buffer import NaiveBuffer
from running import load_script
from torch.nn import functional as F

from decoupled.data import datasets
from decoupled.logs import read_log

SCRIPT = "async_buffer/cifar_buffer.py"
script = load_script(SCRIPT)  # its folder can be imported from now on
import buffer_results  # noqa: E402
from asynchronous_cnn import asynchronous_cnn, representation_shapes  # noqa: E402
from released_choices import CountingBuffer, RepeatingTurns  # noqa: E402
from turns import ImageStream, Turns, read_tallies  # noqa: E402

NETWORK = {"channels": 3, "depth": 3, "down": (0, 1), "hidden_layers": 1}
DATA = ("--dataset", "digits", "--train-samples", 100, "--batch_size", 32)
SMALL = ("--feature_size", 3, "--ncnn", 3, "--down", "[0,1]", "--mlp", 1, "--device", "cpu")
FLAGS = (*DATA, "--nepochs", 3, "--epochdecay", 2, "--seed", 5, *SMALL)
LENGTH = 3  # mini-batches per epoch: the 4 images left over are dropped


def fresh(seed=5):
    """What a run with FLAGS starts from, without its code: network, optimizers, images."""
    torch.manual_seed(seed)
    net = asynchronous_cnn(**NETWORK).to(memory_format=torch.channels_last)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True) for module in net
    ]
    train, _, _ = datasets.load("digits", batch_size=32, train_samples=100, drop_last=True, seed=seed)
    return net, optimizers, train


def rate(epochs_done):
    return 0.1 * 0.2 ** (epochs_done // 2)


def draws(flags):
    """Yields the modules of the turns that a run with FLAGS and ``flags`` takes, without its code."""
    yield from (0, 0, 1, 1, 2, 2)
    if flags.get("--layer-sequence") == "sequential":
        while True:
            yield from (0, 1, 2)
    weights = torch.ones(3, dtype=torch.float64)
    weights[flags.get("--layer_noise", 0)] -= flags.get("--noise", 0)
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.multinomial(weights, 1, generator=generator).item()


def assert_weights(net, left):
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


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


def build(*flags):
    """The network that the script builds with those flags."""
    with torch.device("meta"):
        return script.build(script.parse_args([str(flag) for flag in flags]), 10)


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
def test_flags_build_the_released_networks(flags, body, head, body_count, head_count):
    net = build(*flags)
    for index, (module, below, width) in enumerate(zip(net, (3, *WIDTHS), WIDTHS, strict=False)):
        assert kinds(module.body) == "MaxPool2d " * (index in (2, 4)) + body
        assert kinds(module.auxiliary) == head
        assert count(module.body) == body_count(below, width)
        assert count(module.auxiliary) == head_count(width, index // 2)


def test_convolutions_of_a_head_are_3x3_without_bias_at_full_size():
    with torch.device("meta"):
        for flags in ((), ("--bn", 0)):
            net = build("--nlin", 2, "--width_aux", 6, *flags)
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


def test_the_log_has_the_ensembles_of_logits_weighted_by_powers_of_two(run_script):
    left = run_script(SCRIPT, *FLAGS, "--buffer", 3)
    _, test, _ = datasets.load("digits", batch_size=32, test_batch_size=1000, train_samples=100)
    ((images, labels),) = test
    net = asynchronous_cnn(**NETWORK)
    net.load_state_dict(left.weights)
    first, second, third = net.eval()(images)

    def top1(logits):
        return 100 * (logits.argmax(1) == labels).double().mean().item()

    last = read_log(left.log).tail(3)
    ensembles = [first, first + 2 * second, first + 2 * second + 4 * third]
    assert last.test_top1.tolist() == pytest.approx([top1(first), top1(second), top1(third)], abs=1e-3)
    assert last.ensemble_top1.tolist() == pytest.approx([top1(ensemble) for ensemble in ensembles], abs=1e-3)


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
    counted = read_tallies(read_log(left.log).attrs["comments"])
    assert (
        (counted.turns == LENGTH).all()
        and not counted[["skipped", "frozen"]].any().any()
        and counted.staleness.max() == counted.reuse.max() == 0
    )


SETTINGS = [
    ("--buffer", 1, "--noise", 0.6, "--layer_noise", 1),
    ("--buffer", 3, "--noise", 0.7, "--layer_noise", 2, "--max-buffer-reuse", 1),
    ("--buffer", 4, "--noise", 0.8, "--max-buffer-reuse", 2, "--buffer-sampling", "fifo"),
    ("--buffer", 2, "--noise", 0.9, "--layer_noise", 1),
    ("--buffer", 2, "--layer-sequence", "sequential"),
]


@pytest.mark.parametrize("flags", SETTINGS)
def test_it_is_algorithm_2(run_script, flags):
    """The same turns with plain PyTorch and the naive buffer: the same weights to the bit, of modules that have stopped
    learning, too; the same skips, staleness and reuse.
    """
    left = run_script(SCRIPT, *FLAGS, *flags)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    net, optimizers, train = fresh()
    buffers = [
        NaiveBuffer(given["--buffer"], given.get("--max-buffer-reuse"), given.get("--buffer-sampling", "priority_lifo"))
        for _ in range(2)
    ]
    images, learned, frozen, skipped, stale, reused = iter(()), [0, 0, 0], [0, 0, 0], 0, [], []
    turns = draws(given)
    while min(learned) < 3 * LENGTH:
        n = next(turns)
        if learned[n] == 3 * LENGTH:
            frozen[n] += 1
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
                frozen[n] -= learned[n] == 3 * LENGTH
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
    counted = read_tallies(read_log(left.log).attrs["comments"])
    assert counted.turns.sum() == 9 * LENGTH + sum(frozen) + skipped and counted.skipped.sum() == skipped
    assert counted.groupby("n").frozen.sum().tolist() == frozen
    assert (counted.staleness_max.max(), counted.reuse_max.max()) == (max(stale), max(reused))
    lines = counted[counted.staleness.notna()]
    weights = lines.turns - lines.skipped - lines.frozen
    for name, values in (("staleness", stale), ("reuse", reused)):
        assert (lines[name] * weights).sum() / weights.sum() == pytest.approx(sum(values) / len(values), abs=1e-3)
    if "--max-buffer-reuse" in given:
        assert counted.reuse_max.max() < given["--max-buffer-reuse"]
    if given.get("--max-buffer-reuse") == 1:
        assert skipped > 0
    frame = read_log(left.log)
    slowest = frame.groupby("epoch").own_epoch.min()
    assert slowest.tolist() == [1, 2, 3] and frame.own_epoch.max() == 3
    if given.get("--noise") == 0.9:  # the lowest module goes on for the slow one above it
        assert left.state["buffers"][0]["writes"] > 3 * LENGTH and frame[frame.n == 0].own_epoch.tolist()[1:] == [3, 3]


def test_modules_are_drawn_by_their_weights():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    turns = Turns(4, 10, 1, weights=[1, 1, 0.5, 1], warm_up=False, seed=1)
    draws = torch.tensor([turns.draw() for _ in range(20_000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    assert (shares - torch.tensor([2, 2, 1, 2]) / 7).abs().max() < 5 * (0.25 / len(draws)) ** 0.5
    assert torch.equal(torch.get_rng_state(), before)  # initialization and images do not depend on the draws


def test_the_warm_up_fills_the_chain_once():
    for weights in (None, [1, 1, 0.5]):
        turns = Turns(3, 10, 1, weights=weights, seed=5)
        given = {"--layer-sequence": "sequential"} if weights is None else {"--noise": 0.5, "--layer_noise": 2}
        expected = draws(given)
        assert [turns.draw() for _ in range(50)] == [next(expected) for _ in range(50)]


@contextlib.contextmanager
def sigterm_in_second_epoch(folder):
    """Sends SIGTERM to this process when the run in it, which saves often, has saved within its second epoch."""

    def saved():
        """[when the checkpoint was written], after the first epoch; [] before."""
        for log in folder.glob("*.log"):
            if "# epoch 1 took" in log.read_text():
                return [log.with_suffix(".pt").stat().st_mtime_ns]
        return []

    def watch():
        end = time.monotonic() + 60
        times = set()
        while time.monotonic() < end:
            times.update(saved())
            if len(times) == 3:  # before and at the end of the first epoch, and in the second
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # a signal that comes too late does not end the tests
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "flags",
    [
        ("--buffer", 3, "--noise", 0.5, "--layer_noise", 1),
        ("--buffer", 2, "--compress", 4, "--half", "--max-buffer-reuse", 1),
        (),
    ],
)
def test_a_stopped_run_resumes_exactly(run_script, tmp_path, flags):
    flags = (*FLAGS, *flags, "--train-samples", 160, "--batch-size", 16, "--nepochs", 2)
    whole = run_script(SCRIPT, *flags, folder=tmp_path / "whole")
    with pytest.raises(SystemExit) as stop, sigterm_in_second_epoch(tmp_path / "logs"):
        run_script(SCRIPT, *flags, "--save-every", 0.0001)
    assert stop.value.code == 143
    left = run_script(SCRIPT, *flags, "--resume")
    assert "# resumed after epoch 2, batch" in left.log.read_text()
    told = [
        [line for line in run.log.read_text().splitlines() if line.startswith(("n: ", "# module", "# buffer"))]
        for run in (left, whole)
    ]
    assert told[0] == told[1] and len(left.lines) == 6
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
    train, _, _ = datasets.load("digits", batch_size=32, train_samples=100, seed=1)
    stream = ImageStream(train)
    for taken in range(10):  # 4 a pass
        state = stream.state_dict()
        other = ImageStream(datasets.load("digits", batch_size=32, train_samples=100, seed=2)[0])
        other.load_state_dict(state)
        assert_same(other.state_dict(), state)
        assert torch.equal(stream.read().representation, other.read().representation), taken


def test_more_epochs_only_before_a_module_has_stopped_learning(run_script, fails, tmp_path):
    more = ("--epochs", 2, "--resume")  # the other name of --nepochs
    run_script(SCRIPT, *FLAGS, "--nepochs", 1, "--buffer", 2)
    assert "--nepochs 1" in fails(SCRIPT, *FLAGS, "--buffer", 2, *more)
    run_script(SCRIPT, *FLAGS, "--nepochs", 1, folder=tmp_path / "synchronous")
    left = run_script(SCRIPT, *FLAGS, *more, folder=tmp_path / "synchronous")
    assert left.lines == run_script(SCRIPT, *FLAGS, "--nepochs", 2, folder=tmp_path / "whole").lines


def test_without_ensembles(run_script):
    frame = read_log(run_script(SCRIPT, *FLAGS, "--nepochs", 1, "--ensemble", 0).log)
    assert frame.n.tolist() == [0, 1, 2] and frame.ensemble_top1.isna().all() and frame.test_top1.notna().all()


@pytest.mark.parametrize(
    "flags",  # the first is refused
    [
        ("--noise", 1, "--buffer", 3),
        ("--noise", "nan", "--buffer", 3),
        ("--layer_noise", 3, "--buffer", 3, "--noise", 0.1),
        ("--layer_noise", -1, "--buffer", 3, "--noise", 0.1),
        ("--buffer-sampling", "lifo", "--buffer", 3),
        ("--layer-sequence", "cyclic", "--buffer", 3),
        ("--buffer", -1),
        ("--max-buffer-reuse", 0, "--buffer", 3),
        ("--compress", 5, "--buffer", 3),
        ("--noise", 0.1, "--buffer", 3, "--layer-sequence", "sequential"),
        ("--noise", 0.1),
        ("--max-buffer-reuse", 2),
        ("--compress", 8),
        ("--width_aux", 64),
        ("--down", "1;2"),
        ("--down", "[0,2]"),
        ("--down", "0,1,2,3,4,5", "--ncnn", 8),
        ("--avg_size", 16, "--ncnn", 8, "--down", "0,1,2,3,4"),
        ("--avg_size", 6),
        ("--avg_size", 2),
        ("--avg_size", 64),
        ("--ncnn", 1),
        ("--ds-type", "sum"),
        ("--buffer", 10**9),
        ("--prog",),
    ],
)
def test_bad_flags(fails, flags):
    assert flags[0] in fails(SCRIPT, *FLAGS, *flags)


# What runs came to


def test_results_of_complete_logs_with_their_setting_and_spread(run_script, tmp_path):
    short = (*DATA, "--nepochs", 1, *SMALL)
    for seed in (0, 1):
        for flags in ((), ("--noise", 0.5, "--layer_noise", 2)):
            name = f"{seed}{len(flags)}"
            run_script(SCRIPT, *short, "--buffer", 2, *flags, "--seed", seed, "--name", name)
    last = run_script(SCRIPT, *short, "--name", "cut").log
    last.write_text("".join(line for line in last.read_text().splitlines(True) if not line.startswith("n: 2")))
    frame = buffer_results.results(tmp_path / "logs")
    assert sorted(zip(frame["slow_down"], frame["seed"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len(set(frame["setting"])) == 1 and "feature_size=3" in frame["setting"][0]
    table = buffer_results.table(frame).droplevel("setting")
    assert list(table.index) == [(2, "-", 1.0), (2, "2", 2.0)] and list(table["seeds"]) == [2, 2]
    two = frame[frame["slow_down"] == 2]["test_top1"]
    assert table.loc[(2, "2", 2.0), "test_top1"] == pytest.approx(two.mean(), abs=0.006)
    assert table.loc[(2, "2", 2.0), "spread"] == pytest.approx(two.std(), abs=0.006)
    assert [run.path for run in buffer_results.read_runs(tmp_path / "logs") if not run.complete] == [last]


# The released code's choices (released_choices.py)


@pytest.mark.parametrize("released, slots, others", [(True, [0, 2, 1, 0], 2), (False, [2, 1, 0, 2], 0)])
def test_reads_that_the_released_tie_break_changes(released, slots, others):
    """Slot 0 is the oldest, and the next to be overwritten."""
    buffer = CountingBuffer(3, released)
    for step in range(3):
        buffer.write(torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), step)
    assert [buffer.read().step for _ in slots] == slots
    assert (buffer.reads, buffer.not_newest) == (4, others)


def test_the_released_warm_up_is_repeated():
    turns = RepeatingTurns(2, length=4, epochs=9)
    drawn = [turns.draw() for _ in range(6)]
    turns.repeat_warm_up()
    drawn += [turns.draw() for _ in range(6)]
    assert drawn == 2 * [0, 0, 1, 1, 0, 1]
    assert (turns.warm_ups, turns.taken) == (1, 12)
