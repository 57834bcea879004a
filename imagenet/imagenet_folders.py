"""ImageNet, or any image folders DIR/{train,val}/<class>/<image>: read by worker processes as uint8, normalized on the
training device.

An image's place in the epoch, its crop and its flip depend only on the seed, the epoch and the image's index. The
number of workers or processes does not matter, and a run that resumes in the middle of an epoch continues with the same
images.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from decoupled import InputError
from decoupled.data.folders import check_classes, list_images
from decoupled.data.images import InputForm, read_image
from decoupled.data.loader import Loader

MEAN = (0.485, 0.456, 0.406)  # of each channel, in [0, 1]
STD = (0.229, 0.224, 0.225)
SIZES = 1000  # number of files whose size a fingerprint has: all would take minutes on a network file system
LAYOUT = "image folders are {train,val}/<class>/<image>"


class Images(Dataset):
    """``images[index]`` is image number ``index``, after ``transform``, and its label: uint8 (3, image_size,
    image_size), int64 ().
    """

    def __init__(self, samples, transform):
        # One block of memory, which workers share; a list would be copied
        self.paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.labels = torch.tensor([label for _, label in samples])
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def decode(self, index):
        """The image as stored: uint8 (3, h, w). Raises InputError, naming the file, if it cannot be used."""
        return v2.functional.pil_to_tensor(read_image(os.fsdecode(self.paths[index])))

    def __getitem__(self, index):
        return self.transform(self.decode(index)), self.labels[index]


class ImageBatches(Loader):
    """A Loader of images (b, 3, s, s) float32, channels-last and normalized, and labels (b,) int64."""

    def __init__(self, folder, samples, transform, batch_size, *, note="", **options):
        classes = {label for _, label in samples}
        super().__init__(
            Images(samples, transform),
            batch_size,
            description=f"{len(samples)} images of {len(classes)} classes{note}",
            fingerprint=fingerprint(folder, samples),
            **options,
        )
        self.scale = 1 / (255 * torch.tensor(STD, device=self.device).view(3, 1, 1))
        self.shift = torch.tensor(MEAN, device=self.device).view(3, 1, 1) * 255

    def prepare(self, images):
        """uint8 (b, 3, h, w) → float32 in channels-last memory, zero mean and unit variance."""
        images = images.to(self.device, non_blocking=True)
        return images.to(torch.float32, memory_format=torch.channels_last).sub_(self.shift).mul_(self.scale)


def fingerprint(folder, samples):
    """Guards a resumed run against other images: a checksum of the names (relative to ``folder``) and labels of
    ``samples``, and of the sizes of SIZES of their files, which change when images are resized or recompressed.
    """
    lines = [f"{Path(path).relative_to(folder)} {label}" for path, label in samples]
    lines += [str(size(path)) for path, _ in samples[:: -(-len(samples) // SIZES)]]
    return zlib.crc32(os.fsencode("\n".join(lines)))


def size(path):
    """The size of a file in bytes, or 0 if it cannot be determined; reading the image will report the reason."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


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
    min_share=1,
    limit=None,
):
    """Returns (train, val, number of classes): ImageBatches of folder/train, randomly cropped and mirrored, and of
    folder/val, center-cropped.

    ``batch_size`` is the total of all ``processes``, each of which must get at least ``min_share`` images; a training
    epoch has at most ``limit`` mini-batches. Raises InputError for missing or bad folders, for more samples than
    available, and for batches too small for the processes or batch norm.
    """
    folder = Path(folder)
    train = list_images(folder / "train", LAYOUT)
    val = list_images(folder / "val", LAYOUT)
    check_classes(folder, ("train", "val"), (train, val))
    train_images = spread(train.samples, train_samples, "--train-samples")
    val_images = spread(val.samples, val_samples, "--val-samples")
    check_batches(len(train_images), batch_size, max(2, processes * min_share))
    if len(val_images) < processes:
        raise InputError(
            f"{folder}/val has {len(val_images)} images, fewer than the {processes} processes: start fewer"
        )
    resize = image_size * 256 // 224
    common = {"seed": seed, "workers": workers, "device": device, "replica": rank, "replicas": processes}
    train_batches = ImageBatches(
        folder,
        train_images,
        v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]),
        batch_size,
        shuffle=True,
        limit=limit,
        note=train.describe_left_out(folder / "train"),
        **common,
    )
    val_batches = ImageBatches(
        folder,
        val_images,
        v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(image_size)]),
        batch_size,
        note=val.describe_left_out(folder / "val"),
        form=InputForm(train.classes, MEAN, STD, resize=resize, crop=image_size, size=image_size),
        **common,
    )
    return train_batches, val_batches, len(train.classes)


def spread(samples, count, flag):
    """``count`` of the samples, evenly spaced to include many classes; all samples if ``count`` is None.

    Raises InputError if there are fewer.
    """
    if count is None:
        return samples
    if count > len(samples):
        raise InputError(f"{flag} {count} is more than the {len(samples)} images in the folder")
    return [samples[index * len(samples) // count] for index in range(count)]


def check_batches(count, batch_size, needed):
    """Raises InputError if a mini-batch would have fewer than ``needed`` images: enough for all processes, and two for
    batch norm.
    """
    if count < batch_size:
        raise InputError(f"{count} training images are fewer than one batch of {batch_size}: choose a smaller -b")
    smallest = count % batch_size or batch_size
    if smallest < needed:
        raise InputError(
            f"{count} images in batches of {batch_size} leave a batch of {smallest}, where at least {needed} are "
            "needed: choose another -b"
        )
