"""The dni library against hand-derived gradients, in float64, and against back-propagation."""

import copy
import gc
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni

README = (Path(dni.__file__).parent / "README.md").read_text()


class Synthesizer(nn.Module):
    """A synthesizer that counts its runs: convolution or linear layers and, where there is a context, a linear layer of
    it.
    """

    def __init__(self, features, output=None, convolutional=False):
        super().__init__()
        output = features if output is None else output
        layer = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if convolutional else nn.Linear
        self.layers = nn.Sequential(layer(features, 6), nn.Tanh(), layer(6, output))
        self.labels = nn.Linear(3, output)
        self.runs = 0

    def forward(self, trigger, context):
        self.runs += 1
        output = self.layers(trigger)
        if context is not None:
            labels = self.labels(context)
            output = output + labels.reshape(*labels.shape, *[1] * (output.dim() - 2))
        return output


def parts(convolutional=False):
    """(lower, synthesizer, upper, input, target), of 4 samples and 5 channels at the interface, in float64."""
    if convolutional:
        lower = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh())
        upper = nn.Sequential(nn.Conv2d(5, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 2 * 4, 3))
        inputs = torch.randn(4, 2, 4, 6)
    else:
        lower, upper, inputs = (
            nn.Sequential(nn.Linear(3, 5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
            torch.randn(4, 3),
        )
    synthesizer = Synthesizer(5, convolutional=convolutional)
    return lower.double(), synthesizer.double(), upper.double(), inputs.double(), torch.tensor([0, 2, 1, 2])


CONTEXTS = [None, torch.eye(3, dtype=torch.float64)[[0, 2, 1, 2]]]


def gradients(*modules):
    return [parameter.grad for module in modules for parameter in module.parameters()]


def assert_gradients(module, expected):
    """Parameters without a gradient count as zero: a synthesizer's layer of the context is unused without one."""
    found = gradients(module)
    assert len(found) == len(expected)
    for parameter, got, want in zip(module.parameters(), found, expected, strict=True):
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(zero if got is None else got, zero if want is None else want, rtol=1e-12, atol=1e-14)


def grad(output, module, by):
    return torch.autograd.grad(output, list(module.parameters()), by, retain_graph=True, allow_unused=True)


def clear(*modules):
    for module in modules:
        module.zero_grad()
        for part in module.modules():
            if isinstance(part, Synthesizer):
                part.runs = 0


# BackwardInterface


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_backward_interface_gives_every_part_its_hand_derived_gradient(convolutional, context):
    lower, synthesizer, upper, inputs, target = parts(convolutional)
    trigger = lower(inputs)
    leaf = trigger.detach().requires_grad_()
    loss = F.cross_entropy(upper(leaf), target)
    true = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    synthetic = synthesizer(trigger.detach(), context)
    expected_lower = grad(trigger, lower, synthetic.detach())
    expected_synthesizer = grad(synthetic, synthesizer, 2 / 4 * (synthetic.detach() - true))
    expected_upper = grad(loss, upper, None)
    clear(synthesizer)

    interface = dni.BackwardInterface(synthesizer)
    with dni.synthesizer_context(context):
        passed = interface(lower(inputs))
        assert_gradients(lower, expected_lower)  # before the loss exists
        assert all(gradient is None for gradient in gradients(synthesizer, upper))
        assert torch.equal(passed, trigger)
        F.cross_entropy(upper(passed), target).backward()
    assert_gradients(lower, expected_lower)  # the true gradient stopped at the interface
    assert_gradients(synthesizer, expected_synthesizer)
    assert_gradients(upper, expected_upper)
    assert synthesizer.runs == 1


def test_one_number_worked_out_on_paper():
    """Batch of 2, trigger 3x = (3, 6), s = 0.5·trigger = (1.5, 3), loss = Σ 4·trigger: g = 4; weight below: Σ s·x =
    7.5; the synthesizer's: Σ 2/2·(s − g)·trigger = −2.5·3 − 1·6 = −13.5.
    """
    below, synthesizer = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(below.weight, 3)
    nn.init.constant_(synthesizer.weight, 0.5)
    interface = dni.BackwardInterface(lambda trigger, context: synthesizer(trigger))
    (4 * interface(below(torch.tensor([[1.0], [2.0]])))).sum().backward()
    assert below.weight.grad.item() == 7.5
    assert synthesizer.weight.grad.item() == -13.5


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (7, 3), (5, 3, 4, 2)])
def test_the_synthesizers_gradient_is_that_of_the_squared_error_averaged_over_samples_only(shape):
    output = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    true = torch.randn(shape, dtype=torch.float64)
    interface = dni.BackwardInterface(lambda trigger, context: output)
    interface.make_trigger(torch.zeros(shape, dtype=torch.float64)).backward(true)
    (expected,) = torch.autograd.grad((output - true).square().sum() / shape[0], output)
    torch.testing.assert_close(output.grad, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(output.grad, 2 / shape[0] * (output.detach() - true), rtol=1e-14, atol=0)


def test_the_true_gradient_is_the_sum_over_all_uses_of_the_trigger():
    output = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    trigger = dni.BackwardInterface(lambda trigger, context: output)(torch.ones(2, 3, dtype=torch.float64))
    ((2 * trigger).sum() + (trigger**2).sum() + trigger[:, 0].sum()).backward()
    torch.testing.assert_close(output.grad, -torch.tensor([[5.0, 4, 4]] * 2, dtype=torch.float64))


def test_make_trigger_lets_the_true_gradient_through_and_the_synthesizer_teaches_nobody():
    lower, synthesizer, upper, inputs, target = parts()
    F.cross_entropy(upper(lower(inputs)), target).backward()
    expected = [gradient.clone() for gradient in gradients(lower, upper)]
    clear(lower, upper)
    passed = dni.BackwardInterface(synthesizer).make_trigger(lower(inputs))
    F.cross_entropy(upper(passed), target).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(lower, upper), expected, strict=True))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients(synthesizer.layers))
    assert synthesizer.runs == 1


