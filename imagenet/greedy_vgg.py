"""VGG with batch norm (Simonyan and Zisserman 2015) for DGL on ImageNet (paper, Sec. 5.5): ``block_size`` convolutions
per module.
"""

import itertools

from torch import nn

from decoupled import InputError
from decoupled.networks.auxiliary import mlp_sr_auxiliary
from decoupled.networks.layerwise import conv_layer
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, group_layers, output_shape

# Convolutions at each size
STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
SMALLEST = 32  # image size that five halvings reduce to one pixel


def layers(arch, width=64):
    """One list of layers per convolution: 2×2 max pool where the size halves, convolution with bias, BN, ReLU.

    The stages have 1, 2, 4, 8, and 8 × ``width`` channels.
    """
    convolutions = []
    in_channels = 3
    for stage, depth in enumerate(STAGES[arch]):
        channels = width * min(2**stage, 8)
        for index in range(depth):
            downsample = stage > 0 and index == 0
            convolutions.append(conv_layer(in_channels, channels, downsample))
            in_channels = channels
    return convolutions


def classifier(shape, classes, hidden):
    """The last module's head: 2×2 max pool, Linear, ReLU, Linear, ReLU, Linear; no dropout. It flattens 224×224 images
    to 512 × 7 × 7 = 25,088 features.
    """
    channels, height, width = shape
    features = channels * (height // 2) * (width // 2)
    linear = [
        nn.Linear(features, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, classes),
    ]
    return nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), *linear)


def initialize(net):
    """Initializes ``net``, including auxiliaries, as published, and returns it: convolutions Kaiming normal by fan-out,
    Linear N(0, .01), BN weights 1, all biases 0.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.ones_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    return net


def check_image_size(image_size, arch):
    """Raises InputError for images too small for five halvings."""
    if image_size < SMALLEST:
        raise InputError(
            f"--image-size {image_size} is too small for {arch}, which halves it five times: choose at least {SMALLEST}"
        )


def with_auxiliaries(bodies, make_last_head, classes, image_size, convs, hidden_layers):
    """A DecoupledNetwork of ``bodies``, not yet initialized: the last has the head ``make_last_head(shape)`` for its
    output's shape (C, h, w), the others have MLP-SR auxiliaries.
    """
    modules = []
    shape = (3, image_size, image_size)
    for body in bodies:
        shape = output_shape(body, shape)
        head = make_last_head(shape) if body is bodies[-1] else mlp_sr_auxiliary(shape, classes, convs, hidden_layers)
        modules.append(DecoupledModule(body, head))
    return DecoupledNetwork(modules)


def greedy_vgg(arch="vgg13", block_size=1, classes=1000, image_size=224, convs=3, hidden_layers=3, width=64):
    """vgg11, vgg13, vgg16 or vgg19 with ``block_size`` convolutions per module, for images (B, 3, image_size,
    image_size). The last module has the remainder.

    Auxiliaries have ``convs`` 1×1 convolutions and ``hidden_layers``. With one module, training is back-propagation.
    ``width`` is the number of channels of the first layer; all others are proportional to it. Raises InputError for an
    impossible block size and for images too small for five halvings.
    """
    check_image_size(image_size, arch)
    blocks = group_layers(layers(arch, width), block_size)
    bodies = [nn.Sequential(*itertools.chain(*block)) for block in blocks]

    def make_last_head(shape):
        return classifier(shape, classes, hidden=64 * width)

    return initialize(with_auxiliaries(bodies, make_last_head, classes, image_size, convs, hidden_layers))
