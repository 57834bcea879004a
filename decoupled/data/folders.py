"""Lists image folders, <class>/<image>, and decodes folders of small images.

Training, testing, predict and ImageNet all list labeled images with ``list_images``.
"""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from decoupled.data.images import SIDE, read_image, suffixes
from decoupled.errors import InputError, one_line

SYSTEM_NAMES = {
    "__MACOSX",
    "Thumbs.db",
    "desktop.ini",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}

MAX_NAMED = 3  # how many of the files left out the log names


@dataclass
class Listing:
    """The images in a folder of class folders.

    classes   their names, sorted, in Unicode's composed form (NFC): systems store the same name in different forms
    samples   [(path, class index)], ordered by class folder, subfolder and file name
    left_out  paths of the files that are not read: those outside the class folders or without an image's suffix, then
              hidden files and files of the operating system
    """

    classes: list
    samples: list
    left_out: list

    def describe_left_out(self, folder):
        """A note for the description of the images: how many files were left out, and the first few of them."""
        if not self.left_out:
            return ""
        names = [one_line(os.path.relpath(path, folder)) for path in self.left_out[:MAX_NAMED]]
        if len(self.left_out) > MAX_NAMED:
            names.append("…")
        files = "1 file" if len(self.left_out) == 1 else f"{len(self.left_out)} files"
        return f"; {files} left out: {', '.join(names)}"


def list_images(path, layout):
    """Lists the images ``path``/<class>/<image>. Images in subfolders of a class folder belong to that class.

    ``layout`` describes the expected folders in error messages. Raises InputError if ``path`` is missing, unreadable or
    without class folders, if a class has no images, or if a link leads to a folder that is already listed.
    """
    path = Path(path)
    left_out = []
    names = class_folders(path, layout, left_out)
    classes = sorted(set(names.values()))
    indices = {name: index for index, name in enumerate(classes)}
    image_filter = ImageFilter(path, left_out)
    samples = []
    walked = {}
    for folder, name in sorted(names.items()):
        for file in walk(path / folder, walked):
            if image_filter.accepts(file):
                samples.append((file, indices[name]))
    left_out.sort(key=lambda file: (is_inside_hidden(file, path), file))
    listing = Listing(classes, samples, left_out)
    with_images = {index for _, index in samples}
    for index, name in enumerate(classes):
        if index not in with_images:
            note = listing.describe_left_out(path)
            raise InputError(f"{path} has no images of class {name!r}{note}: add some, or remove the folder")
    return listing


def class_folders(path, layout, left_out):
    """Returns {folder: class name} of the class folders in ``path``; adds everything else there to ``left_out``."""
    if not path.is_dir():
        raise InputError(f"{path} is missing: {layout}")
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    names = {}
    for entry in entries:
        if entry.is_dir() and not is_hidden(entry.name):
            names[entry.name] = unicodedata.normalize("NFC", entry.name)
        else:
            left_out.append(entry.path)
    if not names:
        raise InputError(f"{path} has no class folders: {layout}")
    return names


def walk(folder, walked):
    """The paths of all files in ``folder`` and its subfolders, sorted. ``walked`` maps the real paths of visited
    folders to their paths.

    Raises InputError for an unreadable folder, whose images would silently be missing, and for a link to a folder that
    has already been visited.
    """

    def fail(error):
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): make it readable") from error

    subfolders = []
    for subfolder, _, names in os.walk(folder, onerror=fail, followlinks=True):
        first = walked.setdefault(os.path.realpath(subfolder), subfolder)
        if first != subfolder:
            raise InputError(f"{first} and {subfolder} are the same folder: remove the link")
        subfolders.append((subfolder, names))
    for subfolder, names in sorted(subfolders):
        for name in sorted(names):
            yield os.path.join(subfolder, name)


def is_hidden(name):
    """Whether a file or folder is hidden or the operating system's: .DS_Store, ._0.png, __MACOSX."""
    return name.startswith(".") or name in SYSTEM_NAMES


