"""A network as DGL sees it: a list of modules, each a body and the auxiliary network that teaches it."""

from contextlib import contextmanager

import torch
from torch import nn

from decoupled.errors import InputError


class DecoupledModule(nn.Module):
    """One module: ``body`` maps the representation below to its own, ``auxiliary`` maps that to logits.

    forward: (B, C, h, w) → representation (B, C', h', w'), logits (B, classes). Nothing is detached here: that is the
    algorithm's part.
    """

    def __init__(self, body, auxiliary):
        super().__init__()
        self.body = body
        self.auxiliary = auxiliary

    def forward(self, representation):
        representation = self.body(representation)
        return representation, self.auxiliary(representation)


class DecoupledNetwork(nn.ModuleList):
    """The modules from the image up. Indexing and slicing as in a list: ``net[:2]`` is the network of the two lowest
    modules.
    """

    def forward(self, images, heads=None):
        """Logits (B, classes) of every head in one pass, or of those in ``heads`` (indices from 0, ascending): a list.

        Modules above the last head asked for are not run. No gradient crosses a module boundary.
        """
        heads = range(len(self)) if heads is None else heads
        representation, logits = images, []
        for index, module in enumerate(self[: max(heads) + 1]):
            representation = module.body(representation.detach())
            if index in heads:
                logits.append(module.auxiliary(representation))
        return logits


def group(layers, block_size):
    """Consecutive runs of ``block_size`` layers; a remainder is a last, shorter run. Raises InputError when no such
    split exists.
    """
    if not 1 <= block_size <= len(layers):
        raise InputError(
            f"block size {block_size} is impossible: the network has {len(layers)} layers, so choose "
            f"from 1 to {len(layers)}"
        )
    return [layers[start : start + block_size] for start in range(0, len(layers), block_size)]


def split(pieces, parts):
    """``parts`` consecutive runs of ⌈len(pieces)/parts⌉ pieces, the last one shorter; where these do not add up, runs
    whose lengths differ by one.

    Raises InputError when there are fewer pieces than parts.
    """
    if not 1 <= parts <= len(pieces):
        raise InputError(f"{len(pieces)} pieces do not split into {parts} parts: choose from 1 to {len(pieces)} splits")
    size, rest = divmod(len(pieces), parts)
    runs = group(pieces, size + (rest > 0))
    if len(runs) == parts:
        return runs
    return group(pieces[: rest * (size + 1)], size + 1) + group(pieces[rest * (size + 1) :], size)


@contextmanager
def eval_mode(net):
    """``net`` in eval mode inside the block; after it, every submodule is in the mode it had, frozen ones included."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def output_shape(body, input_shape):
    """Shape (C, h, w) of ``body``'s representation of one input (C, h, w), read from a real activation; ``body`` is
    left as it was.
    """
    parameter = next(body.parameters(), torch.empty(0))
    with eval_mode(body):  # batch norm: no statistics from this pass, and a single 1×1 input is allowed
        return tuple(body(parameter.new_zeros(1, *input_shape)).shape[1:])
