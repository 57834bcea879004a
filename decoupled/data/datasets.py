"""The data sets of the CIFAR experiments, read as uint8 tensors of 32×32 RGB images."""

import contextlib
import gzip
import hashlib
import os
import zlib
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn import functional as F

from decoupled.data.batches import Batches
from decoupled.data.folders import DataSet, Split, read_folders
from decoupled.data.images import SIDE, InputForm
from decoupled.errors import InputError, first_line, one_line

DATASETS = ("cifar10", "cifar100", "fashion-mnist", "digits", "folder")

CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}

# Mean and standard deviation of each channel in [0, 1]. CIFAR-10's are those of the released code; the others come
# from their training images.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)

# How to convert other images to a data set's form, if that is not a color image of 32×32
FORMS = {"fashion-mnist": {"resize": 28, "crop": 28, "grey": True}, "digits": {"grey": True}}

IMAGE_FOLDERS = "image folders {train,test}/<class>/*"
FETCH_AGAIN = "remove it and fetch it again"

# The published files, unpacked, and their MD5 (torchvision has those of the .gz files, which depend on who packed them)
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


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
    """Loads a data set. Returns (train, test, number of classes): Batches on ``device``, with augmentation of the
    training split.

    ``validation`` holds out this many training images, the same for all seeds, which replace the test split.
    ``train_samples`` keeps the first N of the remaining images; image folders are read one image per class in turn, so
    that all classes are included. Raises InputError for an unknown data set, missing or damaged files, files of another
    data set, or an impossible number of samples.
    """
    if dataset not in DATASETS:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    data = read(dataset, Path(data_dir).expanduser())
    check_validation(dataset, data, validation)
    if validation:
        data = hold_out(data, validation)
    samples = len(data.train.labels)
    if train_samples is not None:
        check_train_samples(dataset, data, train_samples, validation)
        samples = train_samples
    check_batch_size(samples, batch_size, drop_last)
    images = data.train.images[:samples]
    labels = data.train.labels[:samples]
    mean, std = channel_statistics(dataset, images)
    form = InputForm(classes=list(data.classes), mean=mean, std=std, **FORMS.get(dataset, {}))
    held_out = ", held out of the training images" if validation else ""
    train = Batches(
        images,
        labels,
        batch_size,
        mean=mean,
        std=std,
        description=f"{dataset} ({data.source}){data.train.note}",
        form=form,
        augment=True,
        flip=dataset != "digits",  # a mirrored digit is not a digit
        drop_last=drop_last,
        seed=seed,
        device=device,
    )
    test = Batches(
        data.test.images,
        data.test.labels,
        test_batch_size,
        mean=mean,
        std=std,
        description=f"{dataset} ({data.source}){held_out}{data.test.note}",
        form=form,
        device=device,
    )
    return train, test, len(data.classes)


def check_validation(dataset, data, validation):
    count = len(data.train.labels)
    if validation >= count:
        raise InputError(f"--validation {validation} leaves none of the {count} training images of {dataset}")


def check_train_samples(dataset, data, train_samples, validation):
    count = len(data.train.labels)
    if train_samples > count:
        rest = " that --validation leaves" if validation else ""
        raise InputError(f"--train-samples {train_samples} is more than the {count} training images of {dataset}{rest}")


def check_batch_size(samples, batch_size, drop_last):
    """Raises InputError if there is no full batch, or a batch of one image."""
    if samples < batch_size:
        raise InputError(
            f"{samples} training images are fewer than one batch of {batch_size}: choose a smaller --batch-size or "
            "more samples"
        )
    last = samples % batch_size
    if batch_size == 1 or (last == 1 and not drop_last):
        raise InputError(
            f"{samples} images in batches of {batch_size} leave a batch of one image, from which batch norm cannot "
            "learn: choose another --batch-size"
        )


def channel_statistics(dataset, images):
    """The mean and the standard deviation of each channel in [0, 1]."""
    if dataset == "cifar10":
        return CIFAR10_MEAN, CIFAR10_STD
    pixels = images.reshape(-1, 3).double() / 255
    mean = pixels.mean(0).tolist()
    std = pixels.std(0).tolist()
    if min(std) == 0:
        raise InputError(f"the {len(images)} training images of {dataset} have the same value everywhere in a channel")
    return mean, std


