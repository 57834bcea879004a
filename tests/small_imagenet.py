"""Runs an ImageNet script with small networks in double precision, alone or under torchrun. Not a test:
tests/test_imagenet.py starts it.

[torchrun …] tests/small_imagenet.py SCRIPT [flags …]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from running import ROOT, load_script
from torch import nn

from decoupled.training.flags import start

DGL, BACKPROP = "imagenet/imagenet_dgl.py", "imagenet/imagenet.py"


def small(script, adapt=lambda net: net):
    """The names to replace in ``script``, a module: its networks a 32nd as wide and in double precision, changed by
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
    """Makes the images of ``folders``, the module imagenet_folders, double."""
    real = folders.ImageBatches.normalize
    folders.ImageBatches.normalize = lambda self, images: real(self, images).double()


def make_small(script):
    """Gives ``script``, a module that load_script has loaded, small networks and images in double precision."""
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
