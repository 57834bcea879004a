"""Small image folders for the tests of the ImageNet scripts."""

import numpy as np
from PIL import Image

DGL = "imagenet/imagenet_dgl.py"
BACKPROP = "imagenet/imagenet.py"

# Of write_folders
CLASSES = 7
TRAIN = 21
VAL = 17


def write_folders(root):
    """Writes image folders of 7 classes: 3 training images each, 2 for val, 5 of the last. One image is grey, one CMYK,
    one a PNG under a JPEG's name.
    """
    draw = np.random.default_rng(0)
    for split, each in (("train", 3), ("val", 2)):
        for label in range(CLASSES):
            path = root / split / f"class{label}"
            path.mkdir(parents=True)
            count = 5 if split == "val" and label == CLASSES - 1 else each
            for number in range(count):
                pixels = draw.integers(0, 256, (5, 6 + number, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((40 + 3 * label, 44 - label))
                mode = {(0, 0): "L", (1, 0): "CMYK"}.get((label, number), "RGB")
                kind = "PNG" if (label, number) == (2, 0) else "JPEG"
                image.convert(mode).save(path / f"{number}.JPEG", kind)
