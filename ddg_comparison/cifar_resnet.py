"""ResNets of depth 6n+2 for 32×32 images (He et al. 2016, Sec. 4.2), split into parts for DGL, DDG and
back-propagation.

All methods and numbers of parts start from the same backbone and classifier at the same seed: auxiliary networks are
drawn after them.
"""

from contextlib import contextmanager

from torch import nn
from torch.nn import functional as F

from decoupled import InputError
from decoupled.networks.auxiliary import mlp_sr_auxiliary
from decoupled.networks.layerwise import draw_batch_norm_weights
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, output_shape, split

STAGES = 3  # of constant size: 32×32, 16×16, 8×8


def conv3(in_channels, channels, stride=1):
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Basic block: conv, BN, ReLU, conv, BN, plus the shortcut, ReLU: (B, in_channels, h, w) → (B, channels, h/stride,
    w/stride).

    Where the channels grow, stride is 2, and the shortcut is every second pixel followed by channels of zeros: no
    parameters ("option A").
    """

    def __init__(self, in_channels, channels):
        super().__init__()
        self.grown = channels - in_channels
        self.conv1 = conv3(in_channels, channels, stride=2 if self.grown else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, below):
        residual = F.relu(self.bn1(self.conv1(below)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        shortcut = F.pad(below[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.grown)) if self.grown else below
        return F.relu(residual + shortcut, inplace=True)


def pieces(depth, width=16):
    """The network without its classifier as a list: conv, BN, ReLU, 3n blocks of ``width``, 2 and 4 × ``width``
    channels, average pool.

    (B, 3, 32, 32) → (B, 4 × width, 1, 1). ResNet-110 has 58 pieces. Raises InputError for a depth that is not 6n+2.
    """
    blocks, rest = divmod(depth - 2, 2 * STAGES)
    if blocks < 1 or rest:
        raise InputError(f"--depth {depth} is no CIFAR ResNet's: choose 6n+2, such as 8, 20, 32, 44, 56 or 110")
    # Not in place: where a part starts with it, its input belongs to the part below
    layers = [
        conv3(3, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    below = width
    for stage in range(STAGES):
        for _ in range(blocks):
            layers.append(Block(below, width * 2**stage))
            below = width * 2**stage
    return [*layers, nn.AvgPool2d(8)]


def parts(depth, splits, classes, width=16):
    """([nn.Sequential of ⌈pieces/splits⌉ pieces, …], classifier), initialized as published: convolutions N(0,
    √(2/(9·out))), the rest PyTorch's.

    Raises InputError for a depth that is not 6n+2 and for more splits than pieces.
    """
    bodies = [nn.Sequential(*part) for part in split(pieces(depth, width), splits)]
    for body in bodies:
        for layer in body.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return bodies, nn.Sequential(nn.Flatten(), nn.Linear(4 * width, classes))


def decoupled_resnet(depth, splits, classes, width=16):
    """The network for DGL: ``splits`` modules, each but the last with an MLP-SR auxiliary, the last with the network's
    own classifier.

    Raises InputError as ``parts`` does.
    """
    bodies, classifier = parts(depth, splits, classes, width)
    heads, shape = [], (3, 32, 32)
    for body in bodies[:-1]:
        shape = output_shape(body, shape)
        # As in the published runs
        heads.append(draw_batch_norm_weights(mlp_sr_auxiliary(shape[0], shape[1:], classes)))
    return DecoupledNetwork(map(DecoupledModule, bodies, [*heads, classifier]))


class ChainedNetwork(nn.ModuleList):
    """Modules from the image up, the last of which gives the logits."""

    def forward(self, images, heads=None):
        """[logits (B, classes)]: a list, as decoupled.networks.evaluation.evaluate asks for. There is one head, so ``heads`` says
        nothing.
        """
        for module in self:
            images = module(images)
        return [images]


def chained_resnet(depth, splits, classes, width=16):
    """The network for DDG and back-propagation: ``splits`` modules, the last with the classifier. Raises InputError as
    ``parts`` does.
    """
    bodies, classifier = parts(depth, splits, classes, width)
    bodies[-1].append(classifier)
    return ChainedNetwork(bodies)


@contextmanager
def frozen_statistics(module):
    """Inside the block batch norm normalizes by the batch, as in training, but does not count it: for the second
    forward pass of a batch.
    """
    norms = [
        (norm, norm.momentum, norm.num_batches_tracked) for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)
    ]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
