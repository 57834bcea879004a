"""Images that look otherwise than they are stored, and data that cannot be trained on: read as they look, or named."""

import functools
import gzip
import hashlib
import http.server
import os
import pickle
import shutil
import struct
import threading
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from running import PARALLEL
from torchvision import datasets as published

from decoupled import InputError
from decoupled.data import datasets
from decoupled.data.datasets import load
from decoupled.data.folders import list_images
from decoupled.data.images import InputForm, read_image

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (32, 32), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


def noise(height=32, width=32, channels=3):
    return RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_classes(root, splits=("train", "test"), classes=("a", "b"), count=4, size=(32, 32)):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(noise(*size)).save(root / split / name / f"{index}.png")
    return root


def png(depth, color, row, extra=b""):
    """The bytes of a PNG of 32×32 pixels whose rows are all ``row``; ``extra`` are chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, color, 0, 0, 0))
    return PNG + header + extra + chunk(b"IDAT", zlib.compress((b"\0" + row) * 32)) + chunk(b"IEND", b"")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# Images that are read as they look

PNG = b"\x89PNG\r\n\x1a\n"
PICTURE = noise(32, 24)
UPPER_HALF_CLEAR = np.full((32, 24), 255, np.uint8)
UPPER_HALF_CLEAR[:16] = 0


def turned(orientation):
    """The picture as it is stored with this EXIF orientation, and the tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    return Image.fromarray(PICTURE).transpose(stored[orientation]), exif


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_orientation_is_applied(tmp_path, suffix, orientation):
    stored, exif = turned(orientation)
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif, lossless=True)
    assert np.array_equal(read_image(path), PICTURE)


def test_orientation_of_a_photo_and_damaged_exif(tmp_path):
    stored, exif = turned(6)
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    Image.fromarray(PICTURE).save(tmp_path / "damaged.jpg", exif=b"Exif\0\0garbage", quality=100, subsampling=0)
    for path in tmp_path.iterdir():
        assert np.abs(np.asarray(read_image(path)).astype(int) - PICTURE).max() < 8


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "tga"])
def test_white_shows_through_transparency(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.dstack([PICTURE, UPPER_HALF_CLEAR])).save(path, lossless=True, exact=True)
    seen = np.asarray(read_image(path))
    assert (seen[:16] == 255).all() and np.array_equal(seen[16:], PICTURE[16:])


def test_transparency_of_palettes_and_grey_and_single_colors(tmp_path):
    palette = Image.fromarray(PICTURE).quantize(16)
    palette.save(tmp_path / "0.png", transparency=3)
    palette.save(tmp_path / "1.gif", transparency=3)
    palette.save(tmp_path / "2.png", transparency=bytes(255 * (index != 3) for index in range(16)))
    shown = np.array(palette.convert("RGB"))
    shown[np.asarray(palette) == 3] = 255
    for name in ("0.png", "1.gif", "2.png"):
        assert np.array_equal(read_image(tmp_path / name), shown)
    Image.fromarray(GREY).save(tmp_path / "grey.png", transparency=7)
    seen = np.asarray(read_image(tmp_path / "grey.png"))
    assert np.array_equal(seen[..., 0], np.where(GREY == 7, 255, GREY)) and 7 in GREY


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_modes_are_read_as_they_look(tmp_path, mode):
    image = Image.fromarray(PICTURE).convert(mode)
    image.save(tmp_path / "x.tif")
    assert np.array_equal(read_image(tmp_path / "x.tif"), image.convert("RGB"))


