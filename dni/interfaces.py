"""Interfaces of the DNI paper (Jaderberg et al. 2017, Sec. 2): what stands between two parts of a network so that one
need not wait for the other.

All interfaces work in training mode with gradients enabled; in eval mode, and under torch.no_grad, they are the
identity and train nothing. Triggers and messages are tensors (B, …), B at least 1; ValueError or TypeError otherwise.
They are detached where a synthesizer reads them: synthesizers learn, and never teach the layers they serve but by their
output.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dni.contexts import backward, current_context, refuse_transforms


def _learns(interface):
    return interface.training and torch.is_grad_enabled()


def _synthesize(synthesizer, trigger):
    """The synthesizer's output for the detached trigger, with its graph.

    Callers that do not train it detach it. Under no_grad instead, autocast's cached copies of the weights would have no
    graph when the synthesizer runs next, and it would silently not learn
    (https://github.com/pytorch/pytorch/issues/158232, in PyTorch 2.9).
    """
    return synthesizer(_tensor(trigger, "trigger").detach(), current_context())


def _tensor(value, name):
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"a {name} is one tensor (B, …), not {type(value).__name__}: join the state (h, c) of an LSTM, "
            "torch.cat((h, c), dim=-1), and split it again after the interface"
        )
    return value


def _batch(value, name):
    """``value``, of which something can be learned: the mean over no samples is not a number."""
    if _tensor(value, name).dim() == 0 or value.numel() == 0:
        raise ValueError(
            f"a {name} of shape {tuple(value.shape)} has no samples (B, …) to learn from: leave empty batches out"
        )
    return value


class _TrueGradient(torch.autograd.Function):
    """The trigger, unchanged. Backward: the true gradient g goes on to the trigger as it is, and 2/B·(s − g) to the
    synthetic gradient s.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(trigger, synthetic):
        # layers above may work in place; the synthesizer's graph, and those below when deferred, still need the trigger
        return trigger.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (synthetic,) = ctx.saved_tensors
        return gradient, (synthetic - gradient) * (2 / len(gradient))


def _same_shape(synthetic, trigger):
    if synthetic.shape != trigger.shape:
        raise RuntimeError(
            f"the synthesizer gave a gradient of shape {tuple(synthetic.shape)} for a trigger of "
            f"shape {tuple(trigger.shape)}"
        )
    return synthetic


class UnidirectionalInterface(nn.Module):
    """What ForwardInterface and BackwardInterface share: a synthesizer that gives a message, and learns to, from real
    ones.

    ``synthesizer(trigger, context)`` models the message; the context is that of the enclosing dni.synthesizer_context,
    or None.
    """

    def __init__(self, synthesizer):
        super().__init__()
        self.synthesizer = synthesizer

    def receive(self, trigger):
        """A synthesized message, detached, in whatever mode. A BackwardInterface's is the synthetic gradient, here to
        be read or used by hand.
        """
        return _synthesize(self.synthesizer, trigger).detach()

    def send(self, message, trigger):
        """Trains the synthesizer toward the detached message: back-propagates their mean squared error over all
        elements.
        """
        if _learns(self):
            self._regress(message, trigger)

    def _regress(self, message, trigger):
        """Trains the synthesizer in one run, and returns its message, detached."""
        refuse_transforms()
        _batch(message, "message")
        synthetic = _synthesize(self.synthesizer, trigger)
        if synthetic.shape != message.shape:
            raise RuntimeError(
                f"the synthesizer gave a message of shape {tuple(synthetic.shape)} for one of shape "
                f"{tuple(message.shape)}"
            )
        if synthetic.requires_grad:
            backward(F.mse_loss(synthetic, message.detach().to(synthetic.dtype)))
        return synthetic.detach()


class ForwardInterface(UnidirectionalInterface):
    """Passes synthetic messages (activations) up, so that the receiver need not wait for the sender.

    ``synthesizer(trigger, context)`` models the message, given a trigger that is known early, such as the network's
    input.
    """

    def forward(self, message, trigger):
        """In training sends the message and returns the synthesized one, of one run of the synthesizer; in eval mode
        returns the message.
        """
        return self._regress(message, trigger) if _learns(self) else message


class BackwardInterface(UnidirectionalInterface):
    """Passes synthetic gradients down, so that the layers below learn without waiting for those above.

    ``synthesizer(trigger, context)`` models the loss's gradient by the trigger, the representation (B, …) that passes
    the interface.
    """

    def backward(self, trigger, factor=1):
        """Back-propagates ``factor`` × the synthetic gradient from ``trigger`` into the layers below; without any to
        teach, does nothing.
        """
        if not _learns(self):
            return
        refuse_transforms()
        if _batch(trigger, "trigger").requires_grad:
            self._teach(trigger, _synthesize(self.synthesizer, trigger), factor)

    def make_trigger(self, trigger):
        """A copy of ``trigger`` that trains the synthesizer once the true gradient g comes back through it.

        g passes on to ``trigger`` unchanged. The synthesizer's output s gets the gradient 2/B·(s − g), B the length of
        the first dimension: that of the squared error summed over features, averaged over samples.
        """
        if not _learns(self):
            return trigger
        return self._learn(trigger, _synthesize(self.synthesizer, _batch(trigger, "trigger")))

    def forward(self, trigger):
        """Back-propagates the synthetic gradient below, and returns the detached trigger that trains the synthesizer;
        one run of it does both.
        """
        if not _learns(self):
            return trigger
        refuse_transforms()
        synthetic = _synthesize(self.synthesizer, _batch(trigger, "trigger"))
        if trigger.requires_grad:
            self._teach(trigger, synthetic)
        return self._learn(trigger.detach(), synthetic)

    @staticmethod
    def _teach(trigger, synthetic, factor=1):
        backward(trigger, factor * _same_shape(synthetic, trigger).detach())

    @staticmethod
    def _learn(trigger, synthetic):
        return _TrueGradient.apply(trigger, _same_shape(synthetic, trigger))


class BidirectionalInterface(nn.Module):
    """Passes synthetic messages up and synthetic gradients down: complete unlock, neither part waits for the other.

    The backward synthesizer's trigger is the message, synthesized (to learn, above) or real (to teach, below).
    """

    def __init__(self, forward_synthesizer, backward_synthesizer):
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    def receive(self, trigger):
        """A synthesized message for the part above; its true gradient trains the backward synthesizer."""
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))

    def send(self, message, trigger):
        """Teaches the part below, which made ``message``, by the synthetic gradient, and trains the forward synthesizer
        toward the message.
        """
        self.forward_interface.send(message, trigger)
        self.backward_interface.backward(message)

    def forward(self, message, trigger):
        """In training sends, then receives, running the forward synthesizer once; in eval mode returns the message."""
        if not _learns(self):
            return message
        received = self.forward_interface(message, trigger)
        self.backward_interface.backward(message)
        return self.backward_interface.make_trigger(received)
