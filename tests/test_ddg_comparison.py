"""ResNets by back-propagation, DDG and DGL: the claims of the three scripts and of their network."""

import sys
import weakref

import pytest
import torch
from running import load_script
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from decoupled import InputError
from decoupled.data.datasets import load
from decoupled.training.run import Run

DGL, DDG, BACKPROP = (f"ddg_comparison/{name}.py" for name in ("cifar_dgl", "cifar_ddg", "cifar_backprop"))
resnet = load_script("ddg_comparison/cifar_resnet.py")
TOY = "--depth 8 --channels 2 --dataset digits --train-samples 90 --batch-size 50 --validation 10 --device cpu"
FLAGS = (*TOY.split(), "--epochs", 2)  # mini-batches of 50 and 40

# With fewer iterations in an epoch than K, the lowest modules of DDG take their first step after the first epoch, which
# PyTorch takes for a mistake.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@pytest.fixture
def train_small(run_script, tmp_path):
    """train_small(script, *flags): what the script leaves with FLAGS; ``to`` names its folder."""

    def run(script, *flags, to="logs"):
        return run_script(script, *FLAGS, *flags, folder=tmp_path / to)

    return run


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The network


def test_resnet_110_has_the_released_parameter_counts():
    net, whole = resnet.decoupled_resnet(110, 2, 10), resnet.chained_resnet(110, 1, 10)
    assert [count(module.body) for module in net] == [228_432, 1_498_880]
    assert count(net[1].auxiliary) == 650 and count(whole) == 228_432 + 1_498_880 + 650
    assert net[0].body(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 16, 16)
    assert len(resnet.pieces(8)) == 7 and [len(module.body) for module in net] == [29, 29]


def test_initialization():
    (body,), classifier = resnet.bodies_and_classifier(20, 1, 10)
    for layer in body.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == 64:
            assert layer.bias is None and layer.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
            assert abs(layer.weight.mean().item()) < 1e-3
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert classifier[1].weight.abs().max() <= 1 / 64**0.5  # PyTorch's default is uniform


def test_the_shortcut_takes_every_second_pixel_and_appends_zero_channels():
    block = resnet.Block(2, 4)
    torch.nn.init.zeros_(block.bn2.weight)  # the residual vanishes
    images = torch.randn(3, 2, 8, 8)
    out = block(images)
    assert torch.equal(out[:, :2], images[:, :, ::2, ::2].relu()) and not out[:, 2:].any()
    same = resnet.Block(2, 2)
    torch.nn.init.zeros_(same.bn2.weight)
    assert torch.equal(same(images), images.relu())


def test_every_split_is_the_same_network_from_the_same_start():
    images, outputs = torch.randn(2, 3, 32, 32), []
    for splits in range(1, 8):
        torch.manual_seed(5)
        chained = resnet.chained_resnet(8, splits, 10, width=2).eval()
        torch.manual_seed(5)
        decoupled = resnet.decoupled_resnet(8, splits, 10, width=2).eval()
        assert len(chained) == len(decoupled) == len(decoupled(images)) == splits
        outputs += [chained(images), decoupled(images)[-1]]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 111])
def test_a_depth_that_is_not_6n_2(depth):
    with pytest.raises(InputError, match=f"--depth {depth} "):
        resnet.pieces(depth)


# The algorithms


def assert_equal(left, right):
    """Same values in the same order, whatever their names."""
    assert len(left.weights) == len(right.weights)
    for (name, value), other in zip(left.weights.items(), right.weights.values(), strict=True):
        assert torch.equal(value, other), name


def test_one_module_of_ddg_and_of_dgl_is_back_propagation_bit_for_bit(train_small):
    flags = ("--seed", 3, "--milestones", 2)
    left = train_small(BACKPROP, *flags)
    for script in (DGL, DDG):
        other = train_small(script, *flags, "--splits", 1, to=script)
        assert_equal(left, other)
        assert other.lines == left.lines

    torch.manual_seed(3)
    net = resnet.chained_resnet(8, 1, 10, width=2).to(memory_format=torch.channels_last)
    train, _, _ = load("digits", batch_size=50, train_samples=90, validation=10, seed=3)
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    for _ in range(2):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.1  # epoch 2 is the milestone
    for name, value in net.state_dict().items():
        assert torch.equal(value, left.weights[name]), name


