"""A ready-made synthesizer. Any module that can be called as ``synthesizer(trigger, context)`` can be one; the context
is None outside synthesizer_context.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class BasicSynthesizer(nn.Module):
    """An MLP: trigger (…, trigger_dim) and, with context_dim, context (…, context_dim) → (…, output_dim).

    The linear layers ``input_trigger`` and ``input_context`` (None without context_dim) map to hidden_dim. Their sum
    goes through ``n_hidden`` linear ``layers``, each after a ReLU, the last to output_dim. With n_hidden=0, the input
    layers map to output_dim directly. Dimensions that are not given equal output_dim. The weights of the last layer
    start at zero, its biases with PyTorch's default: an untrained synthesizer's message is small and the same for all
    triggers.

    forward raises RuntimeError if context_dim is set and there is no context, TypeError for a context of integers, and
    ValueError for a trigger or context of another width.
    """

    def __init__(self, output_dim, n_hidden=0, hidden_dim=None, trigger_dim=None, context_dim=None):
        super().__init__()
        if hidden_dim is None or n_hidden == 0:
            hidden_dim = output_dim
        if trigger_dim is None:
            trigger_dim = output_dim
        self.input_trigger = nn.Linear(trigger_dim, hidden_dim)
        self.input_context = None if context_dim is None else nn.Linear(context_dim, hidden_dim)
        widths = [hidden_dim] * n_hidden + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(width, following) for width, following in itertools.pairwise(widths))
        last_layers = self.layers[-1:] if n_hidden else [self.input_trigger, self.input_context]
        for layer in last_layers:
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, trigger, context=None):
        check_width("trigger", trigger, self.input_trigger.in_features)
        output = self.input_trigger(trigger)
        if self.input_context is not None:
            check_context(context, self.input_context.in_features)
            output = output + self.input_context(context)
        for layer in self.layers:
            output = layer(F.relu(output))
        return output


def check_context(context, width):
    if context is None:
        raise RuntimeError(
            "this synthesizer was made with context_dim: run it inside dni.synthesizer_context(context). A context "
            "applies to the thread that enters it: a thread started inside has to enter it too"
        )
    if not isinstance(context, torch.Tensor) or not context.is_floating_point():
        kind = f"of {context.dtype}" if isinstance(context, torch.Tensor) else type(context).__name__
        raise TypeError(
            f"the context must be a tensor of floats, not {kind}: for labels use F.one_hot(labels, {width}).float()"
        )
    check_width("context", context, width)


def check_width(name, value, width):
    if value.shape[-1:] != (width,):
        raise ValueError(f"a {name} of shape {tuple(value.shape)} for a synthesizer of {name}_dim={width}")
