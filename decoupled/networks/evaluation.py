"""Accuracy and loss that stay on the device until they are read, single-pass evaluation of every head, and ensembles of
heads.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.networks.modules import eval_mode

IGNORED = -100  # the label of tokens that do not count, as in PyTorch's cross-entropy


def ranks(logits, labels):
    """How many classes rank before the label, per sample: (B, classes), (B,) → (B,). Top-k is correct where rank < k.

    Exact with ties: of equal logits the lower class ranks first. A sample with a NaN is never correct.
    """
    target = logits.gather(1, labels[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (~(logits <= target) | (lower_class & (logits == target))).sum(1)


def count_hits(logits, labels, topk):
    """The number of samples whose top k has the label, for each k in ``topk``: a list of scalars on the device."""
    if topk == (1,):  # in half as many operations: max returns the first of equal logits, and a NaN where there is one
        highest, predicted = logits.max(1)
        return [((predicted == labels) & (highest == highest)).sum()]
    rank = ranks(logits, labels.clamp(min=0)).masked_fill(labels == IGNORED, logits.shape[1])
    return [(rank < k).sum() for k in topk]


class Meter:
    """Mean loss and top-k accuracy over all samples since the epoch began.

    ``update`` only queues work on the device; reading ``loss`` or ``top(k)`` waits for it. Both are NaN while there are
    no samples.
    """

    def __init__(self, topk=(1,)):
        self.topk = tuple(topk)
        self.begin()

    def begin(self):
        """Resets the meter for a new epoch."""
        self.count = 0
        # Scalars on the CPU: adding them to the first mini-batch's needs no copy to the device, which would wait for it
        self.losses = torch.zeros(())
        self.hits = [torch.zeros(()) for _ in self.topk]

    def update(self, loss, logits, labels):
        """Adds a mini-batch: mean loss (scalar), logits (B, classes), and labels (B,).

        Of soft labels (B, classes), as mixup makes them, the class with the largest share counts. With logits
        (B, N, classes) and labels (B, N), every token is a sample, except for those with the label −100.
        """
        samples = len(labels)
        if logits.dim() == 3:
            logits = logits.flatten(0, 1)
            labels = labels.flatten()
            samples = (labels != IGNORED).sum()
            loss = torch.where(samples > 0, loss, 0.0)  # the mean over no token is NaN
        elif labels.dim() == 2:
            labels = labels.argmax(1)
        wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
        hits = count_hits(logits.detach(), labels, self.topk)
        self.count += samples
        self.losses = self.losses.to(wide) + loss.detach().float() * samples
        self.hits = [total.to(wide) + more for total, more in zip(self.hits, hits, strict=True)]

    def per_sample(self, total):
        if self.count == 0:
            return math.nan
        return total / int(self.count)

    @property
    def loss(self):
        """Mean loss over samples."""
        return self.per_sample(self.losses.item())

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
        sums = torch.stack([self.losses, *self.hits]).cpu().double()
        return torch.cat([torch.tensor([int(self.count)]).double(), sums])

    def state_dict(self):
        """{"sums": ``sums()``}, for checkpoints and for adding up the meters of several processes."""
        return {"sums": self.sums()}

    def load_state_dict(self, state):
        """Restores ``state_dict``. Later mini-batches may be on another device."""
        count, losses, *hits = state["sums"]
        self.count = int(count)
        self.losses = losses
        self.hits = hits


@torch.inference_mode()
def evaluate(net, batches, heads=None, topk=(1,)):
    """One Meter per head of ``net``, from a single pass over ``batches`` in eval mode: a list.

    ``net(images)`` returns a list of logits (B, classes), or (B, N, classes) for sequences, as DecoupledNetwork does,
    or the logits of its only head. With ``heads``, ``net(images, heads)`` returns those of these heads (indices from
    0). Afterwards every submodule of ``net`` is in the mode it had.
    """
    meters = []
    with eval_mode(net):
        for images, labels in batches:
            every_logits = net(images) if heads is None else net(images, heads)
            if isinstance(every_logits, torch.Tensor):
                every_logits = [every_logits]
            if not meters:
                meters = [Meter(topk) for _ in every_logits]
            for meter, logits in zip(meters, every_logits, strict=True):
                logits = logits.float()
                meter.update(cross_entropy(logits, labels), logits, labels)
    return meters


def cross_entropy(logits, labels):
    """Mean over samples, or over the tokens of logits (B, N, classes) and labels (B, N)."""
    if logits.dim() == 3:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return F.cross_entropy(logits, labels)


def ensembles(every_output):
    """The ensemble of heads 0 to n for each n: a list of outputs (B, classes), one per head → as many ensembles.

    Output i has the weight 2^i / (2^(n+1) − 1). Outputs are probabilities in the ImageNet experiment (Sec. 5.5) and
    logits in the asynchronous one (Sec. 5.6).
    """
    return means(weighted_sums(every_output))


def weighted_sums(every_output, first=0, total=0):
    """The sum of 2^i × output i over heads 0 to n, for each n from ``first`` on: a list. ``total`` is the sum over the
    heads below ``first``, ``every_output`` has those from ``first`` on.
    """
    sums = []
    for index, output in enumerate(every_output, start=first):
        total = total + 2**index * output
        sums.append(total)
    return sums


def means(sums, first=0):
    """The ensembles whose ``weighted_sums`` are ``sums``, from head ``first`` on."""
    return [total / (2 ** (index + 1) - 1) for index, total in enumerate(sums, start=first)]


class WithEnsembles(nn.Module):
    """Wraps ``net`` for evaluation: images → a list of every head's logits (B, classes), followed by every head's
    ensemble of the heads up to it.

    Ensembles are of probabilities or, with ``probabilities=False``, of logits: see ``ensembles``.
    """

    def __init__(self, net, probabilities):
        super().__init__()
        self.net = net
        self.probabilities = probabilities

    def forward(self, images):
        every_logits = [logits.float() for logits in self.net(images)]
        every_output = every_logits
        if self.probabilities:
            every_output = [logits.softmax(1) for logits in every_logits]
        return [*every_logits, *ensembles(every_output)]