def delayed_gradients(net, batches, epochs, milestone):
    """DDG's equation with all gradients kept: w_k(t+1) = w_k(t) − lr·v_k, v_k ← 0.9 v_k + ∂f(x_s; w(s))/∂w_k + 5e-4
    w_k(t), s = t − (K−1−k).
    """
    weights = [list(module.parameters()) for module in net]
    velocities = [[torch.zeros_like(weight) for weight in own] for own in weights]
    gradients, rate = [], 0.01
    for epoch in range(1, epochs + 1):
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            gradients.append([torch.autograd.grad(loss, own, retain_graph=True) for own in weights])
            with torch.no_grad():
                for k, (own, velocity) in enumerate(zip(weights, velocities, strict=True)):
                    s = len(gradients) - 1 - (len(net) - 1 - k)
                    if s >= 0:
                        for w, v, gradient in zip(own, velocity, gradients[s][k], strict=True):
                            v.mul_(0.9).add_(gradient + 5e-4 * w)
                            w.sub_(rate * v)
        rate *= 0.1 if epoch == milestone else 1


@pytest.mark.parametrize("splits", [2, 3])
def test_ddg_is_its_equation(train_small, splits):
    left = train_small(DDG, "--splits", splits, "--epochs", 3, "--milestones", 3)
    torch.manual_seed(1)
    net = resnet.chained_resnet(8, splits, 10, width=2)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    train, _, _ = load("digits", batch_size=50, train_samples=90, validation=10, seed=1)
    delayed_gradients(net, train, epochs=3, milestone=2)
    for name, value in net.state_dict().items():
        moved = (value - start[name]).abs().max()
        assert moved > 0, name
        assert (left.weights[name] - value).abs().max() < 1e-3 * moved, name


def test_ddg_holds_the_mini_batches_it_needs_and_no_more(monkeypatch, tmp_path):
    """Module k: min(t, K−1−k) after t iterations, with their weights and graphs; its first step is in iteration K−k."""
    script = load_script(DDG)
    monkeypatch.setattr(sys, "argv", [DDG, *map(str, FLAGS), "--splits", "4", "--log-dir", str(tmp_path)])
    args = script.parse_args()
    run = Run(args)
    train, _, classes = run.data()
    net = run.prepare(script.build(args, classes)).train()
    optimizers = [SGD(module.parameters(), lr=0.1) for module in net]
    in_flight = [script.InFlight(run, net, k) for k in range(4)]
    sizes = []
    copies = [[] for _ in net]
    for images, labels in [*train, *train, *train]:
        sizes.append(len(images))
        t = len(sizes)
        representation = images
        for k, (module, optimizer) in enumerate(zip(net, optimizers, strict=True)):
            delay = 3 - k
            before = [weight.detach().clone() for weight in module.parameters()]
            representation = script.forward(in_flight[k], representation, labels)
            batches = in_flight[k].batches
            assert (len(batches) > delay) == (t > delay)
            if t > delay:
                gradient = script.delayed_step(in_flight[k], optimizer)
                assert (gradient is not None) == (k > 0)
                if k > 0:
                    in_flight[k - 1].gradient = gradient
            assert [len(batch.inputs) for batch in batches] == sizes[max(t - delay, 0) :]
            if delay:
                copies[k] += [weakref.ref(weight) for weight in batches[-1].weights.values()]
            assert sum(copy() is not None for copy in copies[k]) == len(batches) * len(before)
            moved = [not torch.equal(new, old) for new, old in zip(module.parameters(), before, strict=True)]
            assert any(moved) == (t > delay)
    assert sizes == [50, 40] * 3
    assert [len(state.state_dict()["batches"]) for state in in_flight] == [3, 2, 1, 0]


@pytest.mark.parametrize(("splits", "recomputed"), [(2, 3), (3, 7)])
def test_checkpointing_is_back_propagation_bit_for_bit(train_small, splits, recomputed):
    """Batch norm's statistics included, though the forward pass of the lower parts, with ``recomputed`` of the 7
    convolutions, runs twice.
    """
    passes = []

    def watch(module, inputs):
        if isinstance(module, nn.Conv2d) and module.training:
            passes.append(module)

    plain = train_small(BACKPROP)
    with register_module_forward_pre_hook(watch):
        left = train_small(BACKPROP, "--checkpointing", "--splits", splits, to="checkpointing")
    assert_equal(plain, left)
    assert len(passes) == 4 * (7 + recomputed)
    assert [line.split(", ", 1)[1] for line in left.lines] == [line.split(", ", 1)[1] for line in plain.lines]


