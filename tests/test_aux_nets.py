"""The auxiliary-network experiment: the script as a user runs it."""

import sys

import pytest
import torch
from running import load_script
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from decoupled.data.datasets import load
from decoupled.logs import read_log
from decoupled.networks.layerwise import layerwise_cnn

SCRIPT = "aux_nets/cifar_dgl.py"
TOY = "--dataset digits --train-samples 100 --validation 20 --batch-size 50 --channels 4 --epochs 1 --device cpu"
SHORT = tuple(TOY.split())


@pytest.fixture
def watched():
    """A list of the optimizers in the order of their steps, each of which moves its own module's parameters and leaves
    all others, and their gradients, as they were after their own last step.
    """
    steps = []
    states = {}  # optimizer → [(parameter, its value and gradient after the last step)]

    def remember(optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states[optimizer] = [(p, p.detach().clone(), p.grad.clone()) for p in parameters]

    def check(optimizer, args, kwargs):
        for other, left in states.items():
            for parameter, value, gradient in left:
                moved = not torch.equal(parameter, value)
                assert moved == (other is optimizer)
                assert other is optimizer or torch.equal(parameter.grad, gradient)
        remember(optimizer)
        steps.append(optimizer)

    with register_optimizer_step_post_hook(check):
        yield steps


@pytest.mark.parametrize(
    ("type_aux", "block_size", "convs"),
    [
        ("mlp", 1, [1] * 6),
        ("mlp-sr", 1, [1] * 6),
        ("cnn", 1, [1] * 6),
        ("mlp", 4, [4, 2]),
        ("mlp-sr", 5, [5, 1]),
        ("cnn", 2, [2, 2, 2]),
    ],
)
def test_every_module_learns_from_its_own_loss_alone(run_script, watched, type_aux, block_size, convs):
    left = run_script(SCRIPT, *SHORT, "--type_aux", type_aux, "--block_size", block_size)
    expected = layerwise_cnn(channels=4, depth=6, auxiliary=type_aux, block_size=block_size)
    assert [sum(isinstance(layer, nn.Conv2d) for layer in module.body) for module in expected] == convs
    assert {key: value.shape for key, value in left.weights.items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert len(watched) == 2 * len(convs)  # mini-batches × modules
    assert watched[: len(convs)] == watched[len(convs) :] and len(set(watched)) == len(convs)
    frame = read_log(left.log)
    assert frame["n"].tolist() == list(range(1, len(convs) + 1))
    assert (frame.attrs["arguments"]["type_aux"], frame.attrs["arguments"]["block_size"]) == (type_aux, block_size)


def test_one_module_is_back_propagation_bit_for_bit(run_script):
    left = run_script(SCRIPT, *SHORT, "--epochs", 2, "--lr-step", 1, "--block_size", 6, "--seed", 3)
    torch.manual_seed(3)
    net = layerwise_cnn(channels=4, depth=6, block_size=6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    train, _, _ = load("digits", batch_size=50, train_samples=100, validation=20, seed=3)
    for rate in (0.1, 0.2 * 0.1):
        optimizer.param_groups[0]["lr"] = rate
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(net[0].auxiliary(net[0].body(images)), labels).backward()
            optimizer.step()
    assert len(left.lines) == 2
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


def test_default_run_is_the_published_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    args = load_script(SCRIPT).parse_args()
    published = {
        "type_aux": "mlp-sr",
        "block_size": 1,
        "channels": 128,
        "depth": 6,
        "lr_step": 15,
        "epochs": 50,
        "batch_size": 128,
        "seed": 1,
    }
    assert published.items() <= vars(args).items()


@pytest.mark.parametrize(
    "flags",
    [
        ("--type_aux", "vgg"),
        ("--block_size", 7),
        ("--block_size", 3, "--depth", 2),
        ("--block_size", 0),
        ("--lr-step", 0),
        ("--channels", "wide"),
    ],
)
def test_impossible_flags(fails, flags):
    assert flags[0].strip("-").replace("_", " ") in fails(SCRIPT, *SHORT, *flags).replace("_", " ")
