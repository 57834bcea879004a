"""ImageNet, or any image folders DIR/{train,val}/<class>/<image>: read by worker processes as uint8, normalized on the
training device.

An image's place in the epoch, its crop and its flip are drawn from the seed, the epoch and the image's number alone. So
they do not depend on the number of workers or processes, and a run that resumes in the middle of an epoch continues
with the same images.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from decoupled import InputError
from decoupled.data.batches import mix_seed
from decoupled.data.folders import check_classes, list_images
from decoupled.data.images import InputForm, read_image

MEAN = (0.485, 0.456, 0.406)  # of each channel, in [0, 1]
STD = (0.229, 0.224, 0.225)
SIZES = 1000  # of files that a fingerprint has: asking for all would take minutes on a network file system
LAYOUT = "image folders are {train,val}/<class>/<image>"


class Images(Dataset):
    """``images[epoch, index]`` is the image number ``index``, as ``transform`` changes it in that epoch, and its label:
    uint8 (3, image_size, image_size), int64 ().
    """

    def __init__(self, samples, transform, seed):
        # One block of memory: workers share it, where a list would be copied
        self.paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.labels = torch.tensor([label for _, label in samples])
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.labels)

    def decode(self, index):
        """The image as stored: uint8 (3, h, w). Raises InputError, naming the file, where it cannot be used."""
        return v2.functional.pil_to_tensor(read_image(os.fsdecode(self.paths[index])))

    def __getitem__(self, key):
        epoch, index = key
        image = self.decode(index)
        state = torch.get_rng_state()  # torchvision's transforms draw from PyTorch's own generator
        try:
            torch.default_generator.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), self.labels[index]
        finally:
            torch.set_rng_state(state)

    def __getitems__(self, keys):
        """What a DataLoader asks for: a mini-batch, or the InputError that ends the run, which a worker cannot raise in
        the process that trains.
        """
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return error


def collate(samples):
    """Stacks a mini-batch; an InputError passes."""
    if isinstance(samples, InputError):
        return samples
    return default_collate(samples)


class Share:
    """A batch sampler: the keys (epoch, index) of this process's share of each mini-batch, from number ``start`` on.

    Mini-batches are those of a single process, each cut into as many runs of nearly equal length as there are
    processes. With ``shuffle`` they come in a new order every epoch, otherwise as listed.
    """

    def __init__(self, count, batch_size, shuffle, seed, rank, processes, limit=None):
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.limit = limit  # of mini-batches per epoch
        self.epoch = 0
        self.start = 0

    def __len__(self):
        count = -(-self.count // self.batch_size)
        if self.limit is None:
            return count
        return min(count, self.limit)

    def __iter__(self):
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
        else:
            order = torch.arange(self.count)
        for batch in order.split(self.batch_size)[self.start : len(self)]:
            share = batch.tensor_split(self.processes)[self.rank]
            if len(share):
                yield [(self.epoch, index) for index in share.tolist()]


class ImageBatches:
    """Iterates over this process's share of the mini-batches: images (b, 3, s, s) float32, channels-last and
    normalized, labels (b,) int64.

    With one process b is ``batch_size``, except for a smaller last one. Iterating begins an epoch. So does ``begin``;
    ``rest`` then iterates over what is left of it. ``weight`` is the weight of the latest share's mean loss in the mean
    over processes. ``form`` is the InputForm that other images need for the same network.
    """

    def __init__(self, folder, samples, transform, share, *, note="", form=None, workers=0, device="cpu"):
        self.images = Images(samples, transform, share.seed)
        self.share = share
        self.device = torch.device(device)
        self.form = form
        classes = {label for _, label in samples}
        self.description = f"{len(samples)} images of {len(classes)} classes{note}"
        self.place = len(share)  # mini-batches of the epoch that are done: all, before the first begins
        self.weight = 1.0
        self.loader = DataLoader(
            self.images,
            batch_sampler=share,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            **worker_options(workers),
        )
        self.scale = 1 / (255 * torch.tensor(STD, device=self.device).view(3, 1, 1))
        self.shift = torch.tensor(MEAN, device=self.device).view(3, 1, 1) * 255
        self.fingerprint = fingerprint(folder, samples)

    def __len__(self):
        return len(self.share)

    def __iter__(self):
        self.begin()
        return self.rest()

    def begin(self):
        """Begins a new epoch."""
        self.share.epoch += 1
        self.place = 0

    def rest(self):
        """Iterates over what is left of the epoch that has begun."""
        if self.place == len(self):
            return
        self.share.start = self.place
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            images, labels = batch
            self.weight = len(labels) * self.share.processes / self.images_in_batch(self.place)
            self.place += 1
            images = images.to(self.device, non_blocking=True)
            yield self.normalize(images), labels.to(self.device, non_blocking=True)

    def images_in_batch(self, place):
        """The number of images in mini-batch ``place`` of all processes."""
        return min(self.share.batch_size, self.share.count - place * self.share.batch_size)

    @property
    def outline(self):
        """The first arguments of the decoupled.data.batches.Outline of these mini-batches."""
        return self.share.count, self.share.batch_size, len(self)

    @property
    def common(self):
        """The number of mini-batches of which every process has a share."""
        full, rest = divmod(self.share.count, self.share.batch_size)
        return full + (rest >= self.share.processes)

    def close(self):
        """Ends the worker processes, which the loader keeps between epochs, once no iteration holds on to them."""
        self.loader = None

    def normalize(self, images):
        """uint8 (B, 3, h, w) → float32 in channels-last memory, zero mean and unit variance."""
        return images.to(torch.float32, memory_format=torch.channels_last).sub_(self.shift).mul_(self.scale)

    def __str__(self):
        return self.description

    def state_dict(self):
        return {"fingerprint": self.fingerprint, "epoch": self.share.epoch, "place": self.place}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.fingerprint:
            raise InputError(f"the run was trained on other images than these {self}: name its folder")
        if not 0 <= state["place"] <= len(self):
            raise ValueError(f"{state['place']} mini-batches of {len(self)}")
        self.share.epoch = state["epoch"]
        self.place = state["place"]


def fingerprint(folder, samples):
    """Guards a resumed run against other images: a checksum of the names, relative to ``folder``, and labels of
    ``samples``, and of the sizes of SIZES of their files, which change when images are resized or compressed anew.
    """
    lines = [f"{Path(path).relative_to(folder)} {label}" for path, label in samples]
    lines += [str(size(path)) for path, _ in samples[:: -(-len(samples) // SIZES)]]
    return zlib.crc32(os.fsencode("\n".join(lines)))


def size(path):
    """The size of a file in bytes; 0 where that cannot be found out, which reading the image will report."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


