"""Modules that learn at the same time, each in its process: the processes of one torchrun, lowest first, hold
consecutive modules. Representations and labels flow forward only, and nothing flows back, as in Algorithm 1 nothing has
to: no module waits for one above, except where more mini-batches than the queue holds wait there.

One process is the case of one: it holds all modules, and receives the images.
"""

import time
from collections import deque
from contextlib import nullcontext
from functools import cache

import torch
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from decoupled import InputError
from decoupled.metrics import Meter
from decoupled.network import eval_mode


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
    """Training FLOPs of each module of ``net`` on ``images``, and the Layout below each. ``net`` stays as it is."""
    flops, layouts, representation = [], [], images
    with eval_mode(net):
        for module in net:
            layouts.append(Layout(representation))
            with FlopCounterMode(display=False) as counter:
                with autocast():
                    representation, logits = module(representation)
                logits.float().sum().backward()
            flops.append(counter.get_total_flops())
            representation = representation.detach()
    net.zero_grad()
    return flops, layouts


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


def check_lengths(lengths, modules, processes):
    """Raises InputError unless so many ``modules`` can be in ``processes``, ``lengths`` (or None) in each."""
    if processes > modules:
        raise InputError(f"{processes} processes are more than the {modules} modules: start {modules} or fewer")
    if lengths and (len(lengths), sum(lengths)) != (processes, modules):
        flag = f"--modules-per-stage {','.join(map(str, lengths))}"
        raise InputError(
            f"{flag} is {len(lengths)} numbers for {sum(lengths)} modules, and there are {processes} processes and "
            f"{modules} modules: give each process its number, or leave the flag out"
        )


