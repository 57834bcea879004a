"""ResNets with bottlenecks (He et al. 2016) for DGL on ImageNet (paper, Sec. 5.5), split into K modules."""

from greedy_vgg import check_image_size, with_auxiliaries
from torch import nn
from torchvision.models.resnet import Bottleneck, conv1x1

from decoupled.networks.modules import split_evenly

# Bottlenecks at 56×56, 28×28, 14×14, 7×7
BLOCKS = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def pieces(arch, width=64):
    """The network without its classifier as a list of layers that can be split: the stem (7×7 convolution, BN, ReLU,
    max pool), then the bottlenecks.

    (B, 3, s, s) → (B, 32 × width, s/32, s/32). The strides are in the 3×3 convolutions, as in torchvision ("v1.5").
    ResNet-152 has 51 pieces.
    """
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    layers = [stem]
    in_channels = width
    for stage, depth in enumerate(BLOCKS[arch]):
        planes = width * 2**stage
        channels = planes * Bottleneck.expansion
        for block in range(depth):
            stride = 1
            shortcut = None
            if block == 0:
                stride = 1 if stage == 0 else 2
                shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
            layers.append(Bottleneck(in_channels, planes, stride, shortcut))
            in_channels = channels
    return layers


def initialize(net):
    """Initializes ``net``, including auxiliaries, as published, and returns it: convolutions (without biases) Kaiming
    normal by fan-out, the weights of the auxiliaries' BN1d from U(0, 1), everything else as in PyTorch.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm1d):  # PyTorch's default up to release 1.1
            nn.init.uniform_(layer.weight)
    return net


def greedy_resnet(arch="resnet152", splits=2, classes=1000, image_size=224, convs=3, hidden_layers=3, width=64):
    """resnet50, resnet101 or resnet152 in ``splits`` modules of pieces grouped by split_evenly, for images (B, 3,
    image_size, image_size).

    The first of ResNet-152's two published modules has 26 of the 51 pieces: the stem, stages 1 and 2, and 14 blocks of
    stage 3. Its auxiliary reads 1,024 channels at 14×14. (The released code assumes 7×7, and therefore pools to 2×2
    instead of 4×4.) Other arguments as in greedy_vgg. Raises InputError for more splits than pieces and for images that
    are too small.
    """
    check_image_size(image_size, arch)
    bodies = [nn.Sequential(*group) for group in split_evenly(pieces(arch, width), splits)]

    def make_last_head(shape):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))

    return initialize(with_auxiliaries(bodies, make_last_head, classes, image_size, convs, hidden_layers))