@pytest.mark.parametrize("factor", [1, 0.1, -2.0, 0])
def test_backward_scales_the_synthetic_gradient(factor):
    lower, synthesizer, _, inputs, _ = parts()
    trigger = lower(inputs)
    expected = grad(trigger, lower, factor * synthesizer(trigger, None).detach())
    clear(synthesizer)
    dni.BackwardInterface(synthesizer).backward(trigger, factor=factor)
    assert_gradients(lower, expected)
    assert synthesizer.runs == 1 and all(gradient is None for gradient in gradients(synthesizer))


def test_a_synthesizer_learns_the_true_gradient():
    """loss ½‖h − y‖²/B has the gradient (h − y)/B: a linear synthesizer that sees y finds it."""
    lower = nn.Linear(3, 2).requires_grad_(False)
    synthesizer = dni.BasicSynthesizer(2, context_dim=2)
    interface = dni.BackwardInterface(synthesizer)
    optimizer = torch.optim.SGD(interface.parameters(), lr=0.2)
    for _ in range(300):
        inputs, target = torch.randn(16, 3), torch.randn(16, 2)
        optimizer.zero_grad()
        with dni.synthesizer_context(target):
            (0.5 * (interface(lower(inputs)) - target).square().sum() / 16).backward()
        optimizer.step()
    trigger = lower(inputs)
    torch.testing.assert_close(synthesizer(trigger, target), (trigger - target) / 16, rtol=0, atol=1e-4)


def test_a_trigger_with_nothing_below_to_teach_still_trains_the_synthesizer():
    lower, synthesizer, upper, inputs, _ = parts()
    lower.requires_grad_(False)
    interface = dni.BackwardInterface(synthesizer)
    interface.backward(lower(inputs))  # no error
    upper(interface(lower(inputs))).sum().backward()
    assert all(gradient is None for gradient in gradients(lower))
    assert all(gradient is not None for gradient in gradients(synthesizer.layers))


def test_a_leaf_trigger_and_its_synthetic_gradient_do_not_share_memory():
    leaf = torch.randn(2, 3, requires_grad=True)
    output = torch.randn(2, 3, requires_grad=True)
    interface = dni.BackwardInterface(lambda trigger, context: output)
    passed = interface(leaf)
    assert torch.equal(leaf.grad, output)
    leaf.grad.zero_()
    passed.sum().backward()
    torch.testing.assert_close(output.grad, output.detach() - 1)


