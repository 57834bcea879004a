"""Images: reading, order, augmentation statistics, and every kind of bad data."""

import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from decoupled import InputError
from decoupled.data import datasets
from decoupled.data.batches import Batches
from decoupled.data.datasets import load

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


def numbered(count):
    """Images whose pixels (y, x) hold y+1, x+1 and the image's number: any crop or flip can be read back from them. No
    pixel is 0.
    """
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8)
    images[..., 0] = torch.arange(1, 33)[:, None]
    images[..., 1] = torch.arange(1, 33)
    images[..., 2] = torch.arange(1, count + 1)[:, None, None] % 255 + 1
    return images, torch.arange(count)


def pixels(images):
    """Undoes normalization: (B, 3, 32, 32) float → (B, 32, 32, 3) whole numbers 0..255."""
    return (
        (images.permute(0, 2, 3, 1) * torch.tensor(STATISTICS["std"]) + torch.tensor(STATISTICS["mean"]))
        .mul(255)
        .round()
        .long()
    )


def test_normalization_is_zero_mean_unit_variance_in_channels_last_memory():
    images = torch.randint(256, (10, 32, 32, 3), dtype=torch.uint8)
    ((batch, labels),) = Batches(images, torch.arange(10), 10, **STATISTICS)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor((0.5, 0.4, 0.3))[:, None, None]) / torch.tensor(
        (0.2, 0.25, 0.5)
    )[:, None, None]
    torch.testing.assert_close(batch, expected)
    assert batch.is_contiguous(memory_format=torch.channels_last) and batch.dtype == torch.float32
    assert torch.equal(labels, torch.arange(10))


def test_every_image_comes_once_an_epoch_and_the_short_batch_is_kept():
    train = Batches(*numbered(70), 32, **STATISTICS, augment=True)
    for _ in range(2):
        labels = [labels for _, labels in train]
        assert [len(batch) for batch in labels] == [32, 32, 6] and len(train) == 3
        assert sorted(torch.cat(labels).tolist()) == list(range(70))
    dropping = Batches(*numbered(70), 32, **STATISTICS, augment=True, drop_last=True)
    assert [len(labels) for _, labels in dropping] == [32, 32] and len(dropping) == 2


def test_crops_are_uniform_flips_are_half_and_borders_are_zero():
    train = Batches(*numbered(200), 200, **STATISTICS, augment=True, seed=5)
    offsets, flips, count = torch.zeros(9, 9), 0, 0
    for _ in range(60):
        ((batch, labels),) = train
        image = pixels(batch)
        # The centre pixel is inside the original image whatever the crop.
        flipped = image[:, 16, 16, 1] < image[:, 16, 15, 1]
        top = image[:, 16, 16, 0] - 1 - 16 + 4
        left = torch.where(flipped, image[:, 16, 15, 1], image[:, 16, 16, 1]) - 1 - 16 + 4
        offsets.index_put_((top, left), torch.ones(200), accumulate=True)
        flips, count = flips + flipped.sum().item(), count + 200
        # Every pixel, against plain slicing of the padded image.
        for row in range(0, 200, 50):
            padded = torch.zeros(40, 40, 3, dtype=torch.long)
            padded[4:36, 4:36] = numbered(200)[0][labels[row]]
            expected = padded[top[row] : top[row] + 32, left[row] : left[row] + 32]
            assert torch.equal(image[row], expected.flip(1) if flipped[row] else expected)
    expected = count / 81
    assert (
        (offsets - expected) ** 2 / expected
    ).sum() < 130  # chi-squared of 80 degrees of freedom: beyond its 99.9 % point 124.8
    assert abs(flips / count - 0.5) < 4 * 0.5 / count**0.5


def offsets(image, padded):
    """The (top, left) at which ``image`` lies in ``padded`` or in its mirror image."""
    found = []
    for view in (padded, padded.flip(1)):
        for top in range(9):
            for left in range(9):
                if torch.equal(view[top : top + image.shape[0], left : left + image.shape[1]], image):
                    found.append((top, left))
    return found


