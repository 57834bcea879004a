"""Accuracy and loss that stay on the device until they are read, single-pass evaluation of every head, and ensembles of
heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.networks.modules import eval_mode


def ranks(logits, labels):
    """How many classes come before the label, for each sample: (B, classes), (B,) → (B,); top-k means rank < k.

    Exact with ties: of equal logits the lower class comes first. A NaN never lets its sample count as correct.
    """
    target = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (~(logits <= target) | (before & (logits == target))).sum(1)


def count_hits(logits, labels, topk):
    """[how many samples have rank < k, for each k of ``topk``], scalars on the device."""
    if topk == (1,):  # in half as many operations: max gives the first of equal ones, and a NaN where there is one
        most, first = logits.max(1)
        return [((first == labels) & (most == most)).sum()]
    rank = ranks(logits, labels)
    return [(rank < k).sum() for k in topk]


class Meter:
    """Mean loss and top-k accuracy over the samples given since its epoch began.

    ``update`` only queues work on the device, on running scalars; ``loss`` and ``top(k)`` wait for it.
    """

    def __init__(self, topk=(1,)):
        self.topk = tuple(topk)
        self.begin()

    def begin(self):
        """Forgets everything: a new epoch."""
        # Scalars of the CPU, which go into the first sums on a device without a copy that it would have to wait for.
        self.count, self.losses, self.hits = 0, torch.zeros(()), [torch.zeros(()) for _ in self.topk]

    def update(self, loss, logits, labels):
        """Adds a mini-batch: its mean loss (scalar), logits (B, classes), labels (B,)."""
        wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no more
        correct = count_hits(logits.detach(), labels, self.topk)
        self.count += len(labels)
        self.losses = self.losses.to(wide) + loss.detach().float() * len(labels)
        self.hits = [before.to(wide) + more for before, more in zip(self.hits, correct, strict=True)]

    @property
    def loss(self):
        """Mean over samples; each mini-batch's loss weighs as many times as it has samples."""
        return self.losses.item() / self.count

    def top(self, k):
        """Top-k accuracy in %."""
        return 100 * self.hits[self.topk.index(k)].item() / self.count

    @property
    def top1(self):
        """Top-1 accuracy in %."""
        return self.top(1)

    @property
    def top5(self):
        """Top-5 accuracy in %, for a meter with 5 in its ``topk``."""
        return self.top(5)

    def sums(self):
        """(2 + len(topk),) float64 on the CPU: samples, loss summed over them, hits for each k."""
        sums = torch.stack([self.losses, *self.hits]).cpu().double()
        return torch.cat([torch.tensor([self.count]).double(), sums])

    def state_dict(self):
        """{"sums"}, for checkpoints and for adding up processes."""
        return {"sums": self.sums()}

    def load_state_dict(self, state):
        """Takes over what state_dict gave; further batches may be on another device."""
        count, losses, *hits = state["sums"]
        self.count, self.losses, self.hits = int(count), losses, hits


@torch.inference_mode()
def evaluate(net, batches, heads=None, topk=(1,)):
    """A Meter for every head of ``net`` (or for those in ``heads``, from 0) from one pass over ``batches``, in eval
    mode.

    ``net(images, heads)`` must return a list of logits, as DecoupledNetwork does. ``net`` comes back in the mode it
    had.
    """
    meters = None
    with eval_mode(net):
        for images, labels in batches:
            every_logits = net(images, heads)
            meters = meters or [Meter(topk) for _ in every_logits]
            for meter, logits in zip(meters, every_logits, strict=True):
                logits = logits.float()
                meter.update(F.cross_entropy(logits, labels), logits, labels)
    return meters


def ensembles(every_output):
    """The ensemble of heads 0..n for every n: outputs [(B, classes), …] → as many, output i of n+1 weighted 2^i /
    (2^(n+1) − 1).

    The outputs are probabilities in the ImageNet experiment and logits in the asynchronous one (Sec. 5.5, 5.6).
    """
    return means(weighted_sums(every_output))


def weighted_sums(every_output, first=0, below=0):
    """The sums of 2^i × output i of heads 0..n, for each n of which there is an output: from ``first`` on; ``below`` is
    the sum of the heads before it.
    """
    sums = []
    for index, output in enumerate(every_output, start=first):
        below = below + 2**index * output
        sums.append(below)
    return sums


def means(sums, first=0):
    """Ensembles of weighted sums, from head ``first`` on."""
    return [total / (2 ** (index + 1) - 1) for index, total in enumerate(sums, start=first)]


class WithEnsembles(nn.Module):
    """``net`` for evaluation: images → logits (B, classes) of every head, then the outputs of the ensembles up to each,
    in one pass.

    The ensembles are of probabilities or, with ``probabilities`` false, of logits: see ``ensembles``.
    """

    def __init__(self, net, probabilities):
        super().__init__()
        self.net = net
        self.probabilities = probabilities

    def forward(self, images, heads=None):
        logits = [head.float() for head in self.net(images)]
        return [*logits, *ensembles([head.softmax(1) for head in logits] if self.probabilities else logits)]