def test_layers_around_an_interface_may_work_in_place():
    def build(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 5),
            nn.ReLU(inplace),
            dni.BackwardInterface(Synthesizer(5)),
            nn.LeakyReLU(0.1, inplace),
            nn.Linear(5, 3),
        ).double()

    for deferred in (False, True):
        nets = build(False), build(True)
        for net in nets:
            inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
            if deferred:
                with dni.defer_backward():
                    dni.backward(net(inputs).square().sum())
            else:
                net(inputs).square().sum().backward()
        for a, b in zip(gradients(nets[0]), gradients(nets[1]), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


# UnidirectionalInterface


@pytest.mark.parametrize("interface", [dni.UnidirectionalInterface, dni.ForwardInterface, dni.BackwardInterface])
def test_every_unidirectional_interface_receives_and_sends(interface):
    lower, _, _, inputs, _ = parts()
    synthesizer = Synthesizer(3, output=5).double()
    interface = interface(synthesizer)
    assert isinstance(interface, dni.UnidirectionalInterface)
    message, trigger, context = lower(inputs), inputs.clone().requires_grad_(), CONTEXTS[1]
    synthetic = synthesizer(inputs, context)
    expected = grad((synthetic - message.detach()).square().sum() / message.numel(), synthesizer, None)
    with dni.synthesizer_context(context):
        received = interface.receive(trigger)
        assert torch.equal(received, synthetic) and not received.requires_grad
        with dni.defer_backward():
            interface.send(message, trigger)
            assert all(gradient is None for gradient in gradients(synthesizer))
        assert_gradients(synthesizer, expected)
        assert trigger.grad is None and all(gradient is None for gradient in gradients(lower))
        clear(synthesizer)
        interface.eval().send(message, trigger)
        assert all(gradient is None for gradient in gradients(synthesizer))
        assert torch.equal(interface.receive(trigger), synthetic)


# ForwardInterface and BidirectionalInterface


def test_forward_interface_regresses_onto_the_detached_message():
    lower, _, upper, inputs, target = parts()
    synthesizer = Synthesizer(3, output=5).double()
    interface = dni.ForwardInterface(synthesizer)
    message = lower(inputs)
    synthetic = synthesizer(inputs, None)
    expected = grad((synthetic - message.detach()).square().sum() / message.numel(), synthesizer, None)
    clear(synthesizer)

    trigger = inputs.clone().requires_grad_()
    received = interface(message, trigger)
    assert synthesizer.runs == 1
    assert torch.equal(received, synthetic) and not received.requires_grad
    assert_gradients(synthesizer, expected)
    assert trigger.grad is None and all(gradient is None for gradient in gradients(lower))

    clear(synthesizer)
    interface.send(message, trigger)
    assert_gradients(synthesizer, expected)
    assert synthesizer.runs == 1
    F.cross_entropy(upper(interface.receive(trigger)), target).backward()
    assert synthesizer.runs == 2
    assert_gradients(synthesizer, expected)  # the loss above does not reach it
    assert trigger.grad is None and all(gradient is None for gradient in gradients(lower))


@pytest.mark.parametrize("separately", [False, True])
def test_bidirectional_interface_gives_every_part_its_hand_derived_gradient(separately):
    lower, backward_synthesizer, upper, inputs, target = parts()
    forward_synthesizer = Synthesizer(3, output=5).double()
    context = CONTEXTS[1]
    message = lower(inputs)
    received = forward_synthesizer(inputs, context)
    leaf = received.detach().requires_grad_()
    loss = F.cross_entropy(upper(leaf), target)
    true = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    synthetic = backward_synthesizer(leaf.detach(), context)
    expected = [
        grad(message, lower, backward_synthesizer(message.detach(), context).detach()),
        grad((received - message.detach()).square().mean(), forward_synthesizer, None),
        grad(synthetic, backward_synthesizer, 2 / 4 * (synthetic.detach() - true)),
        grad(loss, upper, None),
    ]
    clear(forward_synthesizer, backward_synthesizer)

    interface = dni.BidirectionalInterface(forward_synthesizer, backward_synthesizer)
    with dni.synthesizer_context(context):
        if separately:  # the upper part first
            F.cross_entropy(upper(interface.receive(inputs)), target).backward()
            interface.send(lower(inputs), inputs)
        else:
            F.cross_entropy(upper(interface(lower(inputs), inputs)), target).backward()
    for module, gradient in zip((lower, forward_synthesizer, backward_synthesizer, upper), expected, strict=True):
        assert_gradients(module, gradient)
    assert (forward_synthesizer.runs, backward_synthesizer.runs) == ((2 if separately else 1), 2)


# Modes


def test_eval_mode_is_the_identity():
    lower, synthesizer, upper, inputs, target = parts()
    backward, forward = dni.BackwardInterface(synthesizer).eval(), dni.ForwardInterface(synthesizer).eval()
    both = dni.BidirectionalInterface(synthesizer, synthesizer).eval()
    trigger = lower(inputs)
    assert backward(trigger) is trigger
    assert backward.make_trigger(trigger) is trigger
    backward.backward(trigger)
    assert forward(trigger, trigger) is trigger
    forward.send(trigger, trigger)
    assert both(trigger, trigger) is trigger
    both.send(trigger, trigger)
    assert synthesizer.runs == 0
    assert all(gradient is None for gradient in gradients(lower, synthesizer))
    F.cross_entropy(upper(backward(trigger)), target).backward()  # and back-propagation passes
    assert all(gradient is not None for gradient in gradients(lower))
    assert torch.equal(both.receive(trigger), synthesizer(trigger, None))  # receiving synthesizes in whatever mode


def test_without_gradients_interfaces_are_the_identity_in_training_mode_too():
    lower, synthesizer, _, inputs, _ = parts()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            trigger = lower(inputs)
            assert dni.BackwardInterface(synthesizer)(trigger) is trigger
            assert dni.ForwardInterface(synthesizer)(trigger, trigger) is trigger
            assert dni.BidirectionalInterface(synthesizer, synthesizer)(trigger, trigger) is trigger
    assert synthesizer.runs == 0


# Contexts


def seen():
    """A synthesizer's view of the context."""
    contexts = []
    dni.ForwardInterface(lambda trigger, context: contexts.append(context) or trigger).receive(torch.zeros(1))
    return contexts[0]


def test_contexts_nest():
    assert seen() is None
    with dni.synthesizer_context("outer"):
        assert seen() == "outer"
        with dni.synthesizer_context("inner"):
            assert seen() == "inner"
            with dni.synthesizer_context(None):
                assert seen() is None
            assert seen() == "inner"
        assert seen() == "outer"
    assert seen() is None


def test_contexts_end_with_an_exception():
    with dni.synthesizer_context("outer"):
        with pytest.raises(ZeroDivisionError), dni.synthesizer_context("middle"), dni.synthesizer_context("inner"):
            raise ZeroDivisionError
        assert seen() == "outer"
    with pytest.raises(ZeroDivisionError), dni.synthesizer_context("outer"):
        raise ZeroDivisionError
    assert seen() is None


def test_the_context_reaches_every_synthesizer():
    backward, forward = Synthesizer(5), Synthesizer(5)
    message = torch.randn(4, 5, requires_grad=True)
    with dni.synthesizer_context(torch.eye(3)[[0, 2, 1, 2]]):
        dni.BidirectionalInterface(forward, backward)(message, message).sum().backward()
    assert all(synthesizer.labels.weight.grad.abs().sum() > 0 for synthesizer in (backward, forward))


# dni.backward and deferral


def test_backward_propagates_ones_or_the_gradient_given():
    leaf = torch.randn(2, 3, requires_grad=True)
    dni.backward(3 * leaf)
    assert torch.equal(leaf.grad, torch.full((2, 3), 3.0))
    dni.backward((2 * leaf).sum())
    assert torch.equal(leaf.grad, torch.full((2, 3), 5.0))
    gradient = torch.randn(2, 3)
    leaf.grad = None
    dni.backward(2 * leaf, gradient)
    assert torch.equal(leaf.grad, 2 * gradient)


def test_deferral_waits_for_the_end_and_shares_one_graph():
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    hidden = weight.tanh()
    gradient, again = torch.randn(2, 3, dtype=torch.float64)
    with dni.defer_backward():
        dni.backward(hidden.exp().sum())
        dni.backward(hidden, gradient)
        dni.backward(hidden, again)  # the same tensor twice
        assert weight.grad is None
    expected = (1 - weight.tanh() ** 2) * (weight.tanh().exp() + gradient + again)
    torch.testing.assert_close(weight.grad, expected.detach(), rtol=1e-14, atol=0)
    dni.backward(weight.sum())  # at once again
    torch.testing.assert_close(weight.grad, expected.detach() + 1, rtol=1e-14, atol=0)


def test_deferral_is_needed_for_one_graph():
    """What the test above shows cannot be had by two calls in a row; else nothing would test deferral."""
    hidden = torch.randn(3, requires_grad=True).tanh()
    dni.backward(hidden.sum())
    with pytest.raises(RuntimeError, match="second time"):
        dni.backward(hidden)


def test_deferred_interfaces_give_the_same_gradients():
    results = []
    for deferred in (False, True):
        torch.manual_seed(0)
        lower, synthesizer, upper, inputs, target = parts()
        interface = dni.BackwardInterface(synthesizer)
        if deferred:
            with dni.defer_backward():
                dni.backward(F.cross_entropy(upper(interface(lower(inputs))), target))
                assert all(gradient is None for gradient in gradients(lower, synthesizer, upper))
        else:
            F.cross_entropy(upper(interface(lower(inputs))), target).backward()
        results.append(gradients(lower, synthesizer.layers, upper))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nested_deferral_is_an_error_and_leaves_the_outer_block_whole():
    leaf = torch.randn(3, requires_grad=True)
    with dni.defer_backward():
        dni.backward(leaf.sum())
        with pytest.raises(RuntimeError, match="nested"), dni.defer_backward():
            pass
        dni.backward(leaf.sum())
        assert leaf.grad is None
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))


