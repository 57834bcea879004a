"""VGG with batch norm (Simonyan and Zisserman 2015) as DGL learns it on ImageNet (paper, Sec. 5.5): ``block_size``
convolutions a module.
"""

from torch import nn

from decoupled import InputError
from decoupled.networks.auxiliary import mlp_sr_auxiliary
from decoupled.networks.layerwise import conv_layer
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, group, output_shape

# Convolutions at each size
STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
SMALLEST = 32  # side of an image that five halvings leave a pixel of


def layers(arch, width=64):
    """A list for each convolution: [2×2 max pool where the size halves], convolution with bias, BN, ReLU. ``width``
    channels, then 2, 4, 8, 8×.
    """
    convolutions, below = [], 3
    for stage, depth in enumerate(STAGES[arch]):
        for place in range(depth):
            channels = width * min(2**stage, 8)
            convolutions.append(conv_layer(below, channels, downsample=stage > 0 and place == 0))
            below = channels
    return convolutions


def classifier(shape, classes, hidden):
    """The last module's head: 2×2 max pool, Linear, ReLU, Linear, ReLU, Linear; no dropout. At 224×224 it flattens to
    512 × 7 × 7 = 25,088.
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
    """VGG's published start, auxiliaries included: convolutions Kaiming normal by fan-out, Linear N(0, .01), biases 0,
    BN 1 and 0. Returns ``net``.
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


def with_auxiliaries(bodies, last_head, classes, image_size, convs, hidden_layers):
    """A DecoupledNetwork of the ``bodies``, not initialized yet: each has an MLP-SR auxiliary sized by its real output,
    the last ``last_head(shape)``.
    """
    modules, shape = [], (3, image_size, image_size)
    for body in bodies:
        shape = output_shape(body, shape)
        last = body is bodies[-1]
        head = last_head(shape) if last else mlp_sr_auxiliary(shape[0], shape[1:], classes, convs, hidden_layers)
        modules.append(DecoupledModule(body, head))
    return DecoupledNetwork(modules)


def greedy_vgg(arch="vgg13", block_size=1, classes=1000, image_size=224, convs=3, hidden_layers=3, width=64):
    """vgg11, vgg13, vgg16 or vgg19 with ``block_size`` convolutions a module; a remainder is a last, shorter module.
    (B, 3, image_size, image_size).

    Auxiliaries have ``convs`` 1×1 convolutions and ``hidden_layers``. Without a module below the last it is
    back-propagation. ``width`` scales the network for tests. Raises InputError for an impossible block size or images
    too small for five halvings.
    """
    if image_size < SMALLEST:
        raise InputError(
            f"--image-size {image_size} is too small for {arch}, which halves it five times: choose at least {SMALLEST}"
        )
    bodies = [
        nn.Sequential(*(layer for convolution in block for layer in convolution))
        for block in group(layers(arch, width), block_size)
    ]
    net = with_auxiliaries(
        bodies, lambda shape: classifier(shape, classes, 64 * width), classes, image_size, convs, hidden_layers
    )
    return initialize(net)
