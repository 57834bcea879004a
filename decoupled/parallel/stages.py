"""Modules that learn at the same time, each in its process: the stages of a decoupled.parallel.mesh.Mesh, lowest first, hold
consecutive modules. Representations and labels flow forward only, and nothing flows back, as in Algorithm 1 nothing has
to: no module waits for one above, except where more mini-batches than the queue holds wait there.

One stage is the case of one: it holds all modules, and receives the images.
"""

import time
from collections import deque
from contextlib import nullcontext

import torch
from torch import distributed, nn

from decoupled.networks.evaluation import Meter, WithEnsembles, means, weighted_sums
from decoupled.parallel.balance import check_lengths, cut, survey
from decoupled.parallel.mesh import all_reduce_meters


class Stage:
    """This process's ``modules_here`` of ``net``, which all processes have built alike: ``first`` is the number of the
    lowest, from 0. The others' parameters are given up. ``heads`` are what evaluates: they send on, as training does.

    shape     of an image, (3, h, w)
    lengths   modules of each stage, or None: as their FLOPs say
    queue     mini-batches that are on their way to the next process, or wait there, before ``send`` waits
    pending_request      called before each mini-batch: what the run is to do after it, an integer, 0 for nothing. What it gives
              in the lowest stage, the greatest of its replicas', becomes the ``tag`` of that mini-batch in every stage
    """

    def __init__(self, net, shape, mesh, *, lengths=None, queue=2, autocast=nullcontext, pending_request=int):
        check_lengths(lengths, len(net), mesh.stages)
        self.net, self.mesh, self.processes, self.queue, self.pending_request = (
            net,
            mesh,
            mesh.processes,
            queue,
            pending_request,
        )
        self.first, self.modules_here, self.heads, self.lengths = 0, net, net, lengths or [len(net)]
        self.lowest, self.last = mesh.stage == 0, mesh.stage == mesh.stages - 1
        self.tag, self.total, self.waited, self.sending = 0, 0, 0.0, deque()
        if mesh.stages > 1:
            self.part(shape, lengths, autocast)

    def part(self, shape, lengths, autocast):
        """Keeps this process's modules, and meets those of the processes below and above."""
        like = next(self.net.parameters())
        images = torch.zeros(2, *shape, dtype=like.dtype, device=like.device).to(memory_format=torch.channels_last)
        flops, layouts, self.told = survey(self.net, images, autocast)
        self.lengths = lengths or cut(flops, self.mesh.stages)
        self.first = sum(self.lengths[: self.mesh.stage])
        above = self.first + self.lengths[self.mesh.stage]
        self.modules_here = self.net[self.first : above]
        self.heads = Heads(self)
        for number, module in enumerate(self.net):
            if not self.first <= number < above:
                module.to("meta")
        self.below, self.above = layouts[self.first], None if self.last else layouts[above]
        self.down, self.up = self.mesh.links()
        self.device = like.device
        gloo = distributed.get_backend() == "gloo"
        self.wire = torch.device("cpu") if gloo else self.device  # where tensors are sent from and arrive

    def __str__(self):
        replicas = f", {self.mesh.replicas} replicas of each" if self.mesh.replicas > 1 else ""
        return ",".join(map(str, self.lengths)) + replicas

    def __repr__(self):
        return repr(self.net)

    def train(self):
        self.net.train()

    def take_tag(self):
        """The mark of the mini-batch that was received last, once."""
        mark, self.tag = self.tag, 0
        return mark

    # Mini-batches

    def inputs(self, batches, totals=False):
        """What ``batches`` (decoupled.data.batches.Batches) become on their way to this process's lowest module, in the form
        of Batches: (representation (B, …), labels (B,)) for each. ``totals``: for ``ensembles``.
        """
        return batches if self.mesh.stages == 1 else Arrivals(self, batches, totals)

    def images(self, arrivals):
        """Iterates over what is left of the epoch, in the lowest stage."""
        for number, (images, labels) in enumerate(arrivals.batches.rest(), start=arrivals.batches.place):
            common = number < arrivals.common  # where replicas have no share, they have no say
            self.tag, self.labels = self.mesh.agree(self.pending_request()) if common else 0, labels
            yield images, labels

    def representations(self, arrivals):
        """Iterates over what is left of the epoch, above the lowest stage."""
        sizes = arrivals.batches.left
        posted = deque(self.post(size, arrivals.totals) for size in sizes[: self.queue])
        for number in range(len(sizes)):
            works, (mark, labels, representation, *totals) = posted.popleft()
            self.wait(works, self.mesh.below)
            if number + self.queue < len(sizes):
                posted.append(self.post(sizes[number + self.queue], arrivals.totals))
            arrivals.batches.advance()
            self.tag, self.labels = int(mark), labels.to(self.device)
            self.total = totals[0].to(self.device) if totals else 0
            self.pending_request()
            yield self.below.unpack(representation.to(self.device)), self.labels

    def post(self, samples, totals):
        """Begins to receive a mini-batch of so many samples, each into memory of its own."""
        labels = torch.empty(samples, dtype=torch.int64, device=self.wire)
        tensors = [torch.empty((), dtype=torch.int64), labels, self.below.room(samples, self.wire)]
        if totals:
            tensors.append(self.told.room(samples, self.wire))
        return self.each(distributed.irecv, tensors, self.mesh.below, self.down), tensors

    def each(self, begin, tensors, other, link):
        """Begins to send ``tensors`` to process ``other``, or to receive them. The mark goes from CPU to CPU: no GPU is
        waited for.
        """
        with self.processes.waiting(other):
            return [
                begin(tensor, other, group=link if tag > 1 else self.processes.control, tag=tag)
                for tag, tensor in enumerate(tensors, start=1)
            ]

    def wait(self, works, other):
        since = time.perf_counter()
        with self.processes.waiting(other):
            for work in works:
                work.wait()
        self.waited += time.perf_counter() - since

    def send(self, representation, labels, *totals):
        """Hands a mini-batch on, detached and as it was received, to the process above; on top, or alone, a no-op.
        Waits only where the queue is full.
        """
        if self.last:
            return
        while len(self.sending) >= self.queue:
            self.wait(self.sending.popleft()[0], self.mesh.above)
        tensors = torch.tensor(self.tag), labels, self.above.pack(representation), *totals
        tensors = [tensors[0], *(tensor.to(self.wire) for tensor in tensors[1:])]
        self.sending.append((self.each(distributed.isend, tensors, self.mesh.above, self.up), tensors))

    def recompute_statistics(self, images, autocast=nullcontext):
        """Batch norm's running means and variances anew, of ``images`` (Batches.without_augmentation) by the weights of now: the means
        of the mini-batches' own. Training does not read them, evaluation does.

        The usual ones average the latest mini-batches, whose weights were others: where an epoch has few, test top-1
        jumps from epoch to epoch. "Precise" statistics: Wu and Johnson (2021, arXiv 2105.07576), Sec. 3.
        """
        norms = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in batch_norms(self.modules_here)]
        self.train()
        for norm, *_ in norms:
            norm.reset_running_stats()
            norm.momentum = None  # equal weights
        with torch.no_grad(), autocast():
            for representation, labels in self.inputs(images):
                for module in self.modules_here:
                    representation, _ = module(representation)
                self.send(representation, labels)
        for norm, momentum, batches in norms:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)

    def ensembles(self, probabilities=True):
        """``heads`` with the ensembles up to each (decoupled.networks.evaluation.WithEnsembles): the sum over the heads below comes
        with the representation.
        """
        kind = "probabilities" if probabilities else "logits"
        return WithEnsembles(self.net, probabilities) if self.mesh.stages == 1 else Heads(self, kind)

    # What process 0 gathers

    def gather(self, *every_meters):
        """For each list of this process's Meters, that of all modules, over all replicas, in process 0; with several
        stages an empty one in the others.
        """
        every_meters = [all_reduce_meters(meters, self.mesh) for meters in every_meters]
        if self.mesh.stages == 1:
            return every_meters
        states = [[(meter.topk, meter.state_dict()) for meter in meters] for meters in every_meters]
        gathered = [[] for _ in every_meters]
        for everyones in self.mesh.to_first(states):
            for meters, states in zip(gathered, everyones, strict=True):
                for topk, state in states:
                    meters.append(Meter(topk))
                    meters[-1].load_state_dict(state)
        return gathered

    def own(self, values):
        """Of a list with one value for each module, those of this process. Raises ValueError for another number."""
        if len(values) != len(self.net):
            raise ValueError(f"{len(values)} modules, not {len(self.net)}")
        return values[self.first : self.first + len(self.modules_here)]

    def state_dict(self):
        """The parameters and buffers of this process's modules, under their names in the whole network."""
        return {key: value for key, value in self.net.state_dict().items() if not value.is_meta}

    def load_state_dict(self, state):
        """Takes this process's part of the whole network's ``state``."""
        self.net.load_state_dict(state)