def test_an_exception_drops_what_was_deferred():
    leaf = torch.randn(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), dni.defer_backward():
        dni.backward(leaf.sum())
        raise ZeroDivisionError
    assert leaf.grad is None
    with dni.defer_backward():  # the next block starts empty
        dni.backward(2 * leaf)
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
    with dni.defer_backward():  # nothing to do is no error
        pass


def test_deferral_ends_also_when_its_backward_pass_fails():
    hidden = torch.randn(3, requires_grad=True).tanh()
    hidden.sum().backward()
    with pytest.raises(RuntimeError, match="second time"), dni.defer_backward():
        dni.backward(hidden)
    leaf = torch.randn(3, requires_grad=True)
    dni.backward(leaf)
    assert torch.equal(leaf.grad, torch.ones(3))


# Recurrent use


class Queue(nn.Module):
    """A perfect synthesizer: gives the true gradients it was told, in order, through a parameter that shows what it
    would have to learn.
    """

    def __init__(self, true):
        super().__init__()
        self.true = list(true)
        self.error = nn.Parameter(torch.zeros_like(self.true[0]))

    def forward(self, trigger, context):
        return self.true.pop(0) + self.error


def recurrent():
    cell, readout = nn.RNNCell(2, 5).double(), nn.Linear(5, 1).double()
    return cell, readout, torch.randn(12, 4, 2).double(), torch.randn(12, 4, 1).double()


def unrolled(cell, readout, hidden, inputs, targets):
    """Hidden states and summed loss."""
    states, loss = [hidden], 0
    for x, y in zip(inputs, targets, strict=True):
        states.append(cell(x, states[-1]))
        loss = loss + F.mse_loss(readout(states[-1]), y)
    return states, loss


@pytest.mark.parametrize("segment", [1, 3, 4, 12])
def test_truncated_segments_equal_full_back_propagation_when_the_synthesizer_is_perfect(segment):
    cell, readout, inputs, targets = recurrent()
    states, loss = unrolled(cell, readout, torch.zeros(4, 5).double().requires_grad_(), inputs, targets)
    expected = torch.autograd.grad(loss, [*cell.parameters(), *readout.parameters()], retain_graph=True)
    order = list(torch.autograd.grad(loss, states[:1], retain_graph=True))  # for make_trigger of the first segment
    for boundary in range(segment, 12, segment):
        leaf = states[boundary].detach().requires_grad_()
        later = unrolled(cell, readout, leaf, inputs[boundary:], targets[boundary:])[1]
        order += 2 * torch.autograd.grad(
            later, [leaf]
        )  # for backward of the segment that ends here, and make_trigger of the one that begins
    synthesizer = Queue(order)
    interface = dni.BackwardInterface(synthesizer)
    hidden = torch.zeros(4, 5).double()
    for start in range(0, 12, segment):
        with dni.defer_backward():
            hidden = interface.make_trigger(hidden.detach())
            states, loss = unrolled(
                cell, readout, hidden, inputs[start : start + segment], targets[start : start + segment]
            )
            hidden = states[-1]
            dni.backward(loss)
            if start + segment < 12:
                interface.backward(hidden)
    assert not synthesizer.true
    for parameter, gradient in zip([*cell.parameters(), *readout.parameters()], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)
    # The true gradients that came back to the segments' first states were those the synthesizer gave: nothing is left
    # to learn.
    torch.testing.assert_close(synthesizer.error.grad, torch.zeros(4, 5).double(), rtol=0, atol=1e-14)