class Stage:
    """This process's ``modules`` of ``net``, which all processes have built alike: ``first`` is the number of the
    lowest, from 0. The others' parameters are given up. ``heads`` are what evaluates: they send on, as training does.

    images    an example (B, 3, h, w) on the processes' device, for shapes and costs
    lengths   modules of each process, or None: as their FLOPs say
    queue     mini-batches that are on their way to the next process, or wait there, before ``send`` waits
    wish      called before each mini-batch: what the run is to do after it, an integer, 0 for nothing. What it gives
              in process 0 becomes the ``mark`` of that mini-batch, in every process
    """

    def __init__(self, net, images, processes, *, lengths=None, queue=2, autocast=nullcontext, wish=int):
        check_lengths(lengths, len(net), processes.size)
        self.net, self.processes, self.queue, self.wish = net, processes, queue, wish
        self.first, self.modules, self.heads, self.lengths = 0, net, net, lengths or [len(net)]
        self.rank, self.last = processes.rank, processes.rank == processes.size - 1
        self.mark, self.waited, self.sending = 0, 0.0, deque()
        if processes.size > 1:
            self.part(images, lengths, autocast)

    def part(self, images, lengths, autocast):
        """Keeps this process's modules, and meets those of the processes below and above."""
        flops, layouts = survey(self.net, images, autocast)
        self.lengths = lengths or cut(flops, self.processes.size)
        self.first = sum(self.lengths[: self.rank])
        above = self.first + self.lengths[self.rank]
        self.modules = self.net[self.first : above]
        self.heads = Heads(self)
        for number, module in enumerate(self.net):
            if not self.first <= number < above:
                module.to("meta")
        self.below, self.above = layouts[self.first], None if self.last else layouts[above]
        links = [self.processes.link(low, low + 1) for low in range(self.processes.size - 1)]
        self.down, self.up = (None, *links)[self.rank], (*links, None)[self.rank]
        self.device = images.device
        gloo = distributed.get_backend() == "gloo"
        self.wire = torch.device("cpu") if gloo else self.device  # where tensors are sent from and arrive

    def __str__(self):
        return ",".join(map(str, self.lengths))

    def __repr__(self):
        return repr(self.net)

    def train(self):
        self.net.train()

    def take_mark(self):
        """The mark of the mini-batch that was received last, once."""
        mark, self.mark = self.mark, 0
        return mark

    # Mini-batches

    def receive(self, batches):
        """What ``batches`` (decoupled.images.Batches) become on their way to this process's lowest module, in the form
        of Batches: (representation (B, …), labels (B,)) for each.
        """
        return batches if self.processes.size == 1 else Arrivals(self, batches)

    def arrivals(self, batches):
        """Iterates over what is left of the epoch of ``batches`` that has begun."""
        if self.rank == 0:
            for images, labels in batches.rest():
                self.mark, self.labels = self.wish(), labels
                yield images, labels
            return
        left = len(batches) - batches.place
        posted = deque(self.post(batches.batch_size) for _ in range(min(self.queue, left)))
        for number in range(left):
            works, (header, labels, representation) = posted.popleft()
            self.wait(works, self.rank - 1)
            if number + self.queue < left:
                posted.append(self.post(batches.batch_size))
            self.mark, count = header.tolist()
            self.wish()
            self.labels = labels[:count].to(self.device)
            yield self.below.unpack(representation[:count].to(self.device)), self.labels

    def post(self, samples):
        """Begins to receive a mini-batch of at most so many samples, each into memory of its own."""
        header, labels = torch.empty(2, dtype=torch.int64), torch.empty(samples, dtype=torch.int64, device=self.wire)
        tensors = header, labels, self.below.room(samples, self.wire)
        return self.each(distributed.irecv, tensors, self.rank - 1, self.down), tensors

    def each(self, begin, tensors, other, link):
        """Begins to send ``tensors`` to process ``other``, or to receive them: how many samples there are goes from CPU
        to CPU, so that no GPU is waited for.
        """
        groups = self.processes.control, link, link
        with self.processes.waiting(other):
            return [
                begin(tensor, other, group=group, tag=tag)
                for tag, (tensor, group) in enumerate(zip(tensors, groups, strict=True), start=1)
            ]

    def wait(self, works, other):
        since = time.perf_counter()
        with self.processes.waiting(other):
            for work in works:
                work.wait()
        self.waited += time.perf_counter() - since

    def send(self, representation, labels):
        """Hands a mini-batch on, detached and as it was received, to the process above; on top, or alone, a no-op.
        Waits only where the queue is full.
        """
        if self.last:
            return
        while len(self.sending) >= self.queue:
            self.wait(self.sending.popleft()[0], self.rank + 1)
        header = torch.tensor([self.mark, len(labels)])
        tensors = header, labels.to(self.wire), self.above.pack(representation).to(self.wire)
        self.sending.append((self.each(distributed.isend, tensors, self.rank + 1, self.up), tensors))

    # What process 0 gathers

    def gather(self, *every_meters):
        """For each list of this process's Meters, that of all modules in process 0, and an empty one in the others."""
        if self.processes.size == 1:
            return every_meters
        states = [[(meter.topk, meter.state_dict()) for meter in meters] for meters in every_meters]
        gathered = [[] for _ in every_meters]
        for everyones in self.processes.to_first(states):
            for meters, states in zip(gathered, everyones, strict=True):
                for topk, state in states:
                    meters.append(Meter(topk))
                    meters[-1].load_state_dict(state)
        return gathered

    def own(self, values):
        """Of a list with one value for each module, those of this process. Raises ValueError for another number."""
        if len(values) != len(self.net):
            raise ValueError(f"{len(values)} modules, not {len(self.net)}")
        return values[self.first : self.first + len(self.modules)]

    def state_dict(self):
        """The parameters and buffers of this process's modules, under their names in the whole network."""
        return {key: value for key, value in self.net.state_dict().items() if not value.is_meta}

    def load_state_dict(self, state):
        """Takes this process's part of the whole network's ``state``."""
        self.net.load_state_dict(state)


class Heads(nn.Module):
    """The heads of ``stage`` for decoupled.metrics.evaluate: representation (B, …) → [logits (B, classes), …] of its
    modules; the last representation is sent on.
    """

    def __init__(self, stage):
        super().__init__()
        self.stage, self.net = stage, stage.modules

    def forward(self, representation, heads=None):
        every_logits = []
        for module in self.net:
            representation = module.body(representation)
            every_logits.append(module.auxiliary(representation))
        self.stage.send(representation, self.stage.labels)
        return every_logits


class Arrivals:
    """``batches`` as they come to ``stage``: iterating begins an epoch; ``rest`` is what is left of it."""

    def __init__(self, stage, batches):
        self.stage, self.batches = stage, batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.batches.begin()
        return self.rest()

    def rest(self):
        return self.stage.arrivals(self.batches)
