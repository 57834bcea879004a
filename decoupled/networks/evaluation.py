"""Accuracy and loss that stay on the device until they are read, evaluation of every head in a single pass, and
ensembles of heads.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.networks.modules import eval_mode

IGNORED = -100  # the label of samples to ignore, as in PyTorch's cross-entropy


def ranks(logits, labels):
    """How many classes rank before the label, per sample: (B, classes), (B,) → (B,). Top-k is correct where rank < k.

    Ties are exact: of equal logits, the lower class ranks first. A sample with a NaN is never correct.
    """
    target = logits.gather(1, labels[:, None])
    above = ~(logits <= target)  # not `logits > target`: a comparison with NaN is False
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    tied = lower_class & (logits == target)
    return (above | tied).sum(1)


def count_hits(logits, labels, topk, ignored=None):
    """The number of samples whose label is in the top k, for each k in ``topk``: a list of scalars on the device.

    ``ignored``: which labels are IGNORED; None if none can be.
    """
    if topk == (1,):
        # The same result in half the operations: max returns the first of equal logits, and NaN if there is one
        highest, predicted = logits.max(1)
        not_nan = highest == highest
        return [((predicted == labels) & not_nan).sum()]
    if ignored is None:
        rank = ranks(logits, labels)
    else:
        rank = ranks(logits, labels.clamp(min=0)).masked_fill(ignored, logits.shape[1])
    return [(rank < k).sum() for k in topk]


class Meter:
    """Mean loss and top-k accuracy over all samples since the start of the epoch.

    ``update`` only queues work on the device; reading ``loss`` or ``top(k)`` waits for it. Both are NaN if there are no
    samples yet.
    """

    def __init__(self, topk=(1,)):
        self.topk = tuple(topk)
        self.begin()

    def begin(self):
        """Resets the meter for a new epoch."""
        self.count = 0
        # Scalars on the CPU are added to those of the first mini-batch without a copy to the device, which would wait
        self.summed_loss = torch.zeros(())
        self.hits = [torch.zeros(()) for _ in self.topk]

    def update(self, loss, logits, labels):
        """Adds a mini-batch: mean loss (scalar), logits (B, classes), and labels (B,).

        For soft labels (B, classes), as from mixup, the class with the largest share is the label. With logits (B, N,
        classes) and labels (B, N), every token is a sample, except those with the label −100. In labels (B,), −100 has
        no such meaning: counting it would cost several kernels in every step of every head.
        """
        samples = len(labels)
        ignored = None
        if logits.dim() == 3:
            logits = logits.flatten(0, 1)
            labels = labels.flatten()
            ignored = labels == IGNORED
            samples = (~ignored).sum()
            loss = torch.where(samples > 0, loss, 0.0)  # the mean over zero tokens is NaN
        elif labels.dim() == 2:
            labels = labels.argmax(1)
        wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
        hits = count_hits(logits.detach(), labels, self.topk, ignored)
        self.count += samples
        self.summed_loss = self.summed_loss.to(wide) + loss.detach().float() * samples
        self.hits = [total.to(wide) + more for total, more in zip(self.hits, hits, strict=True)]

    def per_sample(self, total):
        if self.count == 0:
            return math.nan
        return total / int(self.count)

    @property
    def loss(self):
        """Mean loss over samples."""
        return self.per_sample(self.summed_loss.item())

    def top(self, k):
        """Top-k accuracy in %."""
        return self.per_sample(100 * self.hits[self.topk.index(k)].item())

    @property
    def top1(self):
        """Top-1 accuracy in %."""
        return self.top(1)

    @property
    def top5(self):
        """Top-5 accuracy in %, for a meter with 5 in its ``topk``."""
        return self.top(5)

    def sums(self):
        """(2 + len(topk),) float64 on the CPU: number of samples, summed loss, hits for each k."""
        sums = torch.stack([self.summed_loss, *self.hits]).cpu().double()
        return torch.cat([torch.tensor([int(self.count)]).double(), sums])

    def state_dict(self):
        """{"sums": ``sums()``}, for checkpoints and for summing the meters of several processes."""
        return {"sums": self.sums()}

    def load_state_dict(self, state):
        """Restores ``state_dict``. Later mini-batches may be on a different device."""
        count, summed_loss, *hits = state["sums"]
        self.count = int(count)
        self.summed_loss = summed_loss
        self.hits = hits


@torch.inference_mode()
def evaluate(net, batches, heads=None, topk=(1,)):
    """Evaluates all heads of ``net`` in a single pass over ``batches`` in eval mode. Returns a list with one Meter per
    head.

    ``net(images)`` returns a list of logits (B, classes), or (B, N, classes) for sequences, as DecoupledNetwork does,
    or the logits of its only head. With ``heads`` (indices from 0), ``net(images, heads)`` returns the logits of those
    heads only. Afterwards, every submodule of ``net`` is back in its previous mode.
    """
    meters = []
    with eval_mode(net):
        for images, labels in batches:
            logits_of_heads = net(images) if heads is None else net(images, heads)
            if isinstance(logits_of_heads, torch.Tensor):
                logits_of_heads = [logits_of_heads]
            if not meters:
                meters = [Meter(topk) for _ in logits_of_heads]
            for meter, logits in zip(meters, logits_of_heads, strict=True):
                logits = logits.float()
                meter.update(cross_entropy(logits, labels), logits, labels)
    return meters


def cross_entropy(logits, labels):
    """Mean cross-entropy over samples, or over tokens for logits (B, N, classes) and labels (B, N)."""
    if logits.dim() == 3:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return F.cross_entropy(logits, labels)


def ensembles(outputs):
    """The ensemble of heads 0 to n for each n: a list of outputs (B, classes), one per head → as many ensembles.

    Output i has the weight 2^i / (2^(n+1) − 1). Outputs are probabilities in the ImageNet experiment (Sec. 5.5) and
    logits in the asynchronous one (Sec. 5.6).
    """
    return normalize_sums(weighted_sums(outputs))


def weighted_sums(outputs, first=0, sum_below=0):
    """The sum of 2^i × output i over heads 0 to n, for each n from ``first`` on: a list.

    ``outputs`` are those of the heads from ``first`` on; ``sum_below`` is the sum over the lower heads.
    """
    sums = []
    total = sum_below
    for index, output in enumerate(outputs, start=first):
        total = total + 2**index * output
        sums.append(total)
    return sums


def normalize_sums(sums, first=0):
    """The ensembles from head ``first`` on, given their ``weighted_sums``."""
    return [total / (2 ** (index + 1) - 1) for index, total in enumerate(sums, start=first)]


class WithEnsembles(nn.Module):
    """Wraps ``net`` for evaluation: images → a list of every head's logits (B, classes), followed by the ensemble of
    heads up to each head.

    Ensembles are of probabilities or, with ``probabilities=False``, of logits: see ``ensembles``.
    """

    def __init__(self, net, probabilities):
        super().__init__()
        self.net = net
        self.probabilities = probabilities

    def forward(self, images):
        logits_of_heads = [logits.float() for logits in self.net(images)]
        outputs = logits_of_heads
        if self.probabilities:
            outputs = [logits.softmax(1) for logits in logits_of_heads]
        return [*logits_of_heads, *ensembles(outputs)]