def is_inside_hidden(path, root):
    """Whether ``path`` itself or a folder between it and ``root`` is hidden or the operating system's."""
    return any(is_hidden(part) for part in Path(path).relative_to(root).parts)


class ImageFilter:
    """Accepts the image files under ``root``, and adds all other files to ``left_out``."""

    def __init__(self, root, left_out):
        self.root = root
        self.left_out = left_out
        self.accepted_folders = {}  # {path of a folder: whether its files are accepted}

    def accepts(self, path):
        folder, name = os.path.split(path)
        if folder not in self.accepted_folders:
            self.accepted_folders[folder] = not is_inside_hidden(folder, self.root)
        has_suffix = Path(name).suffix.lower() in suffixes()
        accepted = self.accepted_folders[folder] and has_suffix and not is_hidden(name)
        if not accepted:
            self.left_out.append(path)
        return accepted


def check_classes(folder, splits, listings):
    """Raises InputError if the two ``splits`` of ``folder`` have different classes, or if there is only one class."""
    train, test = listings
    in_one_only = sorted(set(train.classes) ^ set(test.classes))
    if in_one_only:
        raise InputError(f"{folder}: class folder {in_one_only[0]!r} is in only one of {' and '.join(splits)}")
    if len(train.classes) == 1:
        raise InputError(
            f"{folder} has only one class, {train.classes[0]!r}, but at least two are needed: was it unpacked one "
            "folder too deep?"
        )


class Split(NamedTuple):
    """One split of a data set.

    images  uint8 (N, h, w, 3)
    labels  int64 (N,)
    note    part of its description in the log: which files were left out
    """

    images: torch.Tensor
    labels: torch.Tensor
    note: str = ""


class DataSet(NamedTuple):
    """A data set after reading: its splits, the class names, and where the images come from."""

    train: Split
    test: Split
    classes: list
    source: str


def read_folders(folder, splits=("train", "test"), resize=False):
    """Decodes ``folder``/{train,test}/<class>/* to a DataSet of 32×32 images, one image per class in turn.

    Images of any other size are an error; with ``resize``, their central square is resized.
    """
    layout = f"image folders are {{{','.join(splits)}}}/<class>/<image>"
    listings = [list_images(folder / split, layout) for split in splits]
    check_classes(folder, splits, listings)
    train, test = listings
    return DataSet(
        train=read_split(folder / splits[0], train, resize),
        test=read_split(folder / splits[1], test, resize),
        classes=train.classes,
        source=describe_kinds(train.samples),
    )


def read_split(folder, listing, resize):
    """Decodes the images of a Listing of ``folder``, one per class in turn."""
    samples = in_turn(listing.samples)
    images = torch.from_numpy(decode(samples, resize))
    labels = torch.tensor([label for _, label in samples])
    return Split(images, labels, listing.describe_left_out(folder))


def describe_kinds(samples):
    """The formats of image files, by their suffixes: "JPEG, PNG"."""
    names = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}
    kinds = sorted({Path(path).suffix.lstrip(".").lower() for path, _ in samples})
    return ", ".join(names.get(kind, kind) for kind in kinds)


def in_turn(samples):
    """[(path, label), …] ordered by the image's position within its class, then by class."""
    counts = Counter()  # number of images of each class so far
    numbered = []
    for path, label in samples:
        numbered.append((counts[label], label, path))
        counts[label] += 1
    return [(path, label) for _, label, path in sorted(numbered)]


def decode(samples, resize):
    """The images of [(path, label), …]: uint8 (N, 32, 32, 3)."""
    square = (SIDE, SIDE)
    images = np.empty((len(samples), *square, 3), np.uint8)
    for row, (path, _) in enumerate(samples):
        image = read_image(path)
        if resize and image.size != square:
            image = ImageOps.fit(image, square, Image.Resampling.BILINEAR)
        if image.size != square:
            width, height = image.size
            raise InputError(
                f"{path} is {width}x{height}: this data set's images are {SIDE}x{SIDE}; --dataset folder resizes others"
            )
        images[row] = np.asarray(image)
    return images
