"""ImageNet, or any image folders DIR/{train,val}/<class>/<image>: read by worker processes as uint8, normalized on the
training device.

What is random about an image (place in the epoch, crop, flip) is drawn from the seed, the epoch and the image's number
alone. So neither the number of workers nor that of processes changes it, and a run that goes on in the middle of an
epoch sees what it would have seen.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from decoupled import InputError
from decoupled.data.batches import mix_seed
from decoupled.data.folders import check_classes, list_images
from decoupled.data.images import InputForm, read_image
from decoupled.training.flags import shortage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each channel, in [0, 1]
LAYOUT = "image folders are {train,val}/<class>/<image>"


class Images(Dataset):
    """``images[epoch, index]``: (uint8 (3, image_size, image_size), label), the image number ``index`` as ``transform``
    changes it in that epoch.
    """

    def __init__(self, samples, transform, seed):
        # One block of memory: workers share it, where a list would be copied
        self.paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.labels = torch.tensor([label for _, label in samples])
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.labels)

    def decode(self, index):
        """The image as stored: uint8 (3, h, w). Raises InputError, naming the file, when it cannot be used."""
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


class Share:
    """The keys (epoch, index) of this process's share of each mini-batch, from number ``start`` on: what a DataLoader
    calls a batch sampler.

    Mini-batches are those of a single process, each cut into as many runs of nearly equal length as there are
    processes. ``shuffle``: in a new order every epoch; otherwise as listed.
    """

    def __init__(self, count, batch_size, shuffle, seed, rank, processes):
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.rank, self.processes = rank, processes
        self.epoch, self.start = 0, 0
        self.limit = None  # mini-batches an epoch, at most

    def __len__(self):
        count = -(-self.count // self.batch_size)
        return count if self.limit is None else min(count, self.limit)

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

    Without other processes b is ``batch_size``, but for a shorter last one. Iterating begins an epoch. So does
    ``begin``, and ``rest`` is then what is left of it. ``weight`` is that of the latest share's mean loss in the mean
    over processes.
    """

    def __init__(self, folder, samples, transform, *, batch_size, shuffle, seed, workers, device, rank, processes):
        self.images = Images(samples, transform, seed)
        self.share = Share(len(samples), batch_size, shuffle, seed, rank, processes)
        self.device = device
        self.description = f"{len(samples)} images of {len({label for _, label in samples})} classes"
        self.place = len(self.share)  # mini-batches of the epoch that are gone: all, before the first begins
        self.weight = 1.0  # of the latest share's mean loss in the mean over processes
        ending = multiprocessing.Value("b", 0, lock=False)
        atexit.register(setattr, ending, "value", 1)
        persistent = {"persistent_workers": True, "worker_init_fn": partial(ignore_signals, ending)}
        options = {"num_workers": workers, **persistent} if workers else {}
        self.loader = DataLoader(self.images, batch_sampler=self.share, pin_memory=device.type == "cuda", **options)
        self.scale = 1 / (255 * torch.tensor(STD, device=device).view(3, 1, 1))
        self.shift = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
        names = "\n".join(f"{Path(path).relative_to(folder)} {label}" for path, label in samples)
        self.fingerprint = zlib.crc32(os.fsencode(names))  # guards a resumed run against other images

    def __len__(self):
        return len(self.share)

    def __iter__(self):
        self.begin()
        return self.rest()

    def begin(self):
        """Begins a new epoch."""
        self.share.epoch, self.place = self.share.epoch + 1, 0

    def rest(self):
        """Iterates over what is left of the epoch that has begun."""
        self.share.start = self.place
        try:
            for images, labels in self.loader if self.place < len(self) else ():
                size, count = self.share.batch_size, self.share.count
                whole = min(size, count - self.place * size)  # images in the mini-batch of all processes
                self.weight = len(labels) * self.share.processes / whole
                self.place += 1
                images = images.to(self.device, non_blocking=True)
                yield self.normalize(images), labels.to(self.device, non_blocking=True)
            return
        except InputError as error:  # a worker's comes with its traceback
            message = str(error).strip().splitlines()[-1].removeprefix("decoupled.InputError: ")
        except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or cannot start or send
            if isinstance(error, (ConnectionError, EOFError)):  # killed while it handed images over
                error = RuntimeError(f"DataLoader worker: {type(error).__name__}")
            if (message := shortage(error)) is None:
                raise
            sys.unraisablehook = lambda _: None  # PyTorch's loader, half-made, cannot be taken apart
        raise InputError(message)  # here, so that nothing holds on to the workers, for which Python would wait

    @property
    def outline(self):
        """What a decoupled.data.batches.Outline is made from."""
        return self.share.count, self.share.batch_size, len(self)

    @property
    def common(self):
        """How many mini-batches every process has a share of."""
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
        self.share.epoch, self.place = state["epoch"], state["place"]


def ignore_signals(ending, worker):
    """Ctrl-C and SIGTERM are for the process that trains, which needs its workers until the batch is finished: until
    ``ending`` is set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.value else None)


def spread(samples, count, flag):
    """``count`` of the samples, evenly spaced, so that many classes are among them; all of them for None. Raises
    InputError for too many.
    """
    if count is None:
        return samples
    if count > len(samples):
        raise InputError(f"{flag} {count} is more than the {len(samples)} images there are")
    return [samples[index * len(samples) // count] for index in range(count)]


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
    """(train, val, number of classes): ImageBatches of folder/train, cropped and mirrored at random, and of folder/val,
    cropped in the centre.

    ``batch_size`` is that of all ``processes`` together, each of which must get at least ``least`` images of it; an
    epoch has at most ``limit`` mini-batches. Raises InputError for folders or numbers that will not do.
    """
    train, val = (list_images(Path(folder) / split, LAYOUT) for split in ("train", "val"))
    check_classes(folder, ("train", "val"), (train, val))
    samples = spread(train.samples, train_samples, "--train-samples"), spread(val.samples, val_samples, "--val-samples")
    check_batches(len(samples[0]), batch_size, max(2, processes * least))
    if len(samples[1]) < processes:
        raise InputError(
            f"{folder}/val has {len(samples[1])} images, fewer than the {processes} processes: start fewer"
        )
    resize = image_size * 256 // 224
    augment = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
    centre = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(image_size)])
    common = {
        "batch_size": batch_size,
        "seed": seed,
        "workers": workers,
        "device": torch.device(device),
        "rank": rank,
        "processes": processes,
    }
    batches = [
        ImageBatches(folder, chosen, transform, shuffle=shuffle, **common)
        for chosen, transform, shuffle in zip(samples, (augment, centre), (True, False), strict=True)
    ]
    batches[0].share.limit = limit
    batches[1].form = InputForm(train.classes, MEAN, STD, resize=resize, crop=image_size, size=image_size)
    return *batches, len(train.classes)


def check_batches(count, batch_size, needed):
    """Raises InputError when a mini-batch would have fewer images than ``needed``: one for each process, and two for
    batch norm.
    """
    smallest = count % batch_size or batch_size
    if count < batch_size:
        raise InputError(f"{count} training images are fewer than one batch of {batch_size}: choose a smaller -b")
    if smallest < needed:
        raise InputError(
            f"{count} images in batches of {batch_size} leave a batch of {smallest}, where at least "
            f"{needed} are needed: choose another -b"
        )
