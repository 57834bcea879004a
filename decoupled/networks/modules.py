"""A network as DGL sees it: a list of modules, each with a body and an auxiliary network that provides its loss."""

import math
from contextlib import contextmanager

import torch
from torch import nn

from decoupled.errors import InputError


class DecoupledModule(nn.Module):
    """One module: ``body`` maps the representation from below to a new one, and ``auxiliary`` maps that to logits.

    forward: representation from below (B, …) → new representation (B, …), and logits (B, classes) or, for each token,
    (B, N, classes). Nothing is detached here: detaching is part of the algorithm.
    """

    def __init__(self, body, auxiliary):
        super().__init__()
        self.body = body
        self.auxiliary = auxiliary

    def forward(self, representation):
        representation = self.body(representation)
        return representation, self.auxiliary(representation)


class DecoupledNetwork(nn.ModuleList):
    """A list of modules, lowest first, that can be indexed and sliced: ``net[:2]`` is the network of the two lowest
    modules.
    """

    def forward(self, images, heads=None):
        """Returns a list of logits (B, classes), one per head; with ``heads`` (indices from 0), of those heads only, in
        that order.

        A single pass computes them all. Modules above the highest head do not run. No gradient crosses a module
        boundary. Raises IndexError for a head that does not exist.
        """
        if heads is None:
            heads = range(len(self))
        for head in heads:
            if not 0 <= head < len(self):
                raise IndexError(f"no head {head}: this network has heads 0 to {len(self) - 1}")
        representation = images
        logits = {}
        for index, module in enumerate(self[: max(heads) + 1]):
            representation = module.body(representation.detach())
            if index in heads:
                logits[index] = module.auxiliary(representation)
        return [logits[head] for head in heads]


def group_layers(layers, block_size):
    """Splits ``layers`` into consecutive groups of ``block_size``; the last group has the remainder.

    Raises InputError for a block size below 1 or above the number of layers.
    """
    if not 1 <= block_size <= len(layers):
        raise InputError(
            f"impossible block size {block_size}: the network has {len(layers)} layers, so choose "
            f"from 1 to {len(layers)}"
        )
    return [layers[start : start + block_size] for start in range(0, len(layers), block_size)]


def split_evenly(layers, splits):
    """Splits ``layers`` into ``splits`` consecutive groups of ⌈len(layers)/splits⌉; the last one may be shorter.

    Groups of that length may be too few: 10 layers make only 5 groups of ⌈10/6⌉ = 2. In that case the lengths differ by
    at most one, longer groups first.

    Raises InputError for fewer layers than ``splits``.
    """
    if not 1 <= splits <= len(layers):
        raise InputError(
            f"{len(layers)} layers cannot be split into {splits} modules: choose 1 to {len(layers)} splits"
        )
    groups = group_layers(layers, math.ceil(len(layers) / splits))
    if len(groups) == splits:
        return groups
    length, num_longer = divmod(len(layers), splits)
    boundary = num_longer * (length + 1)  # layers in the longer groups
    return group_layers(layers[:boundary], length + 1) + group_layers(layers[boundary:], length)


@contextmanager
def eval_mode(net):
    """Puts ``net`` in eval mode inside the block. Afterwards, every submodule is back in its previous mode, also if
    frozen.
    """
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def output_shape(body, input_shape):
    """The shape, without B, of what ``body`` returns for inputs (B, *input_shape), for example (C', h', w') for (C, h,
    w). Runs ``body`` on zeros in eval mode and does not change it.
    """
    parameter = next(body.parameters(), torch.empty(0))
    with eval_mode(body):  # batch norm then updates no statistics and accepts a single 1×1 input
        return tuple(body(parameter.new_zeros(1, *input_shape)).shape[1:])
