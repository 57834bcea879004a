"""Images and data sets that cannot be trained on: each is named, whichever way it is wrong."""

import errno
import gzip
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import PARALLEL, ROOT, load_script
from torchvision import datasets as published

from decoupled import InputError
from decoupled.data import datasets
from decoupled.data import datasets as downloads
from decoupled.data import folders as image_folders
from decoupled.data.datasets import load

load_script("imagenet/imagenet_dgl.py")
import imagenet_folders  # noqa: E402

RANDOM = np.random.default_rng(0)


def noise(height=32, width=32, channels=3):
    return RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_classes(root, splits=("train", "test"), classes=("a", "b"), count=4, size=(32, 32)):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(noise(*size)).save(root / split / name / f"{index}.png")
    return root


# One image: what is written to it, and what is said of it

RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
PNG = b"\x89PNG\r\n\x1a\n"
IMAGES = {
    "16-bit grey": (lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path), "more than 8 bits (mode I;16)"),
    "32-bit grey": (
        lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path, "TIFF"),
        "more than 8 bits (mode I)",
    ),
    "float": (lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path, "TIFF"), "more than 8 bits (mode F)"),
    "too many pixels": (lambda path: Image.new("1", (20000, 10000)).save(path), "has more pixels than Pillow reads"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no image"),
    "text": (lambda path: path.write_text("hello"), "is damaged or no image"),
    "header alone": (lambda path: path.write_bytes(PNG), "is damaged or no image"),
    "endless text chunk": (
        lambda path: path.write_bytes(PNG + struct.pack(">I4s", 2**31 - 1, b"zTXt") + b"x" * 99),
        "is damaged or no image",
    ),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:1500]), "is damaged or no image"),
}
READ = {
    "own folder": lambda root: load("folder", root, batch_size=2),
    "imagenet": lambda root: [*imagenet_folders.load(root, image_size=32, batch_size=2, workers=0)[0]],
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_cannot_be_used_is_named(tmp_path, kind, read):
    root = write_classes(tmp_path / "data", ("train", "val"))
    spoil, message = IMAGES[kind]
    spoil(root / "train" / "b" / "1.png")
    with pytest.raises(InputError) as error:
        READ[read](root)
    assert str(error.value).startswith(f"{root}/train/b/1.png ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_grey_palette_and_transparent_images_are_read_as_they_look(tmp_path):
    root = write_classes(tmp_path / "data")
    grey = noise(channels=1)[..., 0]
    for index, mode in enumerate(("L", "P", "RGBA", "LA")):
        Image.fromarray(grey).convert(mode).save(root / "train" / "a" / f"{index}.png")
    train, _, _ = load("folder", root, batch_size=2)
    for image in train.images[train.labels == 0][:, 4:36, 4:36]:
        assert torch.equal(image, torch.from_numpy(grey)[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("name", ["café", "猫", b"caf\xe9"])
def test_names_of_any_alphabet_and_none(tmp_path, name):
    root = write_classes(tmp_path / "data", ("train", "val"))
    for split in ("train", "val"):
        os.rename(os.fsencode(root / split / "a"), os.path.join(os.fsencode(root / split), os.fsencode(name)))
    for read in READ.values():
        assert read(root)
    (batch, _), *_ = imagenet_folders.load(root, image_size=32, batch_size=8, workers=0)[0]
    assert batch.isfinite().all()


# Processes that read images


WORKERS = [
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    OSError(errno.EMFILE, "Too many open files"),
    RuntimeError("received 0 items of ancdata"),
    RuntimeError("Caught X.\nunable to allocate shared memory(shm) for file </torch_1>: No space left on device"),
]


@pytest.mark.parametrize("error", WORKERS)
def test_what_workers_have_too_little_of_is_one_line(tmp_path, monkeypatch, error):
    root = write_classes(tmp_path / "data", ("train", "val"))
    train, _, _ = imagenet_folders.load(root, image_size=32, batch_size=4, workers=0)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def loader(error):
        yield torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
        raise error

    train.loader = loader(error)
    with pytest.raises(InputError, match=r"the processes that read images were killed.*then --resume") as caught:
        list(train)
    assert "\n" not in str(caught.value)
    train.loader = loader(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):  # a fault of ours stays one
        list(train)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_killed_worker_ends_the_run_in_one_line(tmp_path):
    root = write_classes(tmp_path / "data", ("train", "val"), count=8)
    words = "--arch vgg11 --block_size 8 --channels 2 --image-size 32 -b 4 -j 1 --epochs 9999 --device cpu --save_folder logs"
    command = [sys.executable, ROOT / "imagenet/imagenet_dgl.py", root, *words.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    try:
        for _ in range(2400):
            logs = [path.read_text() for path in tmp_path.glob("logs/*.log")]
            if run.poll() is not None or (logs and "epoch 1," in logs[0]):
                break
            time.sleep(0.05)
        children = [
            int(pid) for task in Path(f"/proc/{run.pid}/task").glob("*/children") for pid in task.read_text().split()
        ]
        for child in children:
            os.kill(child, signal.SIGKILL)
        message = run.communicate(timeout=100)[1]
    finally:
        run.kill()
        run.communicate()
    assert children and run.returncode == 2 and message.count("\n") == 1 and "Traceback" not in message
    assert "the processes that read images were killed" in message
    assert {path.suffix for path in (tmp_path / "logs").iterdir()} == {".log", ".pt"}


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_it_hands_images_over_is_told_alike(tmp_path, monkeypatch, error):
    root = write_classes(tmp_path / "data", ("train", "val"), count=4)
    train, _, _ = imagenet_folders.load(root, image_size=32, batch_size=4, workers=0)

    def broken(loader):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    with pytest.raises(InputError, match="the processes that read images were killed"):
        next(iter(train))


# Image folders


def one_folder_too_deep(root):
    for split in ("train", "test"):
        (root / split).rename(root / "deeper")
        (root / split).mkdir()
        (root / "deeper").rename(root / split / "images")


def unreadable(root, monkeypatch, at):
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith(at):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


FOLDERS = {
    "one class": (lambda root, _: one_folder_too_deep(root), "has one class only, 'images'"),
    "no test split": (lambda root, _: (root / "test").rename(root / "other"), "test is missing: image folders are"),
    "no classes": (
        lambda root, _: [path.rename(root / f"{path.name}-gone") for path in (root / "train").iterdir()],
        "cannot be read as image folders (Couldn't find any class",
    ),
    "a class without images": (
        lambda root, _: [path.unlink() for path in (root / "train" / "a").iterdir()],
        "cannot be read as image folders (Found no valid file for the classes a",
    ),
    "other classes": (lambda root, _: (root / "test" / "a").rename(root / "test" / "c"), "'a' is in only one of"),
    "unreadable": (lambda root, patch: unreadable(root, patch, "train"), "cannot be read (Permission denied)"),
    "all black": (
        lambda root, _: [Image.new("RGB", (32, 32)).save(path) for path in (root / "train").glob("*/*.png")],
        "have the same value everywhere",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_cannot_be_trained_on(fails, monkeypatch, tmp_path, kind):
    root = write_classes(tmp_path / "data")
    spoil, message = FOLDERS[kind]
    spoil(root, monkeypatch)
    assert message in fails(PARALLEL, "--dataset", "folder", "--data-dir", root, "--batch-size", 4)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_a_set_of_other_classes_is_not_called_cifar(tmp_path, dataset):
    root = write_classes(tmp_path / "data")
    with pytest.raises(InputError, match=f"has 2 classes, and {dataset} has 100?: --dataset folder takes images of"):
        load(dataset, root, batch_size=2)


def test_own_images_of_any_size_have_their_own_statistics_and_name(run_script, tmp_path):
    root = write_classes(tmp_path / "data", ("train", "val"), size=(60, 40))
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, 32:] = 200
    Image.fromarray(half).save(root / "train" / "a" / "0.png")
    log = run_script(PARALLEL, "--dataset", "folder", "--data-dir", root, "--batch-size", 4, "--epochs", 1).log
    assert f"# train: 8 images of folder (PNG, {root})\n# test: 8 images of folder (PNG, {root})\n" in log.read_text()
    train, test, classes = load("folder", root, batch_size=2)
    assert classes == 2 and train.flip and test.images.shape == (8, 32, 32, 3)
    image = train.images[0, 4:36, 4:36]
    assert (image[:, :14] == 0).all() and (image[:, 18:] == 200).all()  # cropped to a square in the centre
    pixels = train.images[:, 4:36, 4:36].reshape(-1, 3).double() / 255
    torch.testing.assert_close(train.shift.double() / 255, pixels.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1 / train.scale.double() / 255, pixels.std(0), rtol=1e-5, atol=1e-6)


# The cache


def decoded(monkeypatch):
    """A list to which every image that is decoded adds its path."""
    paths, real = [], image_folders.read_image
    monkeypatch.setattr(image_folders, "read_image", lambda path: paths.append(path) or real(path))
    return paths


def test_folders_are_decoded_once(tmp_path, monkeypatch):
    root, paths = write_classes(tmp_path / "data"), decoded(monkeypatch)
    first = load("folder", root, batch_size=2)
    assert len(paths) == 16 and sorted(path.name for path in root.iterdir()) == [image_folders.CACHE, "test", "train"]
    second = load("folder", root, batch_size=2)
    assert len(paths) == 16
    for mine, its in zip(first[:2], second[:2], strict=True):
        assert torch.equal(mine.images, its.images) and mine.fingerprint == its.fingerprint


CHANGES = {
    "image": lambda root: Image.fromarray(noise()).save(root / "train" / "a" / "0.png"),
    "time": lambda root: os.utime(root / "test" / "a" / "0.png", (0, 0)),
    "name": lambda root: (root / "test" / "a" / "0.png").rename(root / "test" / "a" / "9.png"),
    "truncated cache": lambda root: os.truncate(root / image_folders.CACHE, 9000),
    "no cache": lambda root: (root / image_folders.CACHE).write_text("hello"),
    "damaged cache": lambda root: flip(root / image_folders.CACHE, 20000),
}


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_and_a_damaged_cache_are_read_anew(tmp_path, monkeypatch, change):
    root, paths = write_classes(tmp_path / "data"), decoded(monkeypatch)
    load("folder", root, batch_size=2)
    CHANGES[change](root)
    again = load("folder", root, batch_size=2)
    assert len(paths) == 32
    (root / image_folders.CACHE).unlink()
    fresh = load("folder", root, batch_size=2)
    assert all(torch.equal(mine.images, its.images) for mine, its in zip(again[:2], fresh[:2], strict=True))


def test_without_room_for_a_cache_folders_are_read_all_the_same(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "data")

    def full(file, **arrays):
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert load("folder", root, batch_size=2)[2] == 2
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


# idx files


def write_idx(path, values, kind=8):
    raw = struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def fashion(root, monkeypatch):
    for split, count in (("train", 20), ("t10k", 10)):
        monkeypatch.setitem(datasets.FASHION_MNIST, split, count)
        write_idx(root / f"{split}-images-idx3-ubyte", noise(28, 28, count).transpose(2, 0, 1))
        write_idx(root / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


IDX = {
    "fewer labels": ("train-labels-idx1", np.zeros(19, np.uint8), "their sizes are 19 and 20"),
    "none": ("t10k-images-idx3", np.zeros((0, 28, 28), np.uint8), "their sizes are 0x28x28 and 10x28x28"),
    "another size": ("train-images-idx3", np.zeros((20, 20, 30), np.uint8), "their sizes are 20x20x30 and 20x28x28"),
    "another rank": ("train-images-idx3", np.zeros((20, 784), np.uint8), "their sizes are 20x784 and"),
    "label 10": ("t10k-labels-idx1", np.full(10, 10, np.uint8), "has a label of 10, where 9 is the last"),
}


@pytest.mark.parametrize("kind", IDX)
def test_idx_files_that_are_not_the_sets(tmp_path, monkeypatch, kind):
    fashion(tmp_path, monkeypatch)
    assert load("fashion-mnist", tmp_path, batch_size=4)[2] == 10
    name, values, message = IDX[kind]
    write_idx(tmp_path / f"{name}-ubyte", values)
    with pytest.raises(InputError, match=f"{name}-ubyte .*{message}"):
        load("fashion-mnist", tmp_path, batch_size=4)


def test_idx_files_of_other_numbers(tmp_path, monkeypatch):
    fashion(tmp_path, monkeypatch)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((20, 28, 28), np.uint8), kind=13)  # of floats
    with pytest.raises(InputError, match="train-images-idx3-ubyte is damaged or truncated"):
        load("fashion-mnist", tmp_path, batch_size=4)


# CIFAR's own files, as torchvision knows them


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """data/cifar-10-batches-py of 20 training and 4 test images, whose checksums torchvision now expects."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return datasets.hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        return [name, write(name, {"data": noise(4, 32 * 32, 3).reshape(4, -1), "labels": [0, 9, 3, 1]})]

    monkeypatch.setattr(published.CIFAR10, "train_list", [batch(f"data_batch_{n}") for n in range(1, 6)])
    monkeypatch.setattr(published.CIFAR10, "test_list", [batch("test_batch")])
    md5 = write("batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(published.CIFAR10, "meta", published.CIFAR10.meta | {"md5": md5})
    return folder


def test_cifar_in_a_folder_or_as_the_folder_itself(pickles):
    above, itself = (load("cifar10", folder, batch_size=2) for folder in (pickles.parent, pickles))
    renamed = load("cifar10", pickles.rename(pickles.parent.parent / "renamed"), batch_size=2)
    for train, test, classes in (above, itself, renamed):
        assert (len(train.labels), len(test.labels), classes, train.description) == (20, 4, 10, "cifar10 (original)")
        assert torch.equal(train.images, above[0].images)


def test_damaged_and_missing_files_of_cifar_are_named(pickles):
    data = (pickles / "data_batch_3").read_bytes()
    flip(pickles / "data_batch_3", 500)
    with pytest.raises(InputError, match="data_batch_3 is damaged, its MD5 is not"):
        load("cifar10", pickles, batch_size=2)
    (pickles / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"data_batch_3 is missing: unpack cifar-10-python.tar.gz again"):
        load("cifar10", pickles.parent, batch_size=2)
    (pickles / "data_batch_3").write_bytes(data)
    load("cifar10", pickles, batch_size=2)


def test_an_archive_that_was_never_unpacked_is_and_a_damaged_one_is_called_damaged(pickles, monkeypatch):
    root = pickles.parent
    shutil.make_archive(root / "cifar-10-python", "gztar", root, pickles.name)
    archive = root / "cifar-10-python.tar.gz"
    monkeypatch.setattr(published.CIFAR10, "tgz_md5", datasets.hashlib.md5(archive.read_bytes()).hexdigest())
    shutil.rmtree(pickles)
    whole = archive.read_bytes()
    os.truncate(archive, 1000)
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz is damaged, its MD5 is not"):
        load("cifar10", root, batch_size=2)
    assert [path.name for path in root.iterdir()] == [archive.name]
    archive.write_bytes(whole)
    assert len(load("cifar10", root, batch_size=2)[0].labels) == 20
    assert archive.read_bytes() == whole
    assert sorted(path.name for path in root.iterdir()) == [pickles.name, archive.name]


# Downloads


def test_a_download_that_fails_removes_nothing_but_its_own(tmp_path):
    data = tmp_path / "data"
    data.mkdir()

    def fetch(folder):
        (folder / "half").write_text("of it")
        (data / "another programs").write_text("stays")
        raise OSError("the line is cut")

    with pytest.raises(
        InputError, match=r"x is not in .* and cannot be downloaded \(the line is cut\): put it there as y"
    ):
        downloads.download("x", data, fetch, lambda: False, "y")
    assert [path.name for path in data.iterdir()] == ["another programs"]


@pytest.mark.parametrize(
    "error", [ValueError("nonnumeric port: '80x'"), UnicodeError("bad\nname"), EOFError(), KeyError("Location")]
)
def test_whatever_a_download_meets_ends_in_one_line(tmp_path, error):
    def fetch(folder):
        raise error

    with pytest.raises(InputError, match="cannot be downloaded") as caught:
        downloads.download("x", tmp_path, fetch, lambda: False, "y")
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_of_two_downloads_at_once_the_second_takes_what_the_first_got(tmp_path):
    begun, fetched = threading.Event(), []

    def fetch(folder):
        begun.set()
        fetched.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("data")

    def second():
        begun.wait(10)
        downloads.download("x", tmp_path, fetch, (tmp_path / "sub" / "file").is_file, "y")

    thread = threading.Thread(target=second)
    thread.start()
    downloads.download("x", tmp_path, fetch, (tmp_path / "sub" / "file").is_file, "y")
    thread.join()
    assert len(fetched) == 1 and (tmp_path / "sub" / "file").read_text() == "data"
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]