def hold_out(data, count):
    """Moves ``count`` randomly drawn training images to the test split. Both keep their order."""
    train = data.train
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[:count]
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    held[chosen] = True
    return DataSet(
        train=Split(train.images[~held], train.labels[~held], train.note),
        test=Split(train.images[held], train.labels[held], train.note),
        classes=data.classes,
        source=data.source,
    )


# Reading: each function returns a DataSet


def read(dataset, data_dir):
    """Reads a DataSet. ``data_dir`` is ignored if the data set needs no files."""
    if dataset == "digits":
        return read_digits()
    if dataset == "folder":
        return read_own_images(data_dir)
    if dataset == "fashion-mnist":
        return read_fashion_mnist(data_dir)
    for folder in (data_dir / dataset, data_dir):
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            return read_cifar_folders(dataset, folder)
    return read_cifar_files(dataset, data_dir)


def read_own_images(data_dir):
    """The user's own images, from ``data_dir``/{train, test or val}/<class>/*, resized to 32×32."""
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder: --dataset folder reads {IMAGE_FOLDERS} there")
    test = "test"
    if (data_dir / "val").is_dir() and not (data_dir / "test").is_dir():
        test = "val"
    data = read_folders(data_dir, ("train", test), resize=True)
    return data._replace(source=f"{data.source}, {one_line(str(data_dir.resolve()))}")


def read_cifar_folders(dataset, folder):
    """CIFAR-10 or -100 as image folders."""
    data = read_folders(folder)
    expected = CIFAR_CLASSES[dataset]
    if len(data.classes) != expected:
        raise InputError(
            f"{folder} has {len(data.classes)} classes, but {dataset} has {expected}: for your own images choose "
            "--dataset folder"
        )
    return data


def read_cifar_files(dataset, data_dir):
    """CIFAR-10 or -100 from the published files.

    ``data_dir`` is either the folder of these files, such as cifar-10-batches-py, or its parent. Missing files are
    unpacked from the archive in ``data_dir``, or downloaded.
    """
    from torchvision import datasets

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    root = data_dir
    if data_dir.name == cifar.base_folder and data_dir.is_dir():
        root = data_dir.parent
    names = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    files = {root / cifar.base_folder / name: md5 for name, md5 in names}
    download_missing(
        dataset,
        root,
        fetch=lambda: cifar(root, download=True),
        files=files,
        archives={root / cifar.filename: cifar.tgz_md5},
        otherwise=f"{cifar.filename} (from {cifar.url}) or {IMAGE_FOLDERS}",
    )
    for path, md5 in files.items():
        check_md5(path, read_bytes(path), md5)
    train = cifar(root, train=True)
    test = cifar(root, train=False)
    return DataSet(
        train=Split(torch.from_numpy(train.data), torch.tensor(train.targets)),
        test=Split(torch.from_numpy(test.data), torch.tensor(test.targets)),
        classes=train.classes,
        source="original",
    )


def read_fashion_mnist(data_dir):
    """Fashion-MNIST from its idx files, plain or .gz, in ``data_dir`` or its subfolder fashion-mnist; downloads them if
    they are missing.
    """
    from torchvision.datasets import FashionMNIST

    for folder in (data_dir, data_dir / "fashion-mnist"):
        if any(folder.glob("*-idx?-ubyte*")):
            return read_idx_files(folder, source="idx files")
    folder = data_dir / "FashionMNIST" / "raw"
    download_missing(
        "fashion-mnist",
        data_dir,
        fetch=lambda: FashionMNIST(data_dir, download=True),
        files={folder / name: md5 for name, md5 in FASHION_MNIST_FILES.items()},
        archives={folder / name: md5 for name, md5 in FashionMNIST.resources},
        otherwise="its four idx files (Debian's package dataset-fashion-mnist has them)",
    )
    return read_idx_files(folder, source="original")


