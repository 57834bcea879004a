"""Assigns modules to stages, balanced by FLOPs, and describes the tensors that stages send to each other."""

from functools import cache
from typing import NamedTuple

import torch

from decoupled.errors import InputError
from decoupled.networks.flops import flop_counter
from decoupled.networks.modules import eval_mode


class TensorFormat:
    """The form of a tensor (B, …) for any B: shape, dtype and the order of its dimensions in memory.

    The receiver restores this order so that it computes the same bits as a single process.
    """

    def __init__(self, tensor):
        strides = tensor.stride()
        # Dimensions from the slowest to the fastest in memory: contiguous in this order. B is not always the slowest: a
        # GRU's output, for one, has the time first.
        self.order = sorted(range(tensor.dim()), key=lambda dimension: -strides[dimension])
        self.inverse_order = sorted(range(tensor.dim()), key=lambda position: self.order[position])
        self.shape = list(tensor.shape[1:])
        self.dtype = tensor.dtype

    def pack(self, tensor):
        """``tensor`` as a contiguous tensor, copied only if its memory has another order. Raises InputError for another
        shape or dtype.
        """
        if list(tensor.shape[1:]) != self.shape or tensor.dtype != self.dtype:
            raise InputError(
                f"a mini-batch on its way to the stage above has {describe(tensor.dtype, tensor.shape[1:])}, where the "
                f"example of the data has {describe(self.dtype, self.shape)}: make them alike (labels are changed in "
                "the data set or its collate, not between inputs and send)"
            )
        return tensor.permute(self.order).contiguous()

    def unpack(self, packed):
        """The original tensor, as a view of ``packed``."""
        return packed.permute(self.inverse_order)

    def empty(self, samples, device):
        """An uninitialized packed tensor with B = ``samples``."""
        shape = [samples, *self.shape]
        return torch.empty([shape[dimension] for dimension in self.order], dtype=self.dtype, device=device)


def describe(dtype, shape):
    """Describes tensors (B, *shape) in a message."""
    sizes = ["B", *map(str, shape)]
    return f"{str(dtype).removeprefix('torch.')} ({', '.join(sizes)})"


class Survey(NamedTuple):
    """What ``survey`` measures in a network."""

    flops: list  # FLOPs of a training step, per module
    inputs: list  # TensorFormat of each module's input
    logits: TensorFormat  # TensorFormat of a head's output, as float32


def survey(net, example, autocast):
    """Runs a forward and backward pass of each module of ``net`` on ``example``, a batch of its inputs. Returns a
    Survey and leaves ``net`` unchanged.
    """
    flops = []
    inputs = []
    representation = example
    with eval_mode(net):
        for module in net:
            inputs.append(TensorFormat(representation))
            with flop_counter() as counter:
                with autocast():
                    representation, logits = module(representation)
                if logits.requires_grad:  # some parameters of the module are not frozen
                    logits.float().sum().backward()
            flops.append(counter.get_total_flops())
            representation = representation.detach()
    net.zero_grad()
    return Survey(flops, inputs, TensorFormat(logits.float()))


def balance(costs, parts):
    """Splits ``costs`` into consecutive parts so that the most expensive part is as cheap as possible. Returns the
    length of each part.
    """

    @cache
    def best(start, parts_left):
        """(cost of the most expensive part, lengths) of the best split of costs[start:] into ``parts_left`` parts."""
        remaining = len(costs) - start
        if parts_left == 1:
            return sum(costs[start:]), (remaining,)
        splits = []
        for length in range(1, remaining - parts_left + 2):
            highest_above, lengths_above = best(start + length, parts_left - 1)
            highest = max(sum(costs[start : start + length]), highest_above)
            splits.append((highest, (length, *lengths_above)))
        return min(splits)

    _, lengths = best(0, parts)
    return lengths


def check_modules_per_stage(modules_per_stage, modules, stages):
    """Raises InputError unless a network with ``modules`` modules can be split into ``stages`` stages and
    ``modules_per_stage``, if given, has one number per stage and adds up to ``modules``.
    """
    if stages > modules:
        raise InputError(f"{stages} stages are more than the {modules} modules: start {modules} processes or fewer")
    if modules_per_stage is None:
        return
    total = sum(modules_per_stage)
    if len(modules_per_stage) != stages or total != modules:
        flag = f"--modules-per-stage {','.join(map(str, modules_per_stage))}"
        raise InputError(
            f"{flag} has {len(modules_per_stage)} numbers that add up to {total}: give {stages}, one for each stage, "
            f"that add up to {modules}, or leave the flag out"
        )
