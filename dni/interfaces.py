"""The interfaces of the DNI paper (Jaderberg et al. 2017, Sec. 2): placed between two parts of a network, they let one
part continue without waiting for the other.

Interfaces are active in training mode with gradients enabled. In eval mode and under torch.no_grad they are identities
and train nothing. Triggers and messages are tensors (B, …) with B ≥ 1; anything else raises TypeError or ValueError.
Synthesizers read them detached: a synthesizer affects other layers only through its output.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dni.contexts import backward, current_context, refuse_transforms


def _is_active(interface):
    return interface.training and torch.is_grad_enabled()


def _synthesize(synthesizer, trigger):
    """The synthesizer's output for the detached trigger, with its graph.

    Callers that do not train the synthesizer detach the output. Running it under no_grad instead would leave autocast
    with cached copies of the weights that have no graph, and the synthesizer would silently not learn in its next run
    (https://github.com/pytorch/pytorch/issues/158232, in PyTorch 2.9).
    """
    _check_tensor(trigger, "trigger")
    return synthesizer(trigger.detach(), current_context())


def _check_tensor(value, name):
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"a {name} is one tensor (B, …), not {type(value).__name__}: join the state (h, c) of an LSTM with "
            "torch.cat((h, c), dim=-1), and split it again after the interface"
        )


def _check_batch(value, name):
    """Raises ValueError for a tensor without samples: their mean would be NaN."""
    _check_tensor(value, name)
    if value.dim() == 0 or value.numel() == 0:
        raise ValueError(
            f"a {name} of shape {tuple(value.shape)} has no samples (B, …) to learn from: skip empty batches"
        )


def _check_gradient(synthetic, trigger):
    if synthetic.shape != trigger.shape:
        raise RuntimeError(
            f"the synthesizer returned a gradient of shape {tuple(synthetic.shape)} for a trigger of "
            f"shape {tuple(trigger.shape)}"
        )


class _TrueGradient(torch.autograd.Function):
    """Forward: the trigger, unchanged. Backward: the true gradient g to the trigger, 2/B·(s − g) to the synthetic
    gradient s.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(trigger, synthetic):
        # A copy: layers above may work in place, and the synthesizer's graph still needs the trigger
        return trigger.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (synthetic,) = ctx.saved_tensors
        return gradient, (synthetic - gradient) * (2 / len(gradient))


class UnidirectionalInterface(nn.Module):
    """Base class of ForwardInterface and BackwardInterface: a synthesizer that predicts a message and learns from real
    ones.

    ``synthesizer(trigger, context)`` returns the message. The context is that of the enclosing dni.synthesizer_context,
    or None.
    """

    def __init__(self, synthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    def receive(self, trigger):
        """The synthetic message for ``trigger``, detached, in training and eval mode. A BackwardInterface returns the
        synthetic gradient.
        """
        return _synthesize(self.synthesizer, trigger).detach()

    def send(self, message, trigger):
        """Trains the synthesizer to predict the message: back-propagates the mean squared error over all elements."""
        if _is_active(self):
            self._regress(message, trigger)

    def _regress(self, message, trigger):
        """Runs the synthesizer once, trains it, and returns its message, detached."""
        refuse_transforms()
        _check_batch(message, "message")
        synthetic = _synthesize(self.synthesizer, trigger)
        if synthetic.shape != message.shape:
            raise RuntimeError(
                f"the synthesizer returned a message of shape {tuple(synthetic.shape)} for one of shape "
                f"{tuple(message.shape)}"
            )
        if synthetic.requires_grad:
            backward(F.mse_loss(synthetic, message.detach().to(synthetic.dtype)))
        return synthetic.detach()


class ForwardInterface(UnidirectionalInterface):
    """Passes synthetic messages (activations) up, so that the receiver does not wait for the sender.

    ``synthesizer(trigger, context)`` predicts the message from a trigger that is available earlier, such as the
    network's input.
    """

    def forward(self, message, trigger):
        """In training, sends the message and returns the synthetic one; the synthesizer runs once. In eval mode,
        returns the message.
        """
        if not _is_active(self):
            return message
        return self._regress(message, trigger)


class BackwardInterface(UnidirectionalInterface):
    """Passes synthetic gradients down, so that the layers below learn without waiting for those above.

    ``synthesizer(trigger, context)`` predicts the gradient of the loss with respect to the trigger, which is the
    representation (B, …) that crosses the interface.
    """

    def backward(self, trigger, factor=1):
        """Back-propagates ``factor`` times the synthetic gradient from ``trigger`` into the layers below. Does nothing
        if ``trigger`` requires no gradient.
        """
        if not _is_active(self):
            return
        refuse_transforms()
        _check_batch(trigger, "trigger")
        if trigger.requires_grad:
            self._teach_below(trigger, _synthesize(self.synthesizer, trigger), factor)

    def make_trigger(self, trigger):
        """Returns a copy of ``trigger`` that trains the synthesizer when the true gradient g comes back through it.

        g is passed on to ``trigger`` unchanged. The synthesizer's output s gets the gradient 2/B·(s − g), where B is
        the length of the first dimension: the gradient of the squared error, summed over features and averaged over
        samples.
        """
        if not _is_active(self):
            return trigger
        _check_batch(trigger, "trigger")
        return self._learning_trigger(trigger, _synthesize(self.synthesizer, trigger))

    def forward(self, trigger):
        """Back-propagates the synthetic gradient into the layers below, and returns the detached trigger, which trains
        the synthesizer. The synthesizer runs once for both.
        """
        if not _is_active(self):
            return trigger
        refuse_transforms()
        _check_batch(trigger, "trigger")
        synthetic = _synthesize(self.synthesizer, trigger)
        if trigger.requires_grad:
            self._teach_below(trigger, synthetic)
        return self._learning_trigger(trigger.detach(), synthetic)

    @staticmethod
    def _teach_below(trigger, synthetic, factor=1):
        _check_gradient(synthetic, trigger)
        backward(trigger, factor * synthetic.detach())

    @staticmethod
    def _learning_trigger(trigger, synthetic):
        _check_gradient(synthetic, trigger)
        return _TrueGradient.apply(trigger, synthetic)


class BidirectionalInterface(nn.Module):
    """Passes synthetic messages up and synthetic gradients down: complete unlock, where neither part waits for the
    other.

    The backward synthesizer's trigger is the message: the synthetic one when it learns from the part above, the real
    one when it teaches the part below.
    """

    def __init__(self, forward_synthesizer, backward_synthesizer):
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    def receive(self, trigger):
        """A synthetic message for the part above; its true gradient trains the backward synthesizer."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))

    def send(self, message, trigger):
        """Teaches the part below, which computed ``message``, with a synthetic gradient, and trains the forward
        synthesizer to predict the message.
        """
        self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)

    def forward(self, message, trigger):
        """In training, sends, then receives; the forward synthesizer runs once. In eval mode, returns the message."""
        if not _is_active(self):
            return message
        received = self.forward_interface(message, trigger)
        self.backward_interface.backward(message)
        return self.backward_interface.make_trigger(received)