def batch_norms(net):
    """The batch norms of ``net`` that keep running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [layer for layer in net.modules() if isinstance(layer, kinds) and layer.track_running_stats]


class Heads(nn.Module):
    """The heads of ``stage`` for decoupled.networks.evaluation.evaluate: representation (B, …) → [logits (B, classes), …] of its
    modules, and the ensembles up to each of their "probabilities" or "logits"; the last representation is sent on.
    """

    def __init__(self, stage, ensembles=None):
        super().__init__()
        self.stage, self.net, self.ensembles = stage, stage.modules_here, ensembles

    def forward(self, representation, heads=None):
        stage, every_logits, totals = self.stage, [], []
        for module in self.net:
            representation = module.body(representation)
            every_logits.append(module.auxiliary(representation))
        if self.ensembles:
            every_logits = [logits.float() for logits in every_logits]
            every_output = every_logits
            if self.ensembles == "probabilities":
                every_output = [logits.softmax(1) for logits in every_logits]
            totals = weighted_sums(every_output, stage.first, stage.total)
        stage.send(representation, stage.labels, *totals[-1:])
        return [*every_logits, *means(totals, stage.first)]


class Arrivals:
    """``batches`` as they come to ``stage``: iterating begins an epoch; ``rest`` is what is left of it."""

    def __init__(self, stage, batches, totals):
        self.stage, self.batches, self.totals = stage, batches, totals

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.batches.begin()
        return self.rest()

    def rest(self):
        return self.stage.images(self) if self.stage.lowest else self.stage.representations(self)

    @property
    def weight(self):
        """See decoupled.data.batches.Outline; so ``common``."""
        return self.batches.weight

    @property
    def common(self):
        return len(self) if self.stage.mesh.replicas == 1 else self.batches.common