def test_an_attached_first_state_gets_the_true_gradient():
    cell, readout, inputs, targets = recurrent()
    first = torch.randn(4, 5).double().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(cell, readout, first, inputs, targets)[1], first)
    with dni.defer_backward():
        dni.backward(
            unrolled(
                cell, readout, dni.BackwardInterface(Synthesizer(5).double()).make_trigger(first), inputs, targets
            )[1]
        )
    torch.testing.assert_close(first.grad, expected, rtol=1e-12, atol=0)


# The oracle


class Oracle(nn.Module):
    """A synthesizer that knows the true gradient: it runs the layers above, on copies, and the loss of the labels it
    gets as context.
    """

    def __init__(self, above):
        super().__init__()
        self.above = [above]  # in a list: not this module's parameters

    def forward(self, trigger, context):
        above = copy.deepcopy(self.above[0])
        leaf = trigger.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(above(leaf), context), leaf)[0]


def network():
    layers = [
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 6), nn.BatchNorm1d(6), nn.Tanh()),
        nn.Linear(6, 3),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3), lambda p: torch.optim.Adam(p, lr=0.01)],
)
def test_with_an_oracle_training_is_back_propagation_step_by_step(optimizer):
    plain = network()
    decoupled = copy.deepcopy(plain)
    layers = [*decoupled[:1], dni.BackwardInterface(Oracle(decoupled[1:]))]
    layers += [
        *decoupled[1:2],
        dni.BackwardInterface(Oracle(decoupled[2:])),
        *decoupled[2:3],
        dni.BackwardInterface(Oracle(decoupled[3:])),
        decoupled[3],
    ]
    unlocked = nn.Sequential(*layers)
    optimizers = optimizer(plain.parameters()), optimizer(unlocked.parameters())
    for step in range(6):
        inputs, labels = torch.randn(8, 2, 6, 6).double(), torch.randint(3, (8,))
        optimizers[0].zero_grad()
        F.cross_entropy(plain(inputs), labels).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        with dni.synthesizer_context(labels):
            loss = F.cross_entropy(unlocked(inputs), labels)
        loss.backward()
        optimizers[1].step()
        for (name, a), b in zip(plain.state_dict().items(), decoupled.state_dict().values(), strict=True):
            assert torch.equal(a, b), (step, name)


# Around training: memory, precision, accumulation, threads, copies, compilation


def resident():
    """This process's memory in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_does_not_grow():
    """Each step's activations are 256 KiB: any one kept from each would be 50 MiB in the end."""
    interface = dni.BackwardInterface(dni.BasicSynthesizer(256))
    both = dni.BidirectionalInterface(dni.BasicSynthesizer(256, trigger_dim=64), dni.BasicSynthesizer(256))
    lower, upper, inputs = nn.Linear(64, 256), nn.Linear(256, 1), torch.randn(256, 64)
    tensors, memory = [], []
    for step in range(250):
        for module in (interface, both, lower, upper):
            module.zero_grad()
        with dni.defer_backward() if step % 2 else dni.synthesizer_context(inputs):
            message = interface(lower(inputs)) if step % 4 < 2 else both(lower(inputs), inputs)
            dni.backward(upper(message).mean())
        if step in (50, 249):
            gc.collect()
            tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            memory.append(resident() if sys.platform == "linux" else 0)
    assert tensors[1] <= tensors[0] + 5, tensors
    assert memory[1] - memory[0] < 25, memory


def test_under_autocast_gradients_are_those_of_a_backward_pass_outside_it():
    class Precise(nn.Linear):
        """A layer that opts out of autocast: its backward pass would be cast if autocast were still on."""

        def forward(self, inputs):
            with torch.autocast("cpu", enabled=False):
                return super().forward(inputs.float())

    lower, upper = nn.Sequential(Precise(8, 8), nn.Linear(8, 8)), nn.Linear(8, 3)
    inputs, synthesizer = torch.randn(16, 8), Synthesizer(8)
    with torch.autocast("cpu", torch.bfloat16):
        trigger = lower(inputs)
        leaf = trigger.detach().requires_grad_()
        loss = upper(leaf).float().square().mean()
        synthetic = synthesizer(trigger.detach(), None)
    assert trigger.dtype == synthetic.dtype == torch.bfloat16
    true = torch.autograd.grad(loss, leaf)[0]
    expected = (
        grad(trigger, lower, synthetic.detach()),
        grad(synthetic, synthesizer, 2 / 16 * (synthetic.detach() - true)),
    )
    for deferred in (False, True):
        clear(lower, synthesizer, upper)
        with torch.autocast("cpu", torch.bfloat16):
            interface = dni.BackwardInterface(synthesizer)
            if deferred:
                with dni.defer_backward():
                    dni.backward(upper(interface(lower(inputs))).float().square().mean())
            else:
                loss = upper(interface(lower(inputs))).float().square().mean()
        if not deferred:
            loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(gradients(lower), expected[0], strict=True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                gradients(synthesizer.layers), expected[1][: len(list(synthesizer.layers.parameters()))], strict=True
            )
        )


