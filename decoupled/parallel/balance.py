"""Which modules each stage has, by their cost, and what the representations between them look like."""

from functools import cache

import torch

from decoupled.errors import InputError
from decoupled.networks.flops import flop_counter
from decoupled.networks.modules import eval_mode


class Layout:
    """What ``representation`` (B, …) looks like but for B: shape, type and order in memory, which the process above
    keeps, so that it computes what one process would.
    """

    def __init__(self, representation):
        strides = representation.stride()
        self.order = sorted(range(representation.dim()), key=lambda dimension: -strides[dimension])
        self.back = sorted(range(representation.dim()), key=self.order.__getitem__)
        self.shape = [representation.shape[dimension] for dimension in self.order[1:]]
        self.dtype = representation.dtype

    def pack(self, representation):
        """``representation`` as a contiguous tensor, without a copy."""
        packed = representation.permute(self.order).contiguous()
        if [*packed.shape[1:]] != self.shape or packed.dtype != self.dtype:
            raise RuntimeError(f"a representation is {packed.dtype} {tuple(packed.shape)}, not as in evaluation")
        return packed

    def room(self, samples, device):
        """An uninitialized tensor for as many packed samples."""
        return torch.empty(samples, *self.shape, dtype=self.dtype, device=device)

    def unpack(self, packed):
        return packed.permute(self.back)


def survey(net, images, autocast):
    """Training FLOPs of each module of ``net`` on ``images``, the Layout below each, and that of what a head tells.
    ``net`` stays as it is.
    """
    flops, layouts, representation = [], [], images
    with eval_mode(net):
        for module in net:
            layouts.append(Layout(representation))
            with flop_counter() as counter:
                with autocast():
                    representation, logits = module(representation)
                logits.float().sum().backward()
            flops.append(counter.get_total_flops())
            representation = representation.detach()
    net.zero_grad()
    return flops, layouts, Layout(logits.float())


def cut(costs, parts):
    """The lengths of ``parts`` consecutive runs of ``costs``, the greatest of whose sums is least."""

    @cache
    def best(start, parts):
        if parts == 1:
            return sum(costs[start:]), (len(costs) - start,)
        options = []
        for end in range(start + 1, len(costs) - parts + 2):
            greatest, lengths = best(end, parts - 1)
            options.append((max(sum(costs[start:end]), greatest), (end - start, *lengths)))
        return min(options)

    return best(0, parts)[1]


def check_lengths(lengths, modules, stages):
    """Raises InputError unless so many ``modules`` can be in ``stages``, ``lengths`` (or None) in each."""
    if stages > modules:
        raise InputError(f"{stages} stages are more than the {modules} modules: start {modules} processes or fewer")
    if lengths and (len(lengths), sum(lengths)) != (stages, modules):
        flag = f"--modules-per-stage {','.join(map(str, lengths))}"
        raise InputError(
            f"{flag} is {len(lengths)} numbers for {sum(lengths)} modules, and there are {stages} stages and "
            f"{modules} modules: give each stage its number, or leave the flag out"
        )