def test_a_photo_with_a_preview_is_its_first_image(tmp_path):
    Image.fromarray(PICTURE).save(
        tmp_path / "x.mpo", quality=100, save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert read_image((tmp_path / "x.mpo").rename(tmp_path / "x.jpg")).size == (24, 32)


def test_the_format_is_that_of_the_contents(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.bmp")
    assert np.array_equal(read_image((tmp_path / "x.bmp").rename(tmp_path / "x.png")), PICTURE)


def test_zeros_after_the_end_of_a_photo_do_no_harm(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(PICTURE).save(path, quality=100, subsampling=0)
    before = read_image(path)
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert read_image(path) == before


# Images that are refused


def deeper_jpeg_2000(path):
    """An image of 8 bits whose header says 12, as Pillow writes no color of 12."""
    Image.fromarray(noise()).save(path, "JPEG2000")
    data = bytearray(path.read_bytes())
    sizes = data.index(b"\xff\x4f\xff\x51") + 4
    for component in range(3):
        data[sizes + 38 + 3 * component] = 11
    path.write_bytes(data)


def without_end(path, kind):
    """Half of a compressed image, and zeros in place of the rest: decoders fill in gray."""
    Image.fromarray(noise(96, 96)).save(path, kind, quality=50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4] + bytes(3 * len(data) // 4))


def signed_tiff(path):
    Image.fromarray(GREY).save(path, "TIFF", tiffinfo={339: 2})


def frames(path, kind):
    Image.fromarray(noise()).save(path, kind, save_all=True, append_images=[Image.new("RGB", (32, 32))])


DEEP = "more than 8 bits"
DAMAGED = "damaged"
REFUSED = {
    "16-bit grey": (lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path), DEEP),
    "16-bit grey with alpha": (lambda path: path.write_bytes(png(16, 4, bytes(128))), DEEP),
    "16-bit color": (lambda path: path.write_bytes(png(16, 2, bytes(192))), DEEP),
    "16-bit color with alpha": (lambda path: path.write_bytes(png(16, 6, bytes(256))), DEEP),
    "32-bit grey": (lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path, "TIFF"), DEEP),
    "float": (lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path, "TIFF"), DEEP),
    "12-bit PPM": (lambda path: path.write_bytes(b"P6 32 32 4095\n" + bytes(32 * 32 * 6)), DEEP),
    "12-bit plain PPM": (lambda path: path.write_text("P3 1 1 4095\n4095 1 2\n"), DEEP),
    "16-bit JPEG 2000": (lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path, "JPEG2000"), DEEP),
    "12-bit color JPEG 2000": (deeper_jpeg_2000, DEEP),
    "16-bit SGI": (lambda path: Image.fromarray(noise()).save(path, "SGI", bpc=2), DEEP),
    "4-bit grey, one transparent": (
        lambda path: path.write_bytes(png(4, 0, bytes(16), chunk(b"tRNS", b"\0\5"))),
        "gray",
    ),
    "Lab": (lambda path: Image.new("LAB", (32, 32)).save(path, "TIFF"), "LAB"),
    "GIF of two frames": (lambda path: frames(path, "GIF"), "2 frames"),
    "TIFF of two pages": (lambda path: frames(path, "TIFF"), "2 frames"),
    "animated PNG": (lambda path: frames(path, "PNG"), "2 frames"),
    "too many pixels": (lambda path: Image.new("1", (20000, 10000)).save(path), "more pixels"),
    "empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "text": (lambda path: path.write_text("hello"), DAMAGED),
    "vector graphics": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), DAMAGED),
    "header alone": (lambda path: path.write_bytes(PNG), DAMAGED),
    "endless text chunk": (
        lambda path: path.write_bytes(PNG + struct.pack(">I4s", 2**31 - 1, b"zTXt") + b"x" * 99),
        DAMAGED,
    ),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:1500]), DAMAGED),
    "JPEG without its end": (lambda path: without_end(path, "JPEG"), DAMAGED),
    "WebP without its end": (lambda path: without_end(path, "WEBP"), DAMAGED),
    "signed values": (signed_tiff, "signed"),
    "transparent everywhere": (lambda path: Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(path, "TGA"), "transparent"),
    "dangling link": (lambda path: (path.unlink(), path.symlink_to("nowhere.png")), "cannot be read"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_cannot_be_read_as_it_looks_is_named(tmp_path, kind):
    path = tmp_path / "1.png"
    Image.fromarray(noise()).save(path)
    spoil, reason = REFUSED[kind]
    spoil(path)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path} ") and reason in str(error.value) and "\n" not in str(error.value)