def test_images_are_cropped_to_their_own_size():
    images = torch.randint(1, 256, (50, 48, 64, 3), dtype=torch.uint8)
    train = Batches(images, torch.arange(50), 50, **STATISTICS, augment=True)
    ((batch, labels),) = train
    assert batch.shape == (50, 3, 48, 64)
    found = []
    for image, label in zip(pixels(batch), labels, strict=True):
        found += offsets(image, F.pad(images[label].long(), (0, 0, 4, 4, 4, 4)))
    assert len(found) == 50 and len(set(found)) > 20
    ((whole, _),) = train.without_augmentation()
    assert torch.equal(pixels(whole), images.long())


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.rand(4, 32, 32, 3), torch.arange(4)),
        (torch.zeros(4, 32, 32, 3, dtype=torch.int64), torch.arange(4)),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)),
        (torch.zeros(4, 32, 32, dtype=torch.uint8), torch.arange(4)),
        (torch.zeros(5, 32, 32, 3, dtype=torch.uint8), torch.arange(4)),
    ],
)
def test_what_would_be_read_wrongly_is_refused(images, labels):
    with pytest.raises(InputError):
        Batches(images, labels, 2, **STATISTICS)


def test_without_flip_no_image_is_mirrored():
    train = Batches(*numbered(100), 100, **STATISTICS, augment=True, flip=False)
    ((batch, _),) = train
    image = pixels(batch)
    assert (image[:, 16, 16, 1] > image[:, 16, 15, 1]).all()


def test_the_test_split_is_not_augmented():
    _, test, _ = load("digits", batch_size=8)
    first, second = ([images for images, _ in test] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_is_the_seeds_alone_and_is_restored():
    def epoch(batches):
        return [(images.sum().item(), labels.tolist()) for images, labels in batches]

    train = Batches(*numbered(70), 32, **STATISTICS, augment=True, seed=7)
    first = epoch(train)
    saved = train.state_dict()
    torch.manual_seed(123)  # the global generator has no say
    second = epoch(train)
    again = Batches(*numbered(70), 32, **STATISTICS, augment=True, seed=7)
    assert epoch(again) == first and first != second
    resumed = Batches(*numbered(70), 32, **STATISTICS, augment=True, seed=0)
    resumed.load_state_dict(saved)
    assert epoch(resumed) == second
    assert epoch(Batches(*numbered(70), 32, **STATISTICS, augment=True, seed=8)) != first


@pytest.mark.parametrize(("mean", "std"), [((125, 123, 114), (0.2, 0.2, 0.2)), ((0.5, 0.5, 0.5), (63, 62, 67))])
def test_statistics_of_0_to_255_are_refused(mean, std):
    with pytest.raises(InputError):
        Batches(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2), 2, mean=mean, std=std)


def test_a_checkpoint_of_other_images_is_refused():
    saved = Batches(*numbered(70), 32, **STATISTICS).state_dict()
    images, labels = numbered(70)
    images[3, 4, 5, 0] += 1
    with pytest.raises(InputError, match="--data-dir"):
        Batches(images, labels, 32, **STATISTICS).load_state_dict(saved)


def test_digits_are_the_bundled_set():
    train, test, classes = load("digits", batch_size=128)
    assert (len(train.labels), len(test.labels), classes) == (1438, 359, 10)
    assert test.images.shape == (359, 32, 32, 3) and test.images.max() == 255
    assert not train.flip  # a mirrored digit is no digit
    assert str(test) == "359 images of digits (scikit-learn)"
    normalized = torch.cat(
        [images for images, _ in Batches(train.images[:, 4:36, 4:36], train.labels, 500, mean=(0,) * 3, std=(1,) * 3)]
    )
    torch.testing.assert_close((train.shift / 255), normalized.mean((0, 2, 3)), atol=1e-4, rtol=0)


