"""The data sets of the CIFAR experiments, read as uint8 tensors of 32×32 RGB images."""

import contextlib
import gzip
import hashlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional as F

from decoupled.data.batches import Batches
from decoupled.data.folders import read_folders
from decoupled.data.images import SIDE, InputForm
from decoupled.errors import InputError, one_line

DATASETS = ("cifar10", "cifar100", "fashion-mnist", "digits", "folder")


CLASSES = {"cifar10": 10, "cifar100": 100}


# Mean and standard deviation of each channel in [0, 1]. CIFAR-10's are those of the released code; other sets' come
# from their training images.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


# What the readers make of an image, where it is not a color image of 32×32.
FORMS = {"fashion-mnist": {"resize": 28, "crop": 28, "grey": True}, "digits": {"grey": True}}


FASHION_MNIST = {"train": 60_000, "t10k": 10_000}  # images


IMAGE_FOLDERS = "image folders {train,test}/<class>/*"


IDX_FILES = "its four idx files (Debian's package dataset-fashion-mnist has them)"


AGAIN = "remove it and fetch it again"


def load(
    dataset,
    data_dir="data",
    *,
    batch_size,
    test_batch_size=1000,
    train_samples=None,
    validation=0,
    drop_last=False,
    seed=0,
    device="cpu",
):
    """(train, test, number of classes): the training split augmented, the test split as it is; both are Batches on
    ``device``.

    ``validation`` holds out that many training images, drawn once for all seeds, which then stand in place of the test
    split. ``train_samples`` keeps that many first of the others. Image folders are read one image of each class in
    turn, so that the first are of every class. Raises InputError for an unknown data set, missing or damaged files,
    data that is not the set's, or an impossible number of samples.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    (images, labels), test, classes, source = READERS[dataset](dataset, Path(data_dir).expanduser())
    if validation >= len(labels):
        raise InputError(f"--validation {validation} leaves none of the {len(labels)} training images of {dataset}")
    if validation:
        images, labels, *test = hold_out(images, labels, validation)
    samples = len(labels) if train_samples is None else train_samples
    if samples > len(labels):
        rest = " that --validation leaves" if validation else ""
        raise InputError(f"--train-samples {samples} is more than the {len(labels)} training images of {dataset}{rest}")
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
        if min(statistics["std"]) == 0:
            raise InputError(f"the {samples} training images of {dataset} have the same value everywhere in a channel")
    form = InputForm(classes=list(classes), **statistics, **FORMS.get(dataset, {}))
    common = {**statistics, "form": form, "device": device}
    description, held_out = f"{dataset} ({source})", ", held out of the training images" if validation else ""
    augmented = {"augment": True, "flip": dataset != "digits", "drop_last": drop_last, "seed": seed}
    return (
        Batches(images, labels, batch_size, **augmented, **common, description=description),
        Batches(*test, test_batch_size, **common, description=description + held_out),
        len(classes),
    )


def hold_out(images, labels, count):
    """(images, labels) that are left, then (images, labels) of ``count`` others, each in the order they had."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]] = True
    return images[~held], labels[~held], images[held], labels[held]


# The readers: (images, labels) of the two splits, [class names], source


# CIFAR and image folders


def read_cifar(dataset, data_dir):
    """CIFAR-10 or -100 from image folders in ``data_dir`` or ``data_dir/dataset``, else torchvision's files in
    ``data_dir`` or, of that name itself, ``data_dir``; downloaded if absent.
    """
    for folder in (data_dir / dataset, data_dir):
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            splits, classes, kind = read_folders(folder)
            if len(classes) != CLASSES[dataset]:
                raise InputError(
                    f"{folder} has {len(classes)} classes, and {dataset} has {CLASSES[dataset]}: --dataset folder "
                    "takes images of one's own"
                )
            return *splits, classes, kind
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]

    def found():
        names = [name for name, _ in (*kind.train_list, *kind.test_list)]
        folders = (data_dir / kind.base_folder, data_dir)
        return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)

    def fetch(folder):
        if (archive := data_dir / kind.filename).is_file():  # fetched before, and never unpacked
            check_md5(archive, kind.tgz_md5)
            (folder / kind.filename).symlink_to(archive.resolve())
        kind(folder, download=True)
        if (folder / kind.filename).is_symlink():
            (folder / kind.filename).unlink()

    if found() is None:
        otherwise = f"{kind.filename} (from {kind.url}) or {IMAGE_FOLDERS}"
        download(dataset, data_dir, fetch, lambda: found() is not None, otherwise)
    return *read_pickles(kind, found()), "original"


def read_pickles(kind, folder):
    """(images, labels) of both splits and the class names from the files of torchvision's ``kind`` in ``folder``."""
    meta = (kind.meta["filename"], kind.meta["md5"])
    for name, md5 in (*kind.train_list, *kind.test_list, meta):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: unpack {kind.filename} again")
        check_md5(folder / name, md5)
    here = type(kind.__name__, (kind,), {"base_folder": ""})
    splits = [here(folder, train=train) for train in (True, False)]
    return *((torch.from_numpy(split.data), torch.tensor(split.targets)) for split in splits), splits[0].classes