def test_a_loss_that_is_not_finite_stops_ddg(train_small, capsys):
    with pytest.raises(SystemExit) as stop:
        train_small(DDG, "--lr", 1e38)
    assert stop.value.code == 2
    assert "module 2 became nan in epoch 1, batch 2" in capsys.readouterr().err


# The runs

METHODS = [(DGL, "--splits", 2), (DDG, "--splits", 3), (BACKPROP,), (BACKPROP, "--checkpointing")]


def tensors(tree):
    """The tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in branches for leaf in tensors(branch)]


@pytest.mark.parametrize(
    "method", [*METHODS, (DDG, "--splits", 4, "--half")], ids=lambda method: " ".join(map(str, method))
)
def test_a_resumed_run_ends_as_if_never_stopped(train_small, method):
    whole = train_small(*method, to="whole")
    train_small(*method, "--epochs", 1)
    left = train_small(*method, "--resume")
    assert "resumed after epoch 1" in left.log.read_text()
    assert left.lines == whole.lines
    mine, its = tensors(left.state), tensors(whole.state)
    assert len(mine) == len(its) and all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda method: method[0])
def test_learning_rate_sequence_with_momentum_kept(train_small, method):
    rates = {}  # of each optimizer
    before = {}  # of each optimizer's first weight: its value and momentum

    def prepare(optimizer, args, kwargs):
        weight = optimizer.param_groups[0]["params"][0]
        before[optimizer] = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()

    def check(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        weight = group["params"][0]
        value, velocity = before[optimizer]
        expected = 0.9 * velocity + weight.grad + 5e-4 * value
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected)
        assert not group["nesterov"]
        rates.setdefault(optimizer, []).append(group["lr"])

    with register_optimizer_step_pre_hook(prepare), register_optimizer_step_post_hook(check):
        train_small(*method, "--epochs", 4, "--milestones", 3, 4)
    assert len(rates) == (1 if method[0] == BACKPROP else method[-1])
    for steps in rates.values():
        late = 8 - len(steps)  # iterations without a step in DDG
        assert late < (3 if method[0] == DDG else 1)
        assert steps == pytest.approx(([0.01] * 4 + [0.001] * 2 + [0.0001] * 2)[late:])


@pytest.mark.parametrize("script", [DGL, DDG, BACKPROP])
def test_defaults_are_the_published_recipe(monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [script])
    args = load_script(script).parse_args()
    expected = {
        "depth": 110,
        "channels": 16,
        "epochs": 300,
        "batch_size": 128,
        "milestones": [150, 225],
        "seed": 1,
        "nesterov": False,
        "dataset": "cifar10",
    }
    assert {name: vars(args)[name] for name in expected} == expected
    assert args.splits == (1 if script == BACKPROP else 2)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (DGL, ("--depth", 9)),
        (DDG, ("--depth", 9)),
        (BACKPROP, ("--depth", 9)),
        (DGL, ("--splits", 8)),
        (DDG, ("--splits", 8)),
        (DDG, ("--splits", 7)),  # a module without weights
        (DDG, ("--splits", 0)),
        (DGL, ("--milestones", 0)),
        (DGL, ("--channels", 0)),
        (BACKPROP, ("--splits", 2)),
        (BACKPROP, ("--checkpointing", "--splits", 1)),
        (BACKPROP, ("--checkpointing", "--splits", 8)),
        (BACKPROP, ("--checkpointing", "--compile")),
    ],
)
def test_bad_flags(fails, script, flags):
    message = fails(script, *FLAGS, *flags)
    assert any(flag.strip("-") in message for flag in flags if isinstance(flag, str))


def test_a_checkpoint_of_another_number_of_splits_is_refused(train_small, fails):
    train_small(DDG, "--epochs", 1)
    assert "--splits" in fails(DDG, *FLAGS, "--splits", 3, "--resume")