def test_training_and_predict_refuse_it_alike(tmp_path):
    root = write_classes(tmp_path / "data")
    path = root / "train" / "b" / "1.png"
    path.write_bytes(png(16, 2, bytes(192)))
    form = InputForm(["a", "b"], (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    for read in (lambda: load("folder", root, batch_size=2), lambda: form.read(path)):
        with pytest.raises(InputError, match=f"^{path} .*8 bits"):
            read()


# Listing folders


def listed(root):
    listing = list_images(root, "layout")
    return listing.classes, [(os.path.relpath(path, root), label) for path, label in listing.samples]


def test_every_suffix_of_an_image_format_is_read(tmp_path):
    names = ["0.jpg", "1.JPEG", "2.jfif", "3.gif", "4.Tiff", "5.webp", "6.bmp", "7.tga", "8.jp2", "9.avif"]
    for label in "ab":
        (tmp_path / label).mkdir()
        for name in names:
            Image.fromarray(noise()).save(tmp_path / label / name)
    assert listed(tmp_path) == (
        ["a", "b"],
        [(f"{label}/{name}", "ab".index(label)) for label in "ab" for name in names],
    )


def test_files_of_systems_are_left_out_and_named(tmp_path):
    root = write_classes(tmp_path / "data")
    plain = [load("folder", root, batch_size=2)[split] for split in (0, 1)]
    (root / "train" / "__MACOSX" / "a").mkdir(parents=True)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copytree(root / "train" / "a", root / "train" / "a" / ".hidden")
    for name in ("a/._0.png", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini", "b/notes.txt", "stray.png"):
        (root / "train" / name).write_text("x")
    (root / "test" / "a" / "0.svg").write_text("x")
    train, test, classes = load("folder", root, batch_size=2)
    assert classes == 2 and torch.equal(train.images, plain[0].images) and torch.equal(test.images, plain[1].images)
    assert str(train).startswith(str(plain[0]))
    assert "12 files left out: b/notes.txt, stray.png, " in str(train)
    assert "1 file left out: a/0.svg" in str(test)
    assert len(list_images(root / "train", "layout").left_out) == 12


def test_subfolders_belong_to_their_class(tmp_path):
    root = write_classes(tmp_path / "data", classes=("a", "b"), count=1)
    (root / "train" / "a" / "deeper").mkdir()
    Image.fromarray(noise()).save(root / "train" / "a" / "deeper" / "9.png")
    assert listed(root / "train")[1] == [("a/0.png", 0), ("a/deeper/9.png", 0), ("b/0.png", 1)]


def test_a_class_name_in_two_unicode_forms_is_one_class(tmp_path):
    root = write_classes(tmp_path / "data", classes=("café", "zoo", "É"))
    for name in ("café", "É"):
        (root / "test" / name).rename(root / "test" / unicodedata.normalize("NFD", name))
    train, test, classes = load("folder", root, batch_size=2)
    assert classes == 3 and train.form.classes == test.form.classes == ["café", "zoo", "É"]
    assert listed(root / "train")[0] == listed(root / "test")[0]
    assert {label for path, label in listed(root / "test")[1] if path.startswith("zoo")} == {1}


@pytest.mark.parametrize("name", ["猫", b"caf\xe9", "new\nline", "a b"])
def test_names_of_any_alphabet_and_none(tmp_path, name):
    root = write_classes(tmp_path / "data")
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "a"), os.path.join(os.fsencode(root / split), os.fsencode(name)))
    assert len(load("folder", root, batch_size=2)[0].labels) == 8


def test_a_folder_that_is_reached_twice_is_named(tmp_path):
    root = write_classes(tmp_path / "data")
    loop = root / "train" / "a" / "loop"
    loop.symlink_to(root / "train" / "a")
    with pytest.raises(InputError, match=str(loop)):
        list_images(root / "train", "layout")


def test_links_that_lead_around_end_in_an_error(tmp_path):
    root = write_classes(tmp_path / "data", splits=("train",))
    for name in ("one", "two", "three"):  # 3^40 paths, until the system finds them too long
        (root / "train" / "a" / name).symlink_to(root / "train" / "a")
    with pytest.raises(InputError, match="same folder"):
        list_images(root / "train", "layout")


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path):
    root = write_classes(tmp_path / "data", splits=("train",))
    folder = os.open(root / "train" / "a", os.O_RDONLY)
    for _ in range(20):  # until the path is longer than the system takes
        os.mkdir("x" * 250, dir_fd=folder)
        above = folder
        folder = os.open("x" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(above)
    os.close(folder)
    with pytest.raises(InputError, match="cannot be read"):
        list_images(root / "train", "layout")


# Image folders that cannot be trained on


def one_folder_too_deep(root):
    for split in ("train", "test"):
        (root / split).rename(root / "deeper")
        (root / split).mkdir()
        (root / "deeper").rename(root / split / "images")


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def blacken(root):
    for path in (root / "train").glob("*/*.png"):
        Image.new("RGB", (32, 32)).save(path)


FOLDERS = {
    "one class": (one_folder_too_deep, "'images'"),
    "no test split": (lambda root: (root / "test").rename(root / "other"), "data/test"),
    "no classes": (lambda root: shutil.rmtree(root / "train") or (root / "train").mkdir(), "data/train"),
    "a class without images": (lambda root: empty(root / "train" / "a"), "'a'"),
    "other classes": (lambda root: (root / "test" / "a").rename(root / "test" / "c"), "'a'"),
    "all black": (blacken, "same value"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_cannot_be_trained_on(tmp_path, kind):
    root = write_classes(tmp_path / "data")
    spoil, named = FOLDERS[kind]
    spoil(root)
    with pytest.raises(InputError, match=named):
        load("folder", root, batch_size=4)


def test_a_script_ends_in_one_line(fails, tmp_path):
    root = write_classes(tmp_path / "data")
    (root / "train" / "b" / "1.png").write_text("hello")
    assert "b/1.png" in fails(PARALLEL, "--dataset", "folder", "--data-dir", root, "--batch-size", 4)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_a_set_of_other_classes_is_not_called_cifar(tmp_path, dataset):
    root = write_classes(tmp_path / "data")
    with pytest.raises(InputError, match="2 classes"):
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
    assert (image[:, :14] == 0).all() and (image[:, 18:] == 200).all()  # cropped to a square in the center
    pixels = train.images[:, 4:36, 4:36].reshape(-1, 3).double() / 255
    torch.testing.assert_close(train.shift.double() / 255, pixels.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1 / train.scale.double() / 255, pixels.std(0), rtol=1e-5, atol=1e-6)


# Published files: Fashion-MNIST's


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A folder of idx files of 20 training and 10 test images, whose checksums are now the published ones."""
    for split, count in (("train", 20), ("t10k", 10)):
        images = RANDOM.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        files = {
            f"{split}-images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">II", 2049, count) + labels.tobytes(),
        }
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            monkeypatch.setitem(datasets.FASHION_MNIST_FILES, name, hashlib.md5(data).hexdigest())
    return tmp_path


def compress(folder):
    for path in [*folder.iterdir()]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_from_idx_files(idx, packed):
    if packed:
        compress(idx)
    train, test, classes = load("fashion-mnist", idx, batch_size=5)
    assert (len(train.labels), len(test.labels), classes, train.flip) == (20, 10, 10, True)
    assert test.labels.tolist() == [*range(10)] and str(test) == "10 images of fashion-mnist (idx files)"
    image = test.images[0]
    assert (image[2:30, 2:30] > 0).all()
    assert image.count_nonzero() == 28 * 28 * 3
    assert torch.equal(image[..., 0], image[..., 1]) and torch.equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "harm",
    [lambda path: os.truncate(path, 3000), lambda path: flip(path, 5000), empty],
    ids=["truncated", "flipped", "empty"],
)
def test_an_idx_file_that_is_not_the_published_one_is_named(idx, packed, harm):
    if packed:
        compress(idx)
    suffix = ".gz" if packed else ""
    path = idx / f"train-images-idx3-ubyte{suffix}"
    if harm is empty:
        path.unlink()
    else:
        harm(path)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte"):
        load("fashion-mnist", idx, batch_size=5)


# CIFAR's


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """data/cifar-10-batches-py of 20 training and 4 test images, whose checksums are now the published ones."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        return [name, write(name, {"data": noise(4, 32 * 32, 3).reshape(4, -1), "labels": [0, 9, 3, 1]})]

    monkeypatch.setattr(published.CIFAR10, "train_list", [batch(f"data_batch_{n}") for n in range(1, 6)])
    monkeypatch.setattr(published.CIFAR10, "test_list", [batch("test_batch")])
    md5 = write("batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(published.CIFAR10, "meta", published.CIFAR10.meta | {"md5": md5})
    return folder


@pytest.fixture
def archive(pickles, monkeypatch):
    """The archive of these files, in their place."""
    path = pickles.parent / "cifar-10-python.tar.gz"
    shutil.make_archive(pickles.parent / "cifar-10-python", "gztar", pickles.parent, pickles.name)
    monkeypatch.setattr(published.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(published.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody answers
    shutil.rmtree(pickles)
    return path


def test_cifar_in_a_folder_or_as_the_folder_itself(pickles):
    above, itself = (load("cifar10", folder, batch_size=2) for folder in (pickles.parent, pickles))
    for train, test, classes in (above, itself):
        assert (len(train.labels), len(test.labels), classes, train.description) == (20, 4, 10, "cifar10 (original)")
        assert torch.equal(train.images, above[0].images)


def test_a_damaged_file_of_cifar_is_named_and_kept(pickles, archive):
    load("cifar10", archive.parent, batch_size=2)
    flip(pickles / "data_batch_3", 500)
    data = (pickles / "data_batch_3").read_bytes()
    with pytest.raises(InputError, match="data_batch_3"):
        load("cifar10", pickles, batch_size=2)
    assert (pickles / "data_batch_3").read_bytes() == data


def test_an_archive_is_unpacked_and_a_damaged_one_is_named(archive):
    whole = archive.read_bytes()
    os.truncate(archive, 1000)
    with pytest.raises(InputError, match=str(archive)):
        load("cifar10", archive.parent, batch_size=2)
    assert [*archive.parent.iterdir()] == [archive]
    archive.write_bytes(whole)
    assert len(load("cifar10", archive.parent, batch_size=2)[0].labels) == 20
    assert sorted(path.name for path in archive.parent.iterdir()) == ["cifar-10-batches-py", archive.name]


# Downloads


@pytest.fixture
def server(archive, tmp_path, monkeypatch):
    """Serves the archive; a list of the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            if self.command == "GET":
                asked.append(self.path)

    (tmp_path / "web").mkdir()
    archive.rename(tmp_path / "web" / archive.name)
    handler = functools.partial(Handler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setattr(published.CIFAR10, "url", f"http://127.0.0.1:{web.server_port}/{archive.name}")
        yield asked
        web.shutdown()


def test_of_parallel_runs_one_downloads(server, archive):
    results = []

    def run():
        results.append(len(load("cifar10", archive.parent, batch_size=2)[0].labels))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [20, 20, 20]
    assert server == [f"/{archive.name}"] * 2  # torchvision asks first where it lies


def test_a_download_that_is_not_the_published_file_is_named(server, archive, tmp_path):
    flip(tmp_path / "web" / archive.name, 500)
    with pytest.raises(InputError, match=str(archive)):
        load("cifar10", archive.parent, batch_size=2)
