"""ResNets of depth 6n+2 for 32×32 images (He et al. 2016, Sec. 4.2), split into modules for DGL, DDG and
back-propagation.

With the same seed, all methods and numbers of modules start from the same weights: auxiliary networks are drawn last.
"""

from contextlib import contextmanager

from torch import nn
from torch.nn import functional as F

from decoupled import InputError
from decoupled.networks.auxiliary import mlp_sr_auxiliary
from decoupled.networks.layerwise import draw_batch_norm_weights
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, output_shape, split_evenly

STAGES = 3  # ResNet's, of constant size: 32×32, 16×16, 8×8


def conv3(in_channels, channels, stride=1):
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Basic block: conv, BN, ReLU, conv, BN, plus the shortcut, ReLU.

    (B, in_channels, h, w) → (B, channels, h/stride, w/stride). Where the number of channels grows, the stride is 2, and
    the shortcut takes every second pixel and appends channels of zeros ("option A", no parameters).
    """

    def __init__(self, in_channels, channels):
        super().__init__()
        self.new_channels = channels - in_channels
        self.conv1 = conv3(in_channels, channels, stride=2 if self.new_channels else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        shortcut = x
        if self.new_channels:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(residual + shortcut, inplace=True)


def pieces(depth, width=16):
    """The network without its classifier as a list of layers that can be split: conv, BN, ReLU, 3n blocks of ``width``,
    2 × and 4 × ``width`` channels, average pool.

    (B, 3, 32, 32) → (B, 4 × width, 1, 1). ResNet-110 has 58 pieces. Raises InputError for a depth that is not 6n+2.
    """
    blocks, remainder = divmod(depth - 2, 2 * STAGES)
    if blocks < 1 or remainder:
        raise InputError(f"--depth {depth} is not a CIFAR ResNet's: choose 6n+2, such as 8, 20, 32, 44, 56 or 110")
    layers = [
        conv3(3, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),  # not in place: if a module starts with it, its input belongs to the module below
    ]
    in_channels = width
    for stage in range(STAGES):
        channels = width * 2**stage
        for _ in range(blocks):
            layers.append(Block(in_channels, channels))
            in_channels = channels
    return [*layers, nn.AvgPool2d(8)]


def bodies_and_classifier(depth, splits, classes, width=16):
    """(list of ``splits`` nn.Sequential of pieces grouped as by split_evenly, classifier).

    Initialized as published: convolutions N(0, √(2/(9·out))), everything else as PyTorch does. Raises InputError for a
    depth that is not 6n+2 and for more splits than pieces.
    """
    bodies = [nn.Sequential(*group) for group in split_evenly(pieces(depth, width), splits)]
    for body in bodies:
        for layer in body.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return bodies, nn.Sequential(nn.Flatten(), nn.Linear(4 * width, classes))


def decoupled_resnet(depth, splits, classes, width=16):
    """The network for DGL: ``splits`` modules, the last with the network's own classifier, the others with MLP-SR
    auxiliaries.

    Raises InputError for a depth that is not 6n+2 and for more splits than pieces.
    """
    bodies, classifier = bodies_and_classifier(depth, splits, classes, width)
    auxiliaries = []
    shape = (3, 32, 32)
    for body in bodies[:-1]:
        shape = output_shape(body, shape)
        auxiliary = mlp_sr_auxiliary(shape, classes)
        auxiliaries.append(draw_batch_norm_weights(auxiliary))  # as in the published runs
    return DecoupledNetwork(map(DecoupledModule, bodies, [*auxiliaries, classifier]))


def chained_resnet(depth, splits, classes, width=16):
    """The network for DDG and back-propagation: nn.Sequential of ``splits`` modules, the last with the classifier.

    Raises InputError for a depth that is not 6n+2 and for more splits than pieces.
    """
    bodies, classifier = bodies_and_classifier(depth, splits, classes, width)
    bodies[-1].append(classifier)
    return nn.Sequential(*bodies)


@contextmanager
def frozen_statistics(module):
    """Inside the block, batch norm normalizes with batch statistics, as in training, but does not update its running
    statistics. For the second forward pass of a mini-batch.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None  # then batch norm does not update them
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = num_batches
