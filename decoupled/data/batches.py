"""The mini-batches of a run: the interface that a run needs, and mini-batches of images that stay on the training
device.

A run accepts any object with this interface. Batches below is one, decoupled.data.loader.Loader another. Each
mini-batch is a pair (inputs, labels) on the run's device.

__iter__()                  begins an epoch and iterates over it
begin()                     begins an epoch: a new order, from the first mini-batch
rest()                      iterates over the rest of the current epoch
__len__()                   number of mini-batches in an epoch
state_dict()                the place in the epoch, and what else a new process needs to continue from there
load_state_dict(state)      continues with the next mini-batch. Raises InputError if the state belongs to other data
__str__()                   a line for the log
close()                     optional: called when the run ends

Required if several stages share the modules:

outline_arguments           (number of samples, batch size, number of mini-batches), for the Outline of the stages above
done                        number of completed mini-batches in the epoch
example                     a mini-batch of two samples, with the shapes and types that stages send

Required if replicas share each mini-batch:

weight                      weight of the latest share's mean loss in the mean over replicas
common                      number of mini-batches of which every replica has a share

An InputForm as ``form`` lets ``python -m decoupled predict`` read images for the network.
"""

import copy
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from decoupled.errors import InputError

PADDING = 4  # padding of the random crop, in pixels


class Augmentation(NamedTuple):
    """The random choices for an epoch, or for one mini-batch of it: tensors (N,) on the images' device.

    order  the indices of the images
    tops   offset of the crop in the padded image, 0 to 8
    lefts  the same, horizontally
    flips  whether the crop is mirrored
    """

    order: torch.Tensor
    tops: torch.Tensor
    lefts: torch.Tensor
    flips: torch.Tensor


