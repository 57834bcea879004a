"""What tests of the ImageNet scripts share: small networks in double precision, and small image folders.

Run as a program, it is one of the scripts with such networks: [torchrun …] tests/small_imagenet.py SCRIPT [flags …]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from PIL import Image
from running import ROOT, load_script
from torch import nn

from decoupled.training.flags import start

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


def small(script, adapt=lambda net: net):
    """{name: replacement} for ``script``, a module: its networks are a 32nd as wide and in double precision, changed by
    ``adapt``.
    """

    def greedy(name):
        real = getattr(script, name)
        return lambda *args, **settings: adapt(real(*args, **settings, width=2).double())

    def build(args, classes):
        layers = [
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1 if "vgg" in args.arch else 0),
        ]
        return adapt(nn.Sequential(*layers, nn.LazyLinear(classes), nn.BatchNorm1d(classes)).double())

    if hasattr(script, "greedy_vgg"):
        return {name: greedy(name) for name in ("greedy_vgg", "greedy_resnet")}

    def lazy(args, classes):
        net = build(args, classes)
        net.eval()(torch.zeros(2, 3, args.image_size, args.image_size, dtype=torch.float64))
        return script.EndToEnd([net])

    return {"build": lazy}


def in_double(folders):
    """Makes ``folders``, the module imagenet_folders, give images in double precision."""
    real = folders.ImageBatches.normalize
    folders.ImageBatches.normalize = lambda self, images: real(self, images).double()


def make_small(script):
    """Gives ``script``, a module, small networks and images in double precision."""
    for name, value in small(script).items():
        setattr(script, name, value)
    import imagenet_folders

    in_double(imagenet_folders)


if __name__ == "__main__":
    script, *words = sys.argv[1:]
    sys.argv = [str(ROOT / script), *words]
    module = load_script(script)
    make_small(module)
    start(module.main)