def test_a_synthesizer_that_first_teaches_under_autocast_still_learns():
    """Autocast caches weights: were the first run without gradients, the second could not train the synthesizer in some
    versions of PyTorch.
    """
    synthesizer = dni.BasicSynthesizer(4, n_hidden=1)
    interface = dni.BackwardInterface(synthesizer)
    leaf = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        interface.backward(2 * leaf)
        interface.make_trigger(2 * leaf).float().sum().backward()
    assert all(parameter.grad is not None for parameter in synthesizer.parameters())


def test_a_synthesizer_of_another_precision():
    lower, synthesizer = nn.Linear(3, 4).bfloat16(), dni.BasicSynthesizer(4)
    nn.init.ones_(synthesizer.input_trigger.bias)
    interface = dni.BackwardInterface(lambda trigger, context: synthesizer(trigger.float(), context))
    interface(lower(torch.ones(2, 3).bfloat16())).sum().backward()
    assert torch.equal(lower.bias.grad, torch.full((4,), 2.0).bfloat16())
    assert synthesizer.input_trigger.bias.grad.dtype == torch.float32
    dni.ForwardInterface(synthesizer)(torch.zeros(2, 4).bfloat16(), torch.ones(2, 4))


def test_gradients_accumulate():
    lower, synthesizer, upper, inputs, target = parts()
    interface = dni.BackwardInterface(synthesizer)

    def step(rows):
        F.cross_entropy(upper(interface(lower(inputs[rows]))), target[rows]).backward()

    separate = []
    for rows in (slice(0, 3), slice(3, 4)):
        clear(lower, synthesizer, upper)
        step(rows)
        separate.append([gradient.clone() for gradient in gradients(lower, synthesizer.layers, upper)])
    clear(lower, synthesizer, upper)
    step(slice(0, 3))
    step(slice(3, 4))
    for gradient, first, second in zip(gradients(lower, synthesizer.layers, upper), *separate, strict=True):
        torch.testing.assert_close(gradient, first + second, rtol=1e-12, atol=1e-15)


def test_threads_do_not_disturb_each_other():
    """Threads meet amid their contexts and deferrals, and train as they would alone."""
    count, steps = 4, 5
    barrier = threading.Barrier(count, timeout=120)

    def train(seed, meet):
        generator = torch.Generator().manual_seed(seed)
        lower, synthesizer, upper = (module.double() for module in (nn.Linear(3, 5), Synthesizer(5), nn.Linear(5, 1)))
        with torch.no_grad():
            for module in (lower, synthesizer, upper):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
        interface = dni.BackwardInterface(synthesizer)
        for _ in range(steps):
            inputs = torch.randn(4, 3, generator=generator).double()
            context = torch.randn(4, 3, generator=generator).double()
            with dni.synthesizer_context(context):
                meet()
                with dni.defer_backward():  # no nesting, though others are in such a block
                    loss = upper(interface(lower(inputs))).square().mean()
                    meet()
                    dni.backward(loss)
                    meet()
                meet()
        return gradients(lower, synthesizer, upper)

    alone = [train(seed, lambda: None) for seed in range(count)]
    together = [None] * count

    def work(seed):
        together[seed] = train(seed, barrier.wait)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    with dni.synthesizer_context("the main thread's"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_deep_copies_are_independent_and_equal():
    lower, synthesizer, upper, inputs, target = parts()
    net = nn.Sequential(lower, dni.BackwardInterface(synthesizer), upper)
    F.cross_entropy(net(inputs), target).backward()
    copied = copy.deepcopy(net)
    for each in (net, copied):
        each.zero_grad()
    F.cross_entropy(copied(inputs), target).backward()
    assert all(gradient is None for gradient in gradients(net))
    F.cross_entropy(net(inputs), target).backward()
    pairs = list(zip(gradients(net), gradients(copied), strict=True))
    assert all((a is None and b is None) or (torch.equal(a, b) and a is not b) for a, b in pairs)
    assert sum(a is not None for a, _ in pairs) > 8


def test_two_processes_of_distributed_data_parallel(tmp_path):
    """Plain DDP leaves the first step unreduced without a word, and only its second is an error; both ways of the
    README are exact in every step.
    """
    script = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(dni.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        outcomes = json.loads(out.splitlines()[-1])  # before it, gloo of torch 2.9 says that it is connected
        assert outcomes["plain"][0] == "own" and "find_unused_parameters=True" in outcomes["plain"][1]
        assert outcomes["find_unused"] == outcomes["deferred"] == ["mean"] * 2


def test_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 5), dni.BackwardInterface(dni.BasicSynthesizer(5, 1, context_dim=2)))
        both = dni.BidirectionalInterface(dni.BasicSynthesizer(5, trigger_dim=3), dni.BasicSynthesizer(5))
        inputs = torch.randn(4, 3)
        with dni.synthesizer_context(torch.randn(4, 2)):
            net(inputs).sum().backward()
        with dni.defer_backward():
            dni.backward(both(net[0](inputs), inputs).sum())
    for parameter in (*net.parameters(), *both.parameters()):
        assert parameter.grad.is_meta and parameter.grad.shape == parameter.shape


# torch.func


def test_functional_call_trains_the_parameters_it_is_given():
    lower, synthesizer, upper, inputs, target = parts()
    net = nn.Sequential(lower, dni.BackwardInterface(synthesizer), upper)
    given = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
    F.cross_entropy(torch.func.functional_call(net, given, inputs), target).backward()
    assert all(gradient is None for gradient in gradients(net))
    F.cross_entropy(net(inputs), target).backward()
    assert sum(parameter.grad is not None for parameter in given.values()) > 8
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None and given[name].grad is None) or torch.equal(parameter.grad, given[name].grad)


