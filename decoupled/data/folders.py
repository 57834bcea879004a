"""Image folders: their listing, and folders of small images, decoded once and cached."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from decoupled.data.images import SIDE, read_image
from decoupled.errors import InputError

CACHE = f".decoded-{SIDE}.npz"


def list_images(path, layout):
    """torchvision's ImageFolder of ``path``, whose class folders hold images. ``layout`` says how they should lie.

    Raises InputError where there is no such folder, none can be read, a class has no image, or there is one class only.
    """
    from torchvision.datasets import ImageFolder

    if not path.is_dir():
        raise InputError(f"{path} is missing: {layout}")
    try:
        listing = ImageFolder(path)
    except FileNotFoundError as error:
        reason = str(error).split(". Supported")[0].rstrip(".")
        raise InputError(f"{path} cannot be read as image folders ({reason}): {layout}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    if len(listing.classes) == 1:
        raise InputError(
            f"{path} has one class only, {listing.classes[0]!r}, and nothing can be learned from that (unpacked one "
            f"folder too deep?): {layout}"
        )
    return listing


def same_classes(folder, splits, listings):
    """Raises InputError, naming one, for a class folder that is in only one of the two ``splits``."""
    names = [set(listing.classes) for listing in listings]
    if odd := sorted(names[0] ^ names[1]):
        raise InputError(f"{folder}: class folder {odd[0]!r} is in only one of {' and '.join(splits)}")


def read_folders(folder, splits=("train", "test"), resize=False):
    """((images, labels) of each of ``splits``, [class names], kind of the files): images uint8 (N, 32, 32, 3), labels
    int64 (N,), of ``folder``/SPLIT/<class>/*, class names sorted, one image of each class in turn.

    Images of another size than 32×32 are an error; with ``resize`` they are cropped to a square in the centre, and
    resized. What was decoded is kept in ``folder``/.decoded-32.npz, and used while names, sizes and times of all files
    are what they were.
    """
    layout = f"image folders are {{{','.join(splits)}}}/<class>/<image>"
    listings = [list_images(folder / split, layout) for split in splits]
    same_classes(folder, splits, listings)
    kinds = sorted({Path(path).suffix.lstrip(".").lower() for path, _ in listings[0].samples})
    kind = ", ".join({"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}.get(kind, kind) for kind in kinds)
    samples = [in_turn(listing.samples) for listing in listings]
    key = digest(folder, samples, resize)
    images = cached(folder / CACHE, key, [len(split) for split in samples])
    if images is None:
        images = [decode(split, resize) for split in samples]
        keep(folder / CACHE, key, images)
    labels = [torch.tensor([label for _, label in split]) for split in samples]
    return [*zip(map(torch.from_numpy, images), labels, strict=True)], listings[0].classes, kind


def in_turn(samples):
    """[(path, label), …] ordered by place in the class, then class."""
    place, turns = {}, []
    for path, label in samples:
        place[label] = place.get(label, -1) + 1
        turns.append((place[label], label, path))
    return [(path, label) for _, label, path in sorted(turns)]


def decode(samples, resize):
    """The images of [(path, label), …]: uint8 (N, 32, 32, 3)."""
    images = np.empty((len(samples), SIDE, SIDE, 3), np.uint8)
    for row, (path, _) in enumerate(samples):
        image = read_image(path)
        if resize and image.size != (SIDE, SIDE):
            image = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BILINEAR)
        if image.size != (SIDE, SIDE):
            width, height = image.size
            raise InputError(
                f"{path} is {width}x{height}: this data set's images are {SIDE}x{SIDE}; --dataset folder resizes others"
            )
        images[row] = np.asarray(image)
    return images


# The cache


def digest(folder, samples, resize):
    """What the decoded images depend on: names, sizes and times of the files."""
    text = hashlib.sha256(f"{SIDE} {resize} {Image.__version__}".encode())
    for path, label in (sample for split in samples for sample in split):
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): make it readable, or remove it") from error
        text.update(os.fsencode(f"{os.path.relpath(path, folder)}\0{label} {status.st_size} {status.st_mtime_ns}\n"))
    return text.hexdigest()


def cached(path, key, counts):
    """The images kept at ``path`` under ``key``, one array a split of so many ``counts``; None where there are none, or
    the file is damaged (its checksums are compared).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["key"].item() != key:
                return None
            images = [file[f"images{split}"] for split in range(len(counts))]
    except Exception:  # whatever a damaged file leads to, the images themselves are there
        return None
    right = [(array.dtype, array.shape) for array in images] == [(np.uint8, (n, SIDE, SIDE, 3)) for n in counts]
    return images if right else None


def keep(path, key, images):
    """Writes the cache, where that is possible: under a temporary name, then renamed."""
    temporary = path.with_suffix(".tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(file, key=key, **{f"images{split}": array for split, array in enumerate(images)})
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
    except OSError:  # the folder is not to be written to
        pass
