"""The steps that benchmarks measure are the scripts': they leave the same weights, to the bit."""

import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, load_script
from torch.nn import functional as F
from torch.optim import Adam

from decoupled.data.datasets import load

sys.path.insert(0, str(Path(ROOT / "benchmarks")))
from method_steps import (
    InFlight,
    ScaledOptimizer,
    autocast_on,
    backprop_step,
    ddg_step,
    dgl_step,
    dni_step,
    sequential_module_step,
    sgd,
)

SEED = 3
DATA = f"--dataset digits --train-samples 64 --validation 8 --batch-size 16 --epochs 1 --seed {SEED} --device cpu"


def scaled_sgd(args, module):
    return ScaledOptimizer(sgd(module, lr=args.lr, weight_decay=5e-4), args.half)


def learn_by_backprop(args, net, train, autocast):
    optimizer = scaled_sgd(args, net)
    for images, labels in train:
        backprop_step(net, optimizer, images, labels, autocast, args.checkpointing)


def learn_by_dgl(args, net, train, autocast):
    optimizers = [scaled_sgd(args, module) for module in net]
    for images, labels in train:
        dgl_step(net, optimizers, images, labels, autocast)


def learn_by_ddg(args, net, train, autocast):
    optimizers = [scaled_sgd(args, module) for module in net]
    queues = [InFlight(module, len(net), k) for k, module in enumerate(net)]
    for images, labels in train:
        ddg_step(queues, optimizers, images, labels, autocast)


def learn_sequentially(args, net, train, autocast):
    for module_index, module in enumerate(net):
        optimizer = scaled_sgd(args, module)
        for images, labels in train:
            sequential_module_step(net, module_index, optimizer, images, labels, autocast)


def learn_by_dni(args, net, train, autocast):
    optimizer = Adam(net.parameters(), lr=args.lr, fused=True)
    for images, labels in train:
        dni_step(net, optimizer, images, labels, autocast, F.one_hot(labels, 10).float())


@pytest.mark.parametrize(
    ("script", "flags", "learn"),
    [
        ("ddg_comparison/cifar_backprop.py", "--depth 8", learn_by_backprop),
        ("ddg_comparison/cifar_backprop.py", "--depth 8 --checkpointing --splits 2", learn_by_backprop),
        ("ddg_comparison/cifar_dgl.py", "--depth 8 --splits 2 --half", learn_by_dgl),
        ("ddg_comparison/cifar_ddg.py", "--depth 8 --splits 3", learn_by_ddg),
        ("learning_curves/cifar_sequential_greedy.py", "", learn_sequentially),
        ("dni/cifar_cnn_dni.py", "--channels 4 --dni --context", learn_by_dni),
    ],
)
def test_a_step_is_the_scripts(run_script, script, flags, learn):
    left = run_script(script, *DATA.split(), *flags.split())
    module = load_script(script)
    args = module.parse_args()  # of the same flags
    torch.manual_seed(args.seed)
    net = module.build(args, 10).to(memory_format=torch.channels_last).train()
    train, _, _ = load("digits", batch_size=16, train_samples=64, validation=8, seed=SEED)
    learn(args, net, train, autocast_on(torch.device("cpu"), args.half))
    assert len(train) == 4
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key