class Triggered(nn.Module):
    """Lower part, make_trigger, upper part: (B, 3) → (B, 3)."""

    def __init__(self):
        super().__init__()
        self.lower, synthesizer, self.upper, *_ = parts()
        self.interface = dni.BackwardInterface(synthesizer)

    def forward(self, inputs):
        return self.upper(self.interface.make_trigger(self.lower(inputs)))


def test_make_trigger_in_transforms_of_torch_func():
    """Alone it back-propagates nothing itself, so grad and vmap, here of an ensemble, give what backward gives."""
    nets = [Triggered() for _ in range(3)]
    inputs, target = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 2])
    stacked, _ = torch.func.stack_module_state(nets)

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(nets[0], parameters, inputs), target)

    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    for index, net in enumerate(nets):
        F.cross_entropy(net(inputs), target).backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:  # the synthesizer's layer of the context has none
                torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-10, atol=1e-14)


def test_what_back_propagates_in_the_forward_pass_is_refused_inside_transforms():
    lower, synthesizer, _, inputs, _ = parts()
    backward, forward = dni.BackwardInterface(synthesizer), dni.ForwardInterface(synthesizer)
    for call in (
        lambda rows: backward(lower(rows)),
        lambda rows: backward.backward(lower(rows)),
        lambda rows: forward(lower(rows), lower(rows)),
        lambda rows: forward.send(lower(rows), lower(rows)),
        lambda rows: dni.backward(lower(rows).sum()),
    ):
        for transform in (torch.func.grad(lambda rows, call=call: call(rows).sum()), torch.func.vmap(call)):
            with pytest.raises(RuntimeError, match=r"torch\.func"):
                transform(inputs[:, None])
    assert all(gradient is None for gradient in gradients(lower, synthesizer))
    alone = torch.func.vmap(torch.func.grad(lambda row: lower(row).sum()))(inputs)
    backward.eval()
    passed = torch.func.vmap(torch.func.grad(lambda row: backward(lower(row)).sum()))(inputs)
    assert torch.equal(alone, passed)


def test_compiled_networks_give_the_same_gradients_and_see_each_context():
    lower, synthesizer, upper, inputs, target = parts()
    net = nn.Sequential(lower, dni.BackwardInterface(synthesizer), upper)
    compiled = torch.compile(net, backend="eager")
    for context in (CONTEXTS[1], -2 * CONTEXTS[1]):
        for deferred in (False, True):
            results = []
            for forward in (net, compiled):
                net.zero_grad()
                with dni.synthesizer_context(context):
                    if deferred:
                        with dni.defer_backward():
                            dni.backward(F.cross_entropy(forward(inputs), target))
                    else:
                        F.cross_entropy(forward(inputs), target).backward()
                results.append(gradients(net))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


# BasicSynthesizer


BASIC = [(0, None), (0, 3), (1, None), (1, 3), (3, 3)]  # n_hidden, context_dim


def basic(n_hidden, context_dim):
    return dni.BasicSynthesizer(5, n_hidden=n_hidden, hidden_dim=7, trigger_dim=4, context_dim=context_dim)


@pytest.mark.parametrize(("n_hidden", "context_dim"), BASIC)
def test_basic_synthesizer_has_the_layers_and_names_of_dni_pytorch(n_hidden, context_dim):
    """As a state_dict saved by a program written for it has them."""
    width = 7 if n_hidden else 5
    inputs = {"input_trigger": (width, 4)} | ({"input_context": (width, 3)} if context_dim else {})
    layers = {f"layers.{layer}": (5 if layer == n_hidden - 1 else 7, 7) for layer in range(n_hidden)}
    expected = {}
    for name, shape in (inputs | layers).items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    synthesizer = basic(n_hidden, context_dim)
    assert {name: tuple(value.shape) for name, value in synthesizer.state_dict().items()} == expected
    assert (synthesizer.input_context is None) == (context_dim is None)
    both = dni.BidirectionalInterface(synthesizer, synthesizer)
    parts = [f"{part}_interface.synthesizer.{name}" for part in ("forward", "backward") for name in expected]
    assert list(both.state_dict()) == parts


@pytest.mark.parametrize(("n_hidden", "context_dim"), BASIC)
def test_only_the_weights_of_a_basic_synthesizers_last_layer_start_at_zero(n_hidden, context_dim):
    synthesizer = basic(n_hidden, context_dim)
    last = {f"layers.{n_hidden - 1}.weight"} if n_hidden else {"input_trigger.weight", "input_context.weight"}
    for name, parameter in synthesizer.named_parameters():
        assert parameter.any() != (name in last), name
    output = synthesizer(torch.randn(2, 4), None if context_dim is None else torch.randn(2, 3))
    assert (
        torch.equal(output[0], output[1]) and output.any()
    )  # the last biases, PyTorch's default, whatever the trigger


