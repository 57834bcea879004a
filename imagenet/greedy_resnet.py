"""ResNets of bottlenecks (He et al. 2016) as DGL learns them on ImageNet (paper, Sec. 5.5): split into K parts."""

from greedy_vgg import SMALLEST, with_auxiliaries
from torch import nn
from torchvision.models.resnet import Bottleneck, conv1x1

from decoupled import InputError
from decoupled.networks.modules import split

# At 56×56, 28×28, 14×14, 7×7
BLOCKS = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def pieces(arch, width=64):
    """The network without its classifier as a list: the stem (7×7 convolution, BN, ReLU, max pool), then the
    bottlenecks.

    (B, 3, s, s) → (B, 32 × width, s/32, s/32). Strides are on the 3×3 convolutions, as in torchvision's ("v1.5").
    ResNet-152 has 51 pieces.
    """
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    network, below = [stem], width
    for stage, depth in enumerate(BLOCKS[arch]):
        planes = width * 2**stage
        for place in range(depth):
            stride = 2 if stage > 0 and place == 0 else 1
            channels = planes * Bottleneck.expansion
            shortcut = nn.Sequential(conv1x1(below, channels, stride), nn.BatchNorm2d(channels)) if place == 0 else None
            network.append(Bottleneck(below, planes, stride, shortcut))
            below = channels
    return network


def initialize(net):
    """The ResNets' published start, auxiliaries included: convolutions (which have no biases) Kaiming normal by
    fan-out, BN 1 and 0, but the weights of the auxiliaries' BN1d from U(0, 1); every Linear keeps PyTorch's default.
    Returns ``net``.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm1d):  # left to PyTorch's default, which was U(0, 1) up to release 1.1
            nn.init.uniform_(layer.weight)
    return net


def greedy_resnet(arch="resnet152", splits=2, classes=1000, image_size=224, convs=3, hidden_layers=3, width=64):
    """resnet50, resnet101 or resnet152 in ``splits`` modules of ⌈pieces/splits⌉ pieces, the last one shorter. (B, 3,
    image_size, image_size).

    The published cut of ResNet-152 in two has 26 of 51 pieces in the first: the stem, stages 1 and 2 and 14 blocks of
    stage 3. The auxiliary reads its 1,024 channels at 14×14 (the released code takes them for 7×7, and so pools to 2×2
    instead of 4×4). Other arguments as in greedy_vgg. Raises InputError for more splits than pieces or images that are
    too small.
    """
    if image_size < SMALLEST:
        raise InputError(
            f"--image-size {image_size} is too small for {arch}, which halves it five times: choose at least {SMALLEST}"
        )
    bodies = [nn.Sequential(*part) for part in split(pieces(arch, width), splits)]

    def classifier(shape):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))

    return initialize(with_auxiliaries(bodies, classifier, classes, image_size, convs, hidden_layers))