# Image folders


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """CIFAR-10 as image folders, if it had 3 classes: 4 training and 2 test images of each."""
    for name in ("cifar10", "cifar100"):
        monkeypatch.setitem(datasets.CIFAR_CLASSES, name, 3)
    random = np.random.default_rng(0)
    root = tmp_path / "data"
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("bird", "cat", "ship")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                pixels[0, 0] = (label, index, 0)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_image_folders(folders):
    train, test, classes = load("cifar10", folders, batch_size=2)
    assert classes == 3 and str(train) == "12 images of cifar10 (PNG)"
    assert train.labels.tolist() == [0, 1, 2] * 4  # one of each class in turn
    corner = train.images[:, 4, 4].tolist()
    assert corner == [[label, index, 0] for index in range(4) for label in range(3)]
    assert test.labels.tolist() == [0, 1, 2] * 2
    first, _, _ = load("cifar10", folders, batch_size=2, train_samples=4)
    assert first.labels.tolist() == [0, 1, 2, 0]


def test_image_folders_in_a_folder_of_the_sets_name(folders):
    (folders.parent / "sets").mkdir()
    folders.rename(folders.parent / "sets" / "cifar100")
    train, _, _ = load("cifar100", folders.parent / "sets", batch_size=2)
    assert str(train) == "12 images of cifar100 (PNG)"


def test_cifar10_has_the_published_statistics(folders):
    train, _, _ = load("cifar10", folders, batch_size=2)
    torch.testing.assert_close(train.shift / 255, torch.tensor([0.4914, 0.4822, 0.4465]))
    torch.testing.assert_close(1 / train.scale / 255, torch.tensor([0.2023, 0.1994, 0.2010]))


def test_image_of_another_size_is_named(folders):
    Image.new("RGB", (48, 40)).save(folders / "train" / "cat" / "2.png")
    with pytest.raises(InputError, match=r"cat/2\.png is 48x40"):
        load("cifar10", folders, batch_size=2)


# What cannot be had


def test_unknown_data_set():
    with pytest.raises(InputError, match=r"'mnist'.*digits"):
        load("mnist", batch_size=5)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
def test_missing_folder(dataset, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load(dataset, tmp_path / "nowhere", batch_size=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
@pytest.mark.parametrize("exists", [True, False])
def test_without_a_network_the_error_says_what_else_works(dataset, exists, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "mine.txt").write_text("stays")
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(InputError, match=f"^{dataset} .* data .*--dataset digits") as error:
        load(dataset, "data", batch_size=5)
    assert "\n" not in str(error.value)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == (["mine.txt"] if exists else [])
    assert (tmp_path / "data").exists() == exists


def test_a_failed_download_leaves_what_others_have_put_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data")

    def fetch():
        (folder / "raw").mkdir()
        (folder / "mine.txt").write_text("stays")
        raise OSError("no network")

    with pytest.raises(InputError, match="no network"):
        datasets.download_missing(
            "cifar10", folder, fetch=fetch, files={folder / "a": "0"}, archives={}, otherwise="files"
        )
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_samples": 1439, "batch_size": 8}, "--train-samples"),
        ({"train_samples": 100, "batch_size": 101}, "--batch-size"),
        ({"train_samples": 33, "batch_size": 32}, "--batch-size"),
        ({"batch_size": 1}, "--batch-size"),
        ({"validation": 1438, "batch_size": 8}, "--validation"),
        ({"validation": 1400, "train_samples": 39, "batch_size": 8}, "--train-samples"),
    ],
)
def test_impossible_numbers_of_samples(settings, message):
    with pytest.raises(InputError, match=message):
        load("digits", **settings)


def test_first_samples_are_the_first():
    whole, _, _ = load("digits", batch_size=8)
    part, _, _ = load("digits", batch_size=8, train_samples=100)
    assert torch.equal(part.images, whole.images[:100]) and torch.equal(part.labels, whole.labels[:100])