def test_basic_synthesizer_computes_what_it_says():
    synthesizer = dni.BasicSynthesizer(2, n_hidden=2, hidden_dim=4, trigger_dim=3, context_dim=5)
    nn.init.normal_(synthesizer.layers[-1].weight)
    trigger, context = torch.randn(6, 3), torch.randn(6, 5)

    def linear(layer, inputs):
        return inputs @ layer.weight.T + layer.bias

    hidden = linear(synthesizer.input_trigger, trigger) + linear(synthesizer.input_context, context)
    for layer in synthesizer.layers:
        hidden = linear(layer, hidden.clamp(min=0))
    torch.testing.assert_close(synthesizer(trigger, context), hidden)
    assert synthesizer(trigger.expand(8, 6, 3), context).shape == (8, 6, 2)
    synthesizer(trigger, context).sum().backward()
    assert synthesizer.input_context.weight.grad.abs().sum() > 0


# What cannot be


def test_errors_name_the_shapes():
    trigger = torch.randn(4, 5, requires_grad=True)
    narrow = dni.BackwardInterface(dni.BasicSynthesizer(1, trigger_dim=5))  # (4, 1) would broadcast
    for call in (narrow, narrow.make_trigger, narrow.backward):
        with pytest.raises(RuntimeError, match=r"\(4, 1\).*\(4, 5\)"):
            call(trigger)
    forward = dni.ForwardInterface(dni.BasicSynthesizer(1, trigger_dim=5))
    for call in (forward, forward.send):
        with pytest.raises(RuntimeError, match=r"\(4, 1\).*\(4, 5\)"):
            call(trigger, trigger)
    with pytest.raises(RuntimeError, match=r"dni\.backward"):
        dni.backward(torch.zeros(3))
    with dni.defer_backward(), pytest.raises(RuntimeError, match=r"\(3,\).*\(4, 5\)"):
        dni.backward(trigger, torch.ones(3))
    assert trigger.grad is None
    with pytest.raises(RuntimeError, match=r"dni\.synthesizer_context"):
        dni.BackwardInterface(dni.BasicSynthesizer(5, context_dim=3))(trigger)


def test_a_context_that_cannot_be_used_is_an_error_that_says_what_to_give():
    interface = dni.BackwardInterface(dni.BasicSynthesizer(5, context_dim=3))
    labels = torch.tensor([0, 2, 1, 2])
    trigger = torch.randn(4, 5, requires_grad=True)
    integers = r"torch\.int64.*F\.one_hot\(labels, 3\)\.float\(\)"
    for context, error, message in (
        (labels, TypeError, integers),
        (F.one_hot(labels, 3), TypeError, integers),
        ([0, 2, 1, 2], TypeError, "list"),
        (torch.eye(7)[labels], ValueError, r"\(4, 7\).*context_dim=3"),
        (torch.tensor(1.0), ValueError, r"\(\).*context_dim=3"),
    ):
        with dni.synthesizer_context(context), pytest.raises(error, match=message):
            interface(trigger)
    with dni.synthesizer_context(torch.eye(3)[labels]):
        with pytest.raises(ValueError, match=r"\(4, 2\).*trigger_dim=5"):
            interface(trigger[:, :2])
        interface(trigger)
    assert trigger.grad is not None


def test_a_context_is_missing_in_a_thread_that_has_not_entered_it():
    synthesizer = dni.BasicSynthesizer(5, context_dim=3)
    errors = []

    def work():
        try:
            dni.BackwardInterface(synthesizer)(torch.randn(4, 5, requires_grad=True))
        except RuntimeError as error:
            errors.append(error)

    with dni.synthesizer_context(torch.eye(3)[[0, 2, 1, 2]]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    (error,) = errors
    assert "thread" in str(error)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), ()])
def test_batches_without_samples_are_an_error(shape):
    empty = torch.zeros(shape, requires_grad=True)
    backward = dni.BackwardInterface(lambda trigger, context: trigger)
    forward = dni.ForwardInterface(lambda trigger, context: trigger)
    calls = [backward, backward.make_trigger, backward.backward]
    for call in (*calls, lambda message: forward(message, message), lambda message: forward.send(message, message)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            call(empty)
    assert backward.eval()(empty) is empty


def test_the_state_of_an_lstm_is_to_be_joined():
    state = torch.zeros(4, 5), torch.zeros(4, 5)
    backward, forward = dni.BackwardInterface(dni.BasicSynthesizer(5)), dni.ForwardInterface(dni.BasicSynthesizer(5))
    calls = {
        "trigger": [backward, backward.make_trigger, backward.backward, forward.receive, lambda h: forward(h[0], h)],
        "message": [lambda h: forward(h, h[0]), lambda h: forward.send(h, h[0])],
    }
    for name, of_name in calls.items():
        for call in of_name:
            with pytest.raises(TypeError, match=rf"{name}.*tuple"):
                call(state)


# The README


EXAMPLES = [
    (section.split("\n")[0], code)
    for section in README.split("\n## ")
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


def test_the_readme_has_the_examples():
    assert README.count("```python") == len(EXAMPLES) == 5
    for word in dni.__all__:
        assert word in README


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title.split(":")[0] for title, _ in EXAMPLES])
def test_readme_examples_run_as_printed(title, code):
    names = {}
    exec(compile(code, f"README.md, {title}", "exec"), names)
    if "predictions" in names:
        assert (names["predictions"] == names["labels"]).float().mean() > 0.6  # of ten classes
    if "loss" in names:
        assert names["loss"].isfinite()
    trained = [value for value in names.values() if isinstance(value, torch.optim.Optimizer)]
    for optimizer in trained:
        assert all(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
    if "representation" in names:
        assert names["representation"].shape == (10, 16, 8, 8)
    if "split" in names:
        again = names["split"](names["join"](names["state"]))
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(again, names["state"], strict=True))
