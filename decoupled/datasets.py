"""The data sets of the CIFAR experiments, read as uint8 tensors of 32×32 RGB images."""

import gzip
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch.nn import functional as F

from decoupled import InputError
from decoupled.images import SIDE, Batches

DATASETS = ("cifar10", "cifar100", "fashion-mnist", "digits")
# Mean and standard deviation of each channel in [0, 1]. CIFAR-10's are those of the released code; other sets' come
# from their training images.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
WITHOUT_DOWNLOAD = "--dataset digits needs no download"


def load(
    dataset,
    data_dir="data",
    *,
    batch_size,
    test_batch_size=1000,
    train_samples=None,
    drop_last=False,
    seed=0,
    device="cpu",
):
    """(train, test, number of classes): the training split augmented, the test split as it is; both are Batches on
    ``device``.

    ``train_samples`` keeps that many first training images. Image folders are read one image of each class in turn, so
    that the first are of every class. Raises InputError for an unknown data set, missing or damaged files, or an
    impossible number of samples.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    (images, labels), test, source = READERS[dataset](dataset, Path(data_dir))
    classes = int(labels.max()) + 1
    samples = len(labels) if train_samples is None else train_samples
    if samples > len(labels):
        raise InputError(f"--train-samples {samples} is more than the {len(labels)} training images of {dataset}")
    if samples < batch_size:
        raise InputError(
            f"{samples} training images are fewer than one batch of {batch_size}: choose a smaller "
            "--batch-size or more samples"
        )
    if batch_size == 1 or (samples % batch_size == 1 and not drop_last):
        raise InputError(
            f"{samples} images in batches of {batch_size} leave a batch of one image, which batch "
            "norm cannot learn from"
        )
    images, labels = images[:samples], labels[:samples]
    if dataset == "cifar10":
        statistics = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    else:
        pixels = images.reshape(-1, 3).double() / 255
        statistics = {"mean": pixels.mean(0).tolist(), "std": pixels.std(0).tolist()}
    common = {**statistics, "description": f"{dataset} ({source})"}
    common |= {"device": device}
    augmented = {"augment": True, "flip": dataset != "digits", "drop_last": drop_last, "seed": seed}
    return (
        Batches(images, labels, batch_size, **augmented, **common),
        Batches(*test, test_batch_size, **common),
        classes,
    )


def read_cifar(dataset, data_dir):
    """CIFAR-10 or -100 from image folders in ``data_dir`` or ``data_dir/dataset``, else torchvision's files in
    ``data_dir``, downloaded if absent.
    """
    for folder in (data_dir / dataset, data_dir):
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            return read_folders(folder)
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    splits = download(dataset, data_dir, lambda train: kind(data_dir, train=train, download=True))
    return *((torch.from_numpy(s.data), torch.tensor(s.targets)) for s in splits), "original"


def download(dataset, data_dir, read):
    """[read(train=True), read(train=False)] of a torchvision data set, with a clear error where it cannot be had."""
    if not data_dir.is_dir() and str(data_dir) != "data":
        raise InputError(
            f"--data-dir {data_dir} is no folder: create it to download {dataset} there, or name the one that holds it"
        )
    created = not data_dir.exists()
    before = set(data_dir.rglob("*"))
    try:
        return [read(True), read(False)]
    except (URLError, RuntimeError, OSError, EOFError, ValueError) as error:
        for path in sorted(set(data_dir.rglob("*")) - before, reverse=True):  # leave nothing half-downloaded
            path.rmdir() if path.is_dir() else path.unlink()
        if created and data_dir.is_dir():
            data_dir.rmdir()
        reason = str(getattr(error, "reason", error)).strip().split("\n")[0]
        raise InputError(
            f"{dataset} is not in {data_dir} and cannot be downloaded ({reason}): put it there as "
            f"{FOLDER_HINT[dataset]}; {WITHOUT_DOWNLOAD}"
        ) from error


FOLDER_HINT = {
    "cifar10": "image folders {train,test}/<class>/*",
    "cifar100": "image folders {train,test}/<class>/*",
    "fashion-mnist": "its four idx files (Debian's package dataset-fashion-mnist has them)",
}


def read_folders(folder):
    """Both splits from ``folder``/{train,test}/<class>/*, class names sorted, one image of each class in turn."""
    from torchvision.datasets import ImageFolder

    splits = []
    for split in ("train", "test"):
        try:
            listing = ImageFolder(folder / split)
        except FileNotFoundError as error:
            missing = (
                f"{folder / split} is missing"
                if not (folder / split).is_dir()
                else str(error).split(" Supported")[0].rstrip(".")
            )
            raise InputError(f"{missing}: image folders are {{train,test}}/<class>/<image>") from error
        splits.append(listing)
    if splits[0].classes != splits[1].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise InputError(f"{folder}: class folder {odd[0]!r} is in only one of train and test")
    kinds = sorted({Path(path).suffix.lstrip(".").lower() for path, _ in splits[0].samples})
    kind = ", ".join({"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}.get(kind, kind) for kind in kinds)
    return *(decode(listing) for listing in splits), kind


def decode(listing):
    """An ImageFolder's images, uint8 (N, 32, 32, 3), and labels (N,), ordered by place in the class, then class."""
    place, turns = {}, []
    for path, label in listing.samples:
        place[label] = place.get(label, -1) + 1
        turns.append((place[label], label, path))
    turns.sort()
    images = torch.empty(len(turns), SIDE, SIDE, 3, dtype=torch.uint8)
    for row, (_, _, path) in enumerate(turns):
        try:
            image = np.array(listing.loader(path))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path} is damaged or no image ({str(error).splitlines()[0]}): replace it") from error
        if image.shape != (SIDE, SIDE, 3):
            raise InputError(f"{path} is {image.shape[1]}x{image.shape[0]}: this data set's images are {SIDE}x{SIDE}")
        images[row] = torch.from_numpy(image)
    return images, torch.tensor([label for _, label, _ in turns])


def read_fashion_mnist(dataset, data_dir):
    """Fashion-MNIST from its idx files (plain or .gz) in ``data_dir`` or a folder of torchvision's or Debian's name in
    it, else by download.
    """
    for folder in (data_dir, data_dir / "fashion-mnist", data_dir / "FashionMNIST" / "raw"):
        if any(folder.glob("*-idx?-ubyte*")):
            splits = [
                (read_idx(folder, f"{s}-images-idx3-ubyte"), read_idx(folder, f"{s}-labels-idx1-ubyte"))
                for s in ("train", "t10k")
            ]
            return *((grey_to_rgb(images), labels.long()) for images, labels in splits), "idx files"
    from torchvision.datasets import FashionMNIST

    splits = download(dataset, data_dir, lambda train: FashionMNIST(data_dir, train=train, download=True))
    return *((grey_to_rgb(s.data), s.targets.long()) for s in splits), "original"


def read_idx(folder, name):
    """The tensor in an idx file of unsigned bytes, ``folder/name`` or its .gz."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder / name} is missing, and so is its .gz: a folder of idx files holds four")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{magic[2]}I", raw[4 : 4 + 4 * magic[2]])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path} is damaged or truncated: fetch it again") from error
    return torch.from_numpy(values.copy())


def grey_to_rgb(images):
    """uint8 (N, h, w) → (N, 32, 32, 3): zero padding all round, the grey channel three times."""
    top, left = (SIDE - images.shape[1]) // 2, (SIDE - images.shape[2]) // 2
    images = F.pad(images, (left, SIDE - images.shape[2] - left, top, SIDE - images.shape[1] - top))
    return images[..., None].expand(-1, -1, -1, 3).contiguous()


def read_digits(dataset, data_dir):
    """scikit-learn's 1,797 handwritten 8×8 digits, enlarged to 32×32; every fifth is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = (
        F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=False).round().clamp(0, 255).byte()[:, 0]
    )
    images, labels = grey_to_rgb(images), torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test]), "scikit-learn"


READERS = {"cifar10": read_cifar, "cifar100": read_cifar, "fashion-mnist": read_fashion_mnist, "digits": read_digits}