def read_idx_files(folder, source):
    """Fashion-MNIST from the four idx files in ``folder``."""
    from torchvision.datasets import FashionMNIST

    return DataSet(
        train=read_idx_pair(folder, "train"),
        test=read_idx_pair(folder, "t10k"),
        classes=FashionMNIST.classes,
        source=source,
    )


def read_idx_pair(folder, split):
    """The images and labels of Fashion-MNIST's ``split``, train or t10k."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte")[16:]  # after the number of images, height and width
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte")[8:]
    return Split(grey_to_rgb(images.view(-1, 28, 28)), labels.long())


def read_idx(folder, name):
    """The contents of Fashion-MNIST's file ``name``, plain or .gz: uint8 (bytes,). Raises InputError if the file is
    missing or differs from the published one.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
    if not path.is_file():
        raise InputError(f"{folder / name} is missing, and so is its .gz: copy it there")
    data = read_bytes(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is damaged ({error}): {FETCH_AGAIN}") from error
    check_md5(path, data, FASHION_MNIST_FILES[name])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_digits():
    """scikit-learn's 1,797 handwritten 8×8 digits, enlarged to 32×32; every fifth is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", antialias=False)
    images = grey_to_rgb(large.round().clamp(0, 255).byte()[:, 0])
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    return DataSet(
        train=Split(images[~test], labels[~test]),
        test=Split(images[test], labels[test]),
        classes=list("0123456789"),
        source="scikit-learn",
    )


def grey_to_rgb(images):
    """uint8 (N, h, w) → (N, 32, 32, 3): pads with zeros on all sides and repeats the gray channel three times."""
    height, width = images.shape[1:]
    top = (SIDE - height) // 2
    left = (SIDE - width) // 2
    images = F.pad(images, (left, SIDE - width - left, top, SIDE - height - top))
    return images[..., None].expand(-1, -1, -1, 3).contiguous()


# Published files


def download_missing(dataset, data_dir, *, fetch, files, archives, otherwise):
    """Calls ``fetch()``, which downloads the data set, if one of ``files`` is missing; only one of several processes
    does.

    ``files`` and ``archives`` are {path: MD5}. If the download fails, raises an InputError that names a damaged file or
    says what to put into ``data_dir`` instead (``otherwise``).
    """
    # A file that exists may be incomplete: another process may be unpacking it
    if all(is_intact(path, md5) for path, md5 in files.items()):
        return
    is_default = str(data_dir) == "data"
    if not data_dir.is_dir() and not is_default:
        raise InputError(
            f"--data-dir {data_dir} is not a folder: create it to download {dataset} there, or name another folder"
        )
    created = not data_dir.exists()
    lock = data_dir / ".download.lock"
    try:
        data_dir.mkdir(exist_ok=True)
        with FileLock(lock):
            if not all(path.is_file() for path in files):
                fetch()
    except Exception as error:  # servers, proxies and archives may cause anything
        for path, md5 in (files | archives).items():
            if path.is_file():
                check_md5(path, read_bytes(path), md5)
        raise failed_download(dataset, data_dir, otherwise, error) from error
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        if created:
            remove_empty(data_dir)


def failed_download(dataset, data_dir, otherwise, error):
    """The InputError for a download that failed with ``error``."""
    reason = first_line(getattr(error, "reason", error)).rstrip(":")  # urllib's errors have more details in `reason`
    return InputError(
        f"{dataset} is not in {data_dir} and cannot be downloaded ({reason}): put {otherwise} there; "
        "--dataset digits needs no download"
    )


def remove_empty(folder):
    """Removes ``folder`` and its subfolders if they are empty."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def is_intact(path, md5):
    """Whether ``path`` is a file with this MD5."""
    from torchvision.datasets.utils import check_integrity

    return check_integrity(path, md5)


def check_md5(path, data, expected):
    """Raises InputError if ``data``, the contents of ``path``, differs from the published file."""
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise InputError(f"{path} is damaged (MD5 {found}, published {expected}): {FETCH_AGAIN}")


def read_bytes(path):
    """The contents of ``path``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
