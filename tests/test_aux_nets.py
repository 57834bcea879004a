"""The auxiliary-network experiment: the script as a user runs it."""

import sys

import pytest
import torch
from running import load_script
from torch import nn
from torch.nn import functional as F

from decoupled.data.datasets import load
from decoupled.logs import read_log
from decoupled.networks.evaluation import evaluate
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import run as runs

SCRIPT = "aux_nets/cifar_dgl.py"
SHORT = (
    "--dataset",
    "digits",
    "--train-samples",
    100,
    "--batch-size",
    50,
    "--channels",
    4,
    "--epochs",
    1,
    "--device",
    "cpu",
)


def few_images(net, batches, heads=None):
    """Evaluation on a few images: the test is about training."""
    images, labels = next(iter(batches))
    return evaluate(net, [(images[:20], labels[:20])], heads)


class Watched(runs.Run):
    """Checks that every step moves its own module's parameters and no others, whose gradients stay as they were."""

    def epochs(self, **state):
        self.net, self.taken = state["net"].net, 0
        Watched.last = self
        return super().epochs(**state)

    def step(self, loss, optimizer):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = [
            (id(p) in mine, p, None if p.grad is None else p.grad.clone(), p.detach().clone())
            for p in self.net.parameters()
        ]
        super().step(loss, optimizer)
        for own, parameter, grad, value in parts:
            assert torch.equal(parameter, value) != own
            assert own or (parameter.grad is None if grad is None else torch.equal(parameter.grad, grad))
        self.taken += 1


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
def test_every_module_learns_from_its_own_loss_alone(run_script, type_aux, block_size, convs):
    names = {"Run": Watched, "evaluate": few_images}
    left = run_script(SCRIPT, *SHORT, "--type_aux", type_aux, "--block_size", block_size, **names)
    net = Watched.last.net
    assert [
        sum(isinstance(layer, nn.Conv2d) for layer in module.body) for module in net
    ] == convs  # a remainder is a last, shorter module
    expected = layerwise_cnn(channels=4, depth=6, auxiliary=type_aux, block_size=block_size)
    assert {key: value.shape for key, value in left.weights.items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert Watched.last.taken == 2 * len(convs)  # batches × modules
    frame = read_log(left.log)
    assert frame["n"].tolist() == list(range(1, len(convs) + 1))
    assert (frame.attrs["arguments"]["type_aux"], frame.attrs["arguments"]["block_size"]) == (type_aux, block_size)


def test_one_module_is_back_propagation_bit_for_bit(run_script):
    left = run_script(
        SCRIPT, *SHORT, "--epochs", 2, "--lr-step", 1, "--block_size", 6, "--seed", 3, evaluate=few_images
    )
    torch.manual_seed(3)
    net = layerwise_cnn(channels=4, depth=6, block_size=6).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    train, _, _ = load("digits", batch_size=50, train_samples=100, seed=3)
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
    ("flags", "message"),
    [
        (("--type_aux", "vgg"), "argument --type_aux: invalid choice: 'vgg'"),
        (("--block_size", 7), "block size 7 is impossible: the network has 6 layers, so choose from 1 to 6"),
        (("--block_size", 3, "--depth", 2), "block size 3 is impossible"),
        (("--block_size", 0), "argument --block_size: '0' must be an integer ≥ 1"),
        (("--lr-step", 0), "argument --lr-step"),
        (("--channels", "wide"), "argument --channels"),
    ],
)
def test_impossible_flags(fails, flags, message):
    assert message in fails(SCRIPT, *SHORT, *flags)