def check_md5(path, expected):
    """Raises InputError for a file that is not what it was when published."""
    if hashlib.md5(read_bytes(path), usedforsecurity=False).hexdigest() != expected:
        raise InputError(f"{path} is damaged, its MD5 is not {expected}: {AGAIN}")


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error


def read_own(dataset, data_dir):
    """Anyone's images, from ``data_dir``/{train, test or val}/<class>/*, resized to 32×32."""
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is no folder: --dataset folder reads {IMAGE_FOLDERS} there")
    test = "val" if (data_dir / "val").is_dir() and not (data_dir / "test").is_dir() else "test"
    splits, classes, kind = read_folders(data_dir, ("train", test), resize=True)
    return *splits, classes, f"{kind}, {one_line(str(data_dir.resolve()))}"


# Fashion-MNIST


def read_fashion_mnist(dataset, data_dir):
    """Fashion-MNIST from its idx files (plain or .gz) in ``data_dir`` or a folder of torchvision's or Debian's name in
    it, else by download.
    """
    from torchvision.datasets import FashionMNIST

    def found():
        folders = (data_dir, data_dir / "fashion-mnist", data_dir / "FashionMNIST" / "raw")
        return next((folder for folder in folders if any(folder.glob("*-idx?-ubyte*"))), None)

    def fetch(folder):
        FashionMNIST(folder, download=True)

    source = "idx files"
    if found() is None:
        download(dataset, data_dir, fetch, lambda: found() is not None, IDX_FILES)
        source = "original"
    return *(read_idx_pair(found(), split) for split in FASHION_MNIST), FashionMNIST.classes, source


def read_idx_pair(folder, split):
    """(images (N, 32, 32, 3), labels (N,)) of Fashion-MNIST's ``split``, train or t10k."""
    names = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
    images, labels = (read_idx(folder, name) for name in names)
    count = FASHION_MNIST[split]
    for name, values, shape in zip(names, (images, labels), ((count, 28, 28), (count,)), strict=True):
        if values.shape != shape:
            sizes = " and ".join("x".join(map(str, size)) for size in (values.shape, shape))
            raise InputError(f"{folder / name} is not Fashion-MNIST's, their sizes are {sizes}: fetch it again")
    if labels.max() > 9:
        raise InputError(f"{folder / names[1]} has a label of {labels.max()}, where 9 is the last: fetch it again")
    return grey_to_rgb(images), labels.long()


def read_idx(folder, name):
    """The tensor in an idx file of unsigned bytes, ``folder/name`` or its .gz."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder / name} is missing, and so is its .gz: a folder of idx files holds four")
    raw = read_bytes(path)
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zero, kind, dimensions = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
        if (zero, kind) != (0, 8):
            raise ValueError("no idx file of unsigned bytes")
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
    return (images[~test], labels[~test]), (images[test], labels[test]), "0123456789", "scikit-learn"


READERS = {
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "fashion-mnist": read_fashion_mnist,
    "digits": read_digits,
    "folder": read_own,
}


WITHOUT_DOWNLOAD = "--dataset digits needs no download"


def download(dataset, data_dir, fetch, there, otherwise):
    """Has ``fetch(folder)`` put the files of ``dataset`` into an empty folder in ``data_dir``, and moves them up.

    One process fetches at a time; those that wait use what it got, which ``there()`` sees. Nothing else in ``data_dir``
    is touched. Raises InputError, naming what would do as well (``otherwise``), where the set cannot be had.
    """
    if not data_dir.is_dir() and str(data_dir) != "data":
        raise InputError(
            f"--data-dir {data_dir} is no folder: create it to download {dataset} there, or name the one that holds it"
        )
    created = not data_dir.exists()
    own, lock = data_dir / f".download-{dataset}", data_dir / f".download-{dataset}.lock"
    try:
        data_dir.mkdir(exist_ok=True)
        with FileLock(lock):
            try:
                if not there():
                    shutil.rmtree(own, ignore_errors=True)  # of a download that was killed
                    own.mkdir()
                    fetch(own)
                    move_up(own, data_dir)
            finally:
                shutil.rmtree(own, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever a server, a proxy or an archive leads to
        reason = (str(getattr(error, "reason", error)).strip().splitlines() or [type(error).__name__])[0].rstrip(":")
        raise InputError(
            f"{dataset} is not in {data_dir} and cannot be downloaded ({reason}): put it there as {otherwise}; "
            f"{WITHOUT_DOWNLOAD}"
        ) from error
    finally:
        if created:
            with contextlib.suppress(OSError):
                data_dir.rmdir()


def move_up(own, data_dir):
    """Moves every file in the folder ``own`` to its place in ``data_dir``."""
    for path in sorted(own.rglob("*")):
        target = data_dir / path.relative_to(own)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
