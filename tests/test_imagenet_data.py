"""ImageNet's images: what is drawn for them, how processes share them, worker processes, and bad folders."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from running import ROOT, load_script
from small_imagenet import CLASSES, DGL, TRAIN, VAL, write_folders

from decoupled import InputError

load_script(DGL)  # its folder can be imported from now on
import imagenet_folders  # noqa: E402

FLAGS = ("--arch", "vgg11", "--block_size", 8, "--channels", 2, "--image-size", 32, "-b", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the image folders, to spoil."""
    return shutil.copytree(folder, tmp_path / "own")


def load(folder, **settings):
    return imagenet_folders.load(folder, **{"image_size": 32, "batch_size": 8, "workers": 0, **settings})


def run_small(*flags, **settings):
    """Starts imagenet_dgl.py with a small network as a process."""
    command = [sys.executable, ROOT / DGL, *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **settings)


def test_an_images_augmentation_is_drawn_from_seed_epoch_and_number(folder):
    train, val, classes = load(folder)
    assert (len(train.samples), len(val.samples), classes) == (TRAIN, VAL, CLASSES)
    first = train.samples[1, 4][0]
    torch.rand(3)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32)
    assert torch.equal(train.samples[1, 4][0], first)
    others = [train.samples[2, 4][0], load(folder, seed=2)[0].samples[1, 4][0]]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(val.samples[1, 4][0], val.samples[2, 4][0])
    state = torch.get_rng_state()
    _ = train.samples[1, 5]
    assert torch.equal(torch.get_rng_state(), state)


def flat(lists):
    return [element for each in lists for element in each]


def test_processes_share_each_mini_batch(folder):
    def keys(share, epoch=1, start=0):
        share.epoch, share.start = epoch, start
        return [[index for _, index in batch] for batch in share]

    whole = keys(load(folder)[0].sampler)
    assert [len(batch) for batch in whole] == [8, 8, 5] and sorted(flat(whole)) == list(range(TRAIN))
    assert keys(load(folder)[0].sampler, epoch=2) != whole
    assert keys(load(folder)[0].sampler, start=2) == whole[2:]
    for processes in (2, 3):
        shares = [keys(load(folder, rank=rank, processes=processes)[0].sampler) for rank in range(processes)]
        assert [flat(parts) for parts in zip(*shares, strict=True)] == whole
        tests = [keys(load(folder, rank=rank, processes=processes)[1].sampler) for rank in range(processes)]
        assert sorted(flat(flat(test) for test in tests)) == list(range(VAL))  # each image once, none twice


def test_normalization_is_imagenets(folder):
    _, val, _ = load(folder)
    image = val.samples[1, 3][0]
    expected = torchvision.transforms.v2.functional.normalize(
        image.float() / 255, imagenet_folders.MEAN, imagenet_folders.STD
    )
    images, labels = next(iter(val))
    torch.testing.assert_close(images[3], expected, rtol=0, atol=1e-5)
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_center_crop_is_the_middle_of_the_image_resized(folder):
    _, val, _ = load(folder)
    image = val.samples.dataset.decode(5)
    resized = torchvision.transforms.v2.functional.resize(image, 36, antialias=True)
    top, left = (round((side - 32) / 2) for side in resized.shape[1:])
    assert torch.equal(val.samples[1, 5][0], resized[:, top : top + 32, left : left + 32])


def test_neither_workers_nor_a_resumed_epoch_change_the_images(folder):
    train, _, _ = load(folder)
    expected = [*train, *train]
    working, _, _ = load(folder, workers=2)
    first = [*working]
    iterator = iter(working)
    first.append(next(iterator))
    resumed, _, _ = load(folder, workers=1)
    resumed.load_state_dict(working.state_dict())
    for mine, whole in zip([*first, *resumed.rest()], expected, strict=True):
        assert torch.equal(mine[0], whole[0]) and torch.equal(mine[1], whole[1])


# What cannot be trained on


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def remove_classes(split):
    for path in split.iterdir():
        shutil.rmtree(path)


BAD_FOLDERS = {
    "no train": (lambda own: shutil.rmtree(own / "train"), "own/train"),
    "no val": (lambda own: shutil.rmtree(own / "val"), "own/val"),
    "empty class": (lambda own: empty(own / "train/class3"), "class3"),
    "no class": (lambda own: remove_classes(own / "val"), "own/val"),
    "other classes": (lambda own: (own / "val/class3").rename(own / "val/class30"), "class3"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders(own, kind):
    spoil, named = BAD_FOLDERS[kind]
    spoil(own)
    with pytest.raises(InputError, match=named):
        load(own)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_samples": TRAIN + 1}, "--train-samples"),
        ({"val_samples": VAL + 1}, "--val-samples"),
        ({"batch_size": TRAIN + 1}, "-b"),
        ({"batch_size": 20}, "batch of 1"),
        ({"processes": 3, "min_share": 2}, "at least 6"),
        ({"processes": 3, "val_samples": 2}, "own/val"),
    ],
)
def test_bad_numbers(own, settings, named):
    with pytest.raises(InputError, match=named):
        load(own, **settings)


def test_what_is_left_out_is_in_the_description(own):
    train, val, _ = load(own)
    assert str(train) == f"{TRAIN} images of {CLASSES} classes"
    (own / "train/class1/.DS_Store").touch()
    (own / "train/class1/notes.txt").touch()
    assert "class1/notes.txt, class1/.DS_Store" in str(load(own)[0])
    assert str(load(own)[1]) == str(val)


def test_a_damaged_image_ends_the_process_and_its_workers(own, tmp_path):
    path = own / "train/class4/1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=str(path)):
        list(load(own)[0])
    run = run_small(own, *FLAGS, "-j", 2, "--save_folder", tmp_path / "logs")
    message = run.communicate(timeout=60)[1]
    assert run.returncode == 2 and message.count("\n") == 1 and str(path) in message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker in /proc")
def test_a_killed_worker_ends_the_run(folder, tmp_path):
    flags = (*FLAGS, "-j", 1, "--epochs", 9999, "--save_folder", tmp_path / "logs")
    run = run_small(folder, *flags, stdout=subprocess.DEVNULL)
    try:
        while run.poll() is None and not any("epoch 1," in path.read_text() for path in tmp_path.glob("logs/*.log")):
            time.sleep(0.05)
        for task in Path(f"/proc/{run.pid}/task").glob("*/children"):
            for child in task.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        message = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode != 0 and "DataLoader worker" in message


def test_a_long_tmpdir_is_refused_before_workers_start(folder, tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(InputError, match="TMPDIR"):
        load(folder, workers=2)
    assert len([*load(folder, workers=0)[0]]) == 3
    assert not [*long.iterdir()]


def test_other_images_are_not_resumed(own, folder, tmp_path):
    state = load(folder)[0].state_dict()
    moved = shutil.copytree(folder, tmp_path / "moved")
    load(moved)[0].load_state_dict(state)
    image = own / "train/class4/1.JPEG"
    data = image.read_bytes()
    image.write_bytes(data + b"\0")
    with pytest.raises(InputError):
        load(own)[0].load_state_dict(state)
    image.write_bytes(data)
    load(own)[0].load_state_dict(state)
    (own / "train/class4/1.JPEG").rename(own / "train/class4/7.JPEG")
    with pytest.raises(InputError):
        load(own)[0].load_state_dict(state)
