"""Images held as uint8 on the training device; crop, flip and normalization happen there, a mini-batch at a time.

An epoch's order and augmentation come from the images' own generator, drawn on the CPU whatever the device: they are
the seed's alone. What has begun can stop after any mini-batch, and goes on there from a checkpoint.
"""

import copy
import zlib

import numpy as np
import torch
from torch.nn import functional as F

from decoupled.data.images import SIDE
from decoupled.errors import InputError

PADDING = 4  # of the random crop


class Batches:
    """Mini-batches (images (B, 3, 32, 32) float32 channels-last and normalized, labels (B,) int64) of one split.

    With ``augment``, an epoch is a new random order, each image cropped at random after zero padding by 4 and, with
    ``flip``, mirrored with probability one half (the paper's Sec. 5: the usual CIFAR augmentation). Without it, the
    images come in order. ``images`` is uint8 (N, 32, 32, 3), ``labels`` int64 (N,); both are kept on ``device``.

    ``form`` is the InputForm of other images for the same network. Iterating begins an epoch. So does ``begin``, and
    ``rest`` is then what is left of it.
    """

    def __init__(
        self,
        images,
        labels,
        batch_size,
        *,
        mean,
        std,
        description="images",
        form=None,
        augment=False,
        flip=True,
        drop_last=False,
        seed=0,
        device=None,
    ):
        # Guards a resumed run against other images under the same name.
        self.fingerprint = zlib.crc32(labels.cpu().numpy(), zlib.crc32(images.cpu().contiguous().numpy()))
        images, self.labels = images.to(device), labels.to(device)
        self.images = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING)) if augment else images
        self.batch_size = batch_size
        self.description, self.form = description, form
        self.augment, self.flip, self.drop_last = augment, flip, drop_last
        self.scale = 1 / (255 * torch.tensor(std, device=images.device))
        self.shift = torch.tensor(mean, device=images.device) * 255
        self.generator = torch.Generator().manual_seed(seed)
        self.place = len(self)  # mini-batches of the epoch that are gone: all, before the first begins
        self.start = None  # the generator's state before the epoch; None: none has begun

    def __len__(self):
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        self.begin()
        return self.rest()

    def begin(self):
        """Begins a new epoch."""
        self.start, self.place = self.generator.get_state(), 0
        self.drawn = self.draw() if self.augment else None

    def rest(self):
        """Iterates over what is left of the epoch that has begun."""
        while self.place < len(self):
            rows = slice(self.place * self.batch_size, (self.place + 1) * self.batch_size)
            self.place += 1
            if self.augment:
                order, tops, lefts, flips = (values[rows] for values in self.drawn)
                yield self.normalize(self.crop(order, tops, lefts, flips)), self.labels[order]
            else:
                yield self.normalize(self.images[rows]), self.labels[rows]

    def draw(self):
        """One epoch's randomness: order, top and left offsets in 0..8, flips, each (N,) on the data's device."""
        count, device = len(self.labels), self.images.device
        order = torch.randperm(count, generator=self.generator)
        tops, lefts = torch.randint(2 * PADDING + 1, (2, count), generator=self.generator)
        flips = torch.randint(2, (count,), generator=self.generator).bool()
        return tuple(values.to(device) for values in (order, tops, lefts, flips & self.flip))

    def crop(self, order, tops, lefts, flips):
        """The images ``order`` (B,), cropped at ``tops``, ``lefts`` of the padded image and mirrored where ``flips``:
        uint8 (B, 32, 32, 3).
        """
        span = torch.arange(SIDE, device=self.images.device)
        rows = tops[:, None] + span
        columns = lefts[:, None] + torch.where(flips[:, None], SIDE - 1 - span, span)
        return self.images[order[:, None, None], rows[:, :, None], columns[:, None, :]]

    def normalize(self, images):
        """uint8 (B, 32, 32, 3) → float32 (B, 3, 32, 32) in channels-last memory, zero mean and unit variance."""
        return images.float().sub_(self.shift).mul_(self.scale).permute(0, 3, 1, 2)

    def without_augmentation(self):
        """The same images, in order and not augmented: Batches of the same memory."""
        plain = copy.copy(self)
        if self.augment:
            plain.images = self.images[:, PADDING:-PADDING, PADDING:-PADDING]
        plain.augment = plain.drop_last = False
        plain.place = len(plain)
        return plain

    @property
    def outline(self):
        """What an Outline is made from."""
        return len(self.labels), self.batch_size, len(self)

    def __str__(self):
        return f"{len(self.labels)} images of {self.description}"

    def state_dict(self):
        start = self.generator.get_state() if self.start is None else self.start
        return {"start": start, "begun": self.start is not None, "place": self.place, "fingerprint": self.fingerprint}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.fingerprint:
            raise InputError(f"the run was trained on other images than these {self}: point --data-dir to its data set")
        if not 0 <= state["place"] <= len(self):
            raise ValueError(f"{state['place']} mini-batches of {len(self)}")
        self.generator.set_state(state["start"])
        if state["begun"]:
            self.begin()
        self.place = state["place"]


class Outline:
    """What a process above the lowest stage knows of Batches: ``count`` samples in ``length`` mini-batches of
    ``batch_size``, of each of which it learns from share ``replica`` of ``replicas``. It has a place in them, as they
    have, and ``weight`` is that of the latest share's mean loss in the mean over replicas.
    """

    def __init__(self, count, batch_size, length, replica=0, replicas=1):
        whole = [min(batch_size, count - first) for first in range(0, count, batch_size)][:length]
        self.whole, self.replicas = whole, replicas
        self.shares = [size // replicas + (replica < size % replicas) for size in whole]
        self.common = sum(size >= replicas for size in whole)  # mini-batches that every replica has a share of
        self.place, self.weight = length, 1.0

    def __len__(self):
        return len(self.whole)

    def begin(self):
        """Begins a new epoch."""
        self.place = 0

    def without_augmentation(self):
        """See Batches."""
        return copy.copy(self)

    @property
    def left(self):
        """The sizes of the shares that are still to come in this epoch."""
        return [size for size in self.shares[self.place :] if size]

    def advance(self):
        """Counts a mini-batch that has come."""
        self.weight = self.shares[self.place] * self.replicas / self.whole[self.place]
        self.place += 1

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def mix_seed(*numbers):
    """A 64-bit seed that depends on all of ``numbers`` (integers ≥ 0)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