# Worker processes


def worker_options(workers):
    """The DataLoader's arguments for so many worker processes. Raises InputError where they could hand nothing over."""
    if workers == 0:
        return {}
    check_sockets()
    ending = multiprocessing.Value("b", 0, lock=False)  # whether the process that trains is ending
    atexit.register(setattr, ending, "value", 1)
    return {"num_workers": workers, "persistent_workers": True, "worker_init_fn": partial(ignore_signals, ending)}


def check_sockets():
    """Raises InputError where workers cannot open the sockets over which they hand over tensors: they would print a
    traceback each, and the run would wait for ever. A socket's path has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(os.path.join(folder, "listener-abcdefgh"))  # as long as the names that multiprocessing draws
        except OSError as error:
            raise InputError(
                f"TMPDIR {tempfile.gettempdir()} cannot hold the sockets of the processes that read images ({error}): "
                "set TMPDIR to a short path such as /tmp, or read without such processes, by -j 0"
            ) from error


def ignore_signals(ending, worker):
    """Makes a worker ignore Ctrl-C and, until ``ending`` is set, SIGTERM: they are for the process that trains, which
    needs its workers until the mini-batch is finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.value else None)


# Loading


def load(
    folder,
    *,
    image_size=224,
    batch_size=256,
    workers=4,
    seed=1,
    device="cpu",
    train_samples=None,
    val_samples=None,
    rank=0,
    processes=1,
    least=1,
    limit=None,
):
    """Returns (train, val, number of classes): ImageBatches of folder/train, cropped and mirrored at random, and of
    folder/val, cropped in the center.

    ``batch_size`` is that of all ``processes`` together, each of which must get at least ``least`` images of it; an
    epoch of training has at most ``limit`` mini-batches. Raises InputError for folders or numbers that will not do.
    """
    folder = Path(folder)
    train = list_images(folder / "train", LAYOUT)
    val = list_images(folder / "val", LAYOUT)
    check_classes(folder, ("train", "val"), (train, val))
    train_images = spread(train.samples, train_samples, "--train-samples")
    val_images = spread(val.samples, val_samples, "--val-samples")
    check_batches(len(train_images), batch_size, max(2, processes * least))
    if len(val_images) < processes:
        raise InputError(
            f"{folder}/val has {len(val_images)} images, fewer than the {processes} processes: start fewer"
        )
    resize = image_size * 256 // 224
    train_batches = ImageBatches(
        folder,
        train_images,
        v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]),
        Share(len(train_images), batch_size, True, seed, rank, processes, limit),
        note=train.describe_left_out(folder / "train"),
        workers=workers,
        device=device,
    )
    val_batches = ImageBatches(
        folder,
        val_images,
        v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(image_size)]),
        Share(len(val_images), batch_size, False, seed, rank, processes),
        note=val.describe_left_out(folder / "val"),
        form=InputForm(train.classes, MEAN, STD, resize=resize, crop=image_size, size=image_size),
        workers=workers,
        device=device,
    )
    return train_batches, val_batches, len(train.classes)


def spread(samples, count, flag):
    """``count`` of the samples, evenly spaced, so that many classes are among them; all of them for None. Raises
    InputError for too many.
    """
    if count is None:
        return samples
    if count > len(samples):
        raise InputError(f"{flag} {count} is more than the {len(samples)} images there are")
    return [samples[index * len(samples) // count] for index in range(count)]


def check_batches(count, batch_size, needed):
    """Raises InputError where a mini-batch would have fewer images than ``needed``: as many as the processes need, and
    two for batch norm.
    """
    if count < batch_size:
        raise InputError(f"{count} training images are fewer than one batch of {batch_size}: choose a smaller -b")
    smallest = count % batch_size or batch_size
    if smallest < needed:
        raise InputError(
            f"{count} images in batches of {batch_size} leave a batch of {smallest}, where at least {needed} are "
            "needed: choose another -b"
        )