class Batches:
    """Mini-batches of images held as uint8 on the training device, where they are cropped, flipped and normalized:
    images (B, 3, h, w) float32, channels-last and normalized; labels (B,) int64.

    The order and the augmentation of an epoch come from a separate generator, which is on the CPU for every device, so
    they depend only on the seed.

    ``images`` is uint8 (N, h, w, 3) and ``labels`` int64 (N,); both are kept on ``device``. With ``augment``, every
    epoch has a new random order, and each image is zero-padded by 4, cropped at random to its size and, with ``flip``,
    mirrored with probability one half (Sec. 5: the usual CIFAR augmentation). Without it, the images come in order.

    ``mean`` and ``std`` are of each channel, in [0, 1]. ``description`` names the images in the log, ``form`` is the
    InputForm that other images need for the same network. Iterating begins an epoch. So does ``begin``; ``rest`` then
    iterates over the rest of it. Raises InputError for images of another type or shape.
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
        check_images(images, labels)
        check_statistics(mean, std)
        # Prevents a run from resuming with different images of the same name
        self.fingerprint = zlib.crc32(labels.cpu().numpy(), zlib.crc32(images.cpu().contiguous().numpy()))
        self.height, self.width = images.shape[1:3]
        self.images = images.to(device)
        if augment:
            self.images = F.pad(self.images, (0, 0, PADDING, PADDING, PADDING, PADDING))
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.description = description
        self.form = form
        self.augment = augment
        self.flip = flip
        self.drop_last = drop_last
        self.scale = 1 / (255 * torch.tensor(std, device=self.images.device))
        self.shift = torch.tensor(mean, device=self.images.device) * 255
        self.generator = torch.Generator().manual_seed(seed)
        self.done = len(self)  # completed mini-batches of this epoch; all of them before the first epoch
        self.generator_state = None  # the generator's state at the start of the epoch; None before the first

    def __len__(self):
        full, remainder = divmod(len(self.labels), self.batch_size)
        if remainder > 0 and not self.drop_last:
            return full + 1
        return full

    def __iter__(self):
        self.begin()
        return self.rest()

    def begin(self):
        """Begins a new epoch."""
        self.generator_state = self.generator.get_state()
        self.done = 0
        if self.augment:
            self.augmentation = self.draw()

    def rest(self):
        """Iterates over the rest of the current epoch."""
        while self.done < len(self):
            rows = slice(self.done * self.batch_size, (self.done + 1) * self.batch_size)
            self.done += 1
            if self.augment:
                drawn = Augmentation(*(values[rows] for values in self.augmentation))
                yield self.normalize(self.crop(drawn)), self.labels[drawn.order]
            else:
                yield self.normalize(self.images[rows]), self.labels[rows]

    def draw(self):
        """Draws the Augmentation of an epoch."""
        count = len(self.labels)
        device = self.images.device
        order = torch.randperm(count, generator=self.generator)
        tops, lefts = torch.randint(2 * PADDING + 1, (2, count), generator=self.generator)
        flips = torch.randint(2, (count,), generator=self.generator).bool()
        if not self.flip:
            flips = torch.zeros_like(flips)
        return Augmentation(order.to(device), tops.to(device), lefts.to(device), flips.to(device))

    def crop(self, drawn):
        """Crops and flips the images of a mini-batch, given its Augmentation: uint8 (B, h, w, 3)."""
        down = torch.arange(self.height, device=self.images.device)
        across = torch.arange(self.width, device=self.images.device)
        rows = drawn.tops[:, None] + down
        columns = drawn.lefts[:, None] + torch.where(drawn.flips[:, None], self.width - 1 - across, across)
        return self.images[drawn.order[:, None, None], rows[:, :, None], columns[:, None, :]]

    def normalize(self, images):
        """uint8 (B, h, w, 3) → float32 (B, 3, h, w) in channels-last memory, zero mean and unit variance."""
        return images.float().sub_(self.shift).mul_(self.scale).permute(0, 3, 1, 2)

    def without_augmentation(self):
        """Returns Batches of the same images (sharing their memory), in order and without augmentation."""
        plain = copy.copy(self)
        if self.augment:
            plain.images = self.images[:, PADDING:-PADDING, PADDING:-PADDING]
        plain.augment = False
        plain.drop_last = False
        plain.done = len(plain)
        return plain

    @property
    def outline_arguments(self):
        """The first three arguments of an Outline of these mini-batches, for processes without images."""
        return len(self.labels), self.batch_size, len(self)

    @property
    def example(self):
        """A mini-batch of two samples, all zeros."""
        images = torch.zeros(2, 3, self.height, self.width, device=self.images.device)
        return images.to(memory_format=torch.channels_last), self.labels.new_zeros(2)

    def __str__(self):
        return f"{len(self.labels)} images of {self.description}"

    def state_dict(self):
        begun = self.generator_state is not None
        start = self.generator_state if begun else self.generator.get_state()
        return {"start": start, "begun": begun, "place": self.done, "fingerprint": self.fingerprint}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                f"the checkpoint is from a run on other images than these {self}: use that run's data set (--data-dir)"
            )
        if not 0 <= state["place"] <= len(self):
            raise InputError(
                f"the checkpoint is {state['place']} mini-batches into an epoch, which has only {len(self)} here: use "
                "its batch size"
            )
        self.generator.set_state(state["start"])
        if state["begun"]:
            self.begin()
        self.done = state["place"]


def check_images(images, labels):
    """Raises InputError for images that would be normalized or cropped incorrectly."""
    if images.dtype != torch.uint8:
        raise InputError(f"images are {images.dtype}: Batches needs uint8, 0 to 255, and normalizes them itself")
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"images have the shape {tuple(images.shape)}: Batches needs (N, h, w, 3)")
    if len(images) != len(labels):
        raise InputError(f"{len(images)} images but {len(labels)} labels: each image needs one label")


def check_statistics(*statistics):
    """Raises InputError for a mean or standard deviation on the scale 0 to 255, which would make all images
    look alike.
    """
    for values in statistics:
        if torch.tensor(values).max() > 1:
            raise InputError(f"mean or std {values} is above 1: Batches needs those of channels in [0, 1]")


class Outline:
    """What a process without data knows about the mini-batches: the size of each one, and how many are done.

    ``count`` samples come in ``length`` mini-batches of ``batch_size``. Each is divided into ``replicas`` shares, and
    this process learns from share ``replica``. ``example`` is a mini-batch of two samples. ``weight`` is the weight of
    the latest share's mean loss in the mean over replicas.
    """

    def __init__(self, count, batch_size, length, replica=0, replicas=1, example=None):
        self.example = example
        self.replicas = replicas
        self.whole = [min(batch_size, count - first) for first in range(0, count, batch_size)][:length]
        self.shares = []
        for size in self.whole:
            share, remainder = divmod(size, replicas)
            self.shares.append(share + 1 if replica < remainder else share)
        self.common = sum(size >= replicas for size in self.whole)  # mini-batches of which every replica has a share
        self.done = length
        self.weight = 1.0

    def __len__(self):
        return len(self.whole)

    def begin(self):
        """Begins a new epoch."""
        self.done = 0

    def without_augmentation(self):
        """Returns a copy, like Batches.without_augmentation."""
        return copy.copy(self)

    @property
    def left(self):
        """The sizes of this process's remaining shares in the epoch, except empty ones."""
        return [size for size in self.shares[self.done :] if size]

    def advance(self):
        """Advances by one mini-batch."""
        self.weight = self.shares[self.done] * self.replicas / self.whole[self.done]
        self.done += 1

    def state_dict(self):
        return {"place": self.done}

    def load_state_dict(self, state):
        self.done = state["place"]


def mix_seed(*numbers):
    """A 64-bit seed that depends on all of ``numbers`` (integers ≥ 0)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
