"""The four methods of the dni experiment, run as scripts on the embedded digits: what they compute, log and resume."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from running import ROOT, load_script, published_series
from simulated_cuda import simulated_cuda
from torch import nn
from torch.nn import functional as F

import dni
from decoupled.data.datasets import load
from decoupled.logs import read_log

DNI, DGL = "dni/cifar_cnn_dni.py", "dni/cifar_dgl.py"
METHODS = {"back-prop": (DNI,), "dni": (DNI, "--dni"), "cdni": (DNI, "--dni", "--context"), "dgl": (DGL,)}
TOY = "--dataset digits --train-samples 100 --validation 20 --batch-size 32 --channels 4 --device cpu --seed 3"
FLAGS = tuple(TOY.split())
FAST = ("--lr", 3e-3)  # a hundred times Adam's default: a few steps move the weights far
SIZES = {"batch_size": 32, "test_batch_size": 256, "train_samples": 100, "validation": 20, "seed": 3}

script, dgl, backbones = load_script(DNI), load_script(DGL), load_script("dni/dni_backbone.py")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The network


def test_parameter_counts():
    blocks, head = backbones.backbone(128, 10)
    assert [count(block) for block in blocks] == [9_984, 409_984, 409_984]
    assert count(head) == 1_290
    convolutions = 3 * (128 * 128 * 25 + 128) + 2 * 256
    assert count(backbones.ConvSynthesizer(128)) == convolutions == 1_229_696
    assert count(backbones.ConvSynthesizer(128, 10)) == convolutions + 1_408
    assert count(dgl.auxiliary(128, 10)) == convolutions + 1_290
    assert count(script.Network(128, 10)) == 831_242
    assert count(script.Network(128, 10, synthetic=True)) == 831_242 + 3 * convolutions
    assert count(script.Network(128, 10, synthetic=True, context=True)) == 831_242 + 3 * (convolutions + 1_408)


def test_batch_norm_weights_start_uniform_as_in_the_published_runs():
    blocks, _ = backbones.backbone(128, 10)
    for layer in [block[1] for block in blocks] + [
        layer for layer in backbones.ConvSynthesizer(128).modules() if isinstance(layer, nn.BatchNorm2d)
    ]:
        assert 0 <= layer.weight.min() < 0.1 and 0.9 < layer.weight.max() <= 1 and abs(layer.weight.mean() - 0.5) < 0.15


def test_sizes_and_layers():
    blocks, head = backbones.backbone(4, 10)
    representation, shapes = torch.randn(2, 3, 32, 32), []
    for block in blocks:
        assert [type(layer).__name__ for layer in block][:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
        representation = block(representation)
        shapes.append(tuple(representation.shape[1:]))
    assert shapes == [(4, 10, 10), (4, 3, 3), (4, 1, 1)]
    assert [type(block[3]).__name__ for block in blocks] == ["MaxPool2d", "AvgPool2d", "AvgPool2d"]
    assert head(representation).shape == (2, 10)


def test_the_synthesizer_starts_as_its_last_bias_and_adds_the_context_before_the_first_batch_norm():
    synthesizer = backbones.ConvSynthesizer(4, 3)
    trigger, context = torch.randn(5, 4, 6, 7), torch.eye(3)[[0, 1, 2, 0, 1]]
    assert torch.equal(synthesizer(trigger, context), synthesizer.layers[-1].bias[:, None, None].expand(5, 4, 6, 7))
    nn.init.normal_(synthesizer.layers[-1].weight)
    hidden = synthesizer.trigger(trigger) + synthesizer.context(context).reshape(5, 4, 1, 1)
    norm, _, conv, again, _, last = synthesizer.layers
    expected = last(again(conv(norm(hidden).relu())).relu())
    torch.testing.assert_close(synthesizer(trigger, context), expected)


def test_interfaces_follow_each_block_and_are_absent_from_back_propagation():
    kinds = [type(layer).__name__ for layer in script.Network(4, 10, synthetic=True)]
    assert kinds == ["Sequential", "BackwardInterface"] * 3 + ["Sequential"]
    assert [type(layer).__name__ for layer in script.Network(4, 10)] == ["Sequential"] * 4


def test_all_methods_start_from_the_same_backbone():
    """DGL too: the test that trains it by hand makes the backbone first."""
    starts = []
    for build in (
        lambda: list(script.Network(4, 10)),
        lambda: list(script.Network(4, 10, synthetic=True))[::2],
        lambda: list(script.Network(4, 10, synthetic=True, context=True))[::2],
        lambda: backbones.backbone(4, 10)[0],
    ):
        torch.manual_seed(3)
        starts.append([parameter for layer in build()[:3] for parameter in layer.parameters()])
    for others in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], others, strict=True))


# The methods, against training written without any of the scripts' code but the network's parts and the images


def steps(train, epochs):
    for _ in range(epochs):
        yield from train


def by_hand(context=None, epochs=2):
    """DNI as the paper has it, from autograd alone: the layers, in the order of the script's network, and each step's
    (loss, correct, samples).

    ``context``: None for back-propagation, else whether the synthesizers see the labels.
    """
    torch.manual_seed(3)
    blocks, head = backbones.backbone(4, 10)
    synthesizers = [] if context is None else [backbones.ConvSynthesizer(4, 10 if context else None) for _ in blocks]
    for module in (*blocks, head, *synthesizers):
        module.to(memory_format=torch.channels_last)
    layers = (
        [*blocks, head]
        if context is None
        else [layer for pair in zip(blocks, synthesizers, strict=True) for layer in pair] + [head]
    )
    optimizer = torch.optim.Adam(
        [parameter for layer in layers for parameter in layer.parameters()], lr=3e-3, fused=True
    )
    train, _, _ = load("digits", **SIZES)
    history = []
    for images, labels in steps(train, epochs):
        optimizer.zero_grad()
        representation, boundaries = images, []
        for index, block in enumerate(blocks):
            representation = block(representation)
            if context is not None:
                synthetic = synthesizers[index](
                    representation.detach(), F.one_hot(labels, 10).float() if context else None
                )
                torch.autograd.backward(representation, synthetic.detach())
                representation = representation.detach().clone().requires_grad_()
                boundaries.append((synthetic, representation))
        logits = head(representation)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        for synthetic, leaf in boundaries:
            synthetic.backward((synthetic.detach() - leaf.grad) * (2 / len(labels)))
        optimizer.step()
        history.append((loss.item(), (logits.argmax(1) == labels).sum().item(), len(labels)))
    return layers, history


@pytest.mark.parametrize(("method", "context"), [("back-prop", None), ("dni", False), ("cdni", True)])
def test_training_is_the_methods_and_the_log_has_real_accuracy_and_weighted_loss(run_script, method, context):
    """An interface's true gradient is what the next block's backward pass, from its own synthetic gradient, brings down
    (the head's, at the last).
    """
    left = run_script(*METHODS[method], *FLAGS, *FAST, "--epochs", 2)
    layers, history = by_hand(context)
    expected = [value for layer in layers for value in layer.state_dict().values()]
    for (key, found), want in zip(left.weights.items(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    frame = read_log(left.log)
    assert frame.n.tolist() == [3, 3] and frame.epoch.tolist() == [1, 2]
    for row, epoch in zip(frame.itertuples(), (history[:4], history[4:]), strict=True):
        losses, correct, sizes = zip(*epoch, strict=True)
        assert sizes == (32, 32, 32, 4)
        assert row.loss == pytest.approx(
            sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / 100, abs=2e-5
        )
        assert row.train_top1 == pytest.approx(sum(correct), abs=1e-3)


def test_dgl_is_each_module_trained_alone_on_what_the_one_below_hands_up(run_script):
    left = run_script(DGL, *FLAGS, *FAST, "--epochs", 2)
    torch.manual_seed(3)
    blocks, head = backbones.backbone(4, 10)
    modules = [nn.ModuleList([block, dgl.auxiliary(4, 10)]) for block in blocks[:2]] + [
        nn.ModuleList([blocks[2], head])
    ]
    modules = [module.to(memory_format=torch.channels_last) for module in modules]
    optimizers = [torch.optim.Adam(module.parameters(), lr=3e-3, fused=True) for module in modules]
    train, _, _ = load("digits", **SIZES)
    for images, labels in steps(train, 2):
        representation, losses = images, []
        for body, auxiliary in modules:
            representation = body(representation.detach())
            losses.append(F.cross_entropy(auxiliary(representation), labels))
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
    expected = [value for module in modules for value in module.state_dict().values()]
    for (key, found), want in zip(left.weights.items(), expected, strict=True):
        assert torch.equal(found, want), key
    frame = read_log(left.log)
    assert frame.n.tolist() == [1, 2, 3] * 2 and frame.epoch.tolist() == [1] * 3 + [2] * 3


class Oracle(nn.Module):
    """A synthesizer that knows the true gradient: it runs copies of the layers above and the loss of the labels in the
    context.
    """

    def __init__(self, above):
        super().__init__()
        self.above = [above]  # in a list: not this module's parameters

    def forward(self, trigger, context):
        leaf = trigger.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(copy.deepcopy(self.above[0])(leaf), context.argmax(1)), leaf)[0]


class WithOracles(nn.Sequential):
    def __init__(self, channels, classes, **_):
        blocks, head = backbones.backbone(channels, classes)
        layers = []
        for index, block in enumerate(blocks):
            layers += [block, dni.BackwardInterface(Oracle(nn.Sequential(*blocks[index + 1 :], head)))]
        super().__init__(*layers, head)


@pytest.mark.parametrize("optimizer", [FAST, ("--sgd",)])
def test_given_the_true_gradient_the_scripts_dni_is_its_back_propagation(run_script, tmp_path, optimizer):
    flags = (*FLAGS, *optimizer, "--epochs", 2)
    plain = run_script(DNI, *flags, folder=tmp_path / "plain")
    perfect = run_script(DNI, *flags, "--dni", "--context", folder=tmp_path / "oracle", Network=WithOracles)
    assert perfect.lines == plain.lines
    for want, found in zip(plain.weights.values(), perfect.weights.values(), strict=True):
        assert torch.equal(want, found)


def test_in_dni_no_block_learns_from_anything_but_its_synthesizer(run_script):
    """With synthesizers that give zero, the blocks stay as they were and only the head and the synthesizers move."""
    states = []

    class Silent(script.Network):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            for interface in list(self)[1::2]:
                nn.init.zeros_(interface.synthesizer.layers[-1].bias)
                interface.synthesizer.layers[-1].requires_grad_(False)
            states.append(copy.deepcopy(self.state_dict()))

    left = run_script(DNI, *FLAGS, *FAST, "--dni", "--epochs", 1, Network=Silent)
    moved = {
        key.split(".")[0]
        for key, value in left.weights.items()
        if "running" not in key and "num_" not in key and not torch.equal(value, states[0][key])
    }
    assert moved == {"6"}  # nothing reaches the synthesizers either, behind a last layer of zeros


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_resumed_runs_end_with_the_same_lines_and_weights(run_script, tmp_path, method):
    flags = (*METHODS[method], *FLAGS)
    whole = run_script(*flags, "--epochs", 2, folder=tmp_path / "whole")
    run_script(*flags, "--epochs", 1, folder=tmp_path / "parts")
    left = run_script(*flags, "--epochs", 2, "--resume", folder=tmp_path / "parts")
    assert left.lines == whole.lines and len(left.lines) == (6 if method == "dgl" else 2)
    for key, value in whole.weights.items():
        assert torch.equal(value, left.weights[key]), key
    frame = read_log(left.log)
    assert frame.attrs["arguments"]["channels"] == 4 and frame.attrs["arguments"]["batch_size"] == 32
    assert frame.train_top1.between(0, 100).all() and frame.loss.between(0.5, 5).all()
    assert published_series(left.log) == {(3, 1), (3, 2)}  # in DGL's logs too the last head only


def test_a_run_of_one_method_is_not_resumed_as_another(run_script, fails):
    run_script(DNI, *FLAGS, "--epochs", 1)
    assert "--dni" in fails(DNI, *FLAGS, "--epochs", 2, "--dni", "--resume")


@pytest.mark.parametrize(("path", "epochs"), [(DNI, 2000), (DGL, 1500)])
def test_defaults_are_the_published_ones(monkeypatch, path, epochs):
    monkeypatch.setattr(sys, "argv", [path])
    args = load_script(path).parse_args()
    assert (args.epochs, args.batch_size, args.test_batch_size, args.seed) == (epochs, 256, 256, 1)
    assert (args.channels, args.log_interval, args.dataset, args.half) == (128, 10, "cifar10", False)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ((DNI,), {"lr": 3e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
        ((DGL,), {"lr": 3e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
        ((DNI, "--sgd"), {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5, "dampening": 0, "nesterov": False}),
    ],
)
def test_optimizers_have_the_released_settings_to_the_end(run_script, command, settings):
    optimizers = run_script(*command, *FLAGS, "--epochs", 2).state["optimizers"]
    assert len(optimizers) == (3 if command == (DGL,) else 1)
    for optimizer in optimizers:
        (group,) = optimizer["param_groups"]
        assert {name: group[name] for name in settings} == settings


@pytest.mark.parametrize("method", METHODS)
def test_half_runs_on_the_cpu(run_script, method):
    left = run_script(*METHODS[method], *FLAGS, "--epochs", 1, "--half")
    assert read_log(left.log).loss.between(1.5, 4).all()


def test_half_is_refused_on_cuda(fails):
    with simulated_cuda():
        assert "--half" in fails(DNI, *FLAGS, "--device", "cuda", "--half")


def test_context_without_dni_is_refused(fails):
    assert "--dni" in fails(DNI, "--context")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(run_script, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_script(DNI, *FLAGS, "--dni", "--sgd", "--lr", 1e38, "--epochs", 3)
    assert stop.value.code == 2
    assert "module 3 became nan in epoch 1, batch 2" in capsys.readouterr().err
    assert len(list((tmp_path / "logs").glob("*.pt"))) == 1


@pytest.mark.parametrize("path", [DNI, DGL])
def test_log_interval(run_script, capsys, path):
    run_script(path, *FLAGS, "--epochs", 1, "--log-interval", 2)
    printed = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert [line.split(", loss")[0] for line in printed] == ["epoch 1, batch 2 of 4", "epoch 1, batch 4 of 4"]


def test_no_file_beside_the_script_shadows_a_package(tmp_path):
    """In a process of its own and from another folder, as users start it."""
    command = [sys.executable, ROOT / DNI, "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
