"""The layer-wise CNN of the paper's Sec. 5.2 and 5.3."""

import itertools

from torch import nn

from decoupled.networks.auxiliary import head, make_auxiliary
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, group_layers, output_shape


def draw_batch_norm_weights(net):
    """Draws the weights of every batch norm in ``net`` from U(0, 1) and returns ``net``.

    This was PyTorch's default up to release 1.1, with which the authors made their CIFAR logs; since 1.2, the weights
    start at 1 (https://github.com/pytorch/pytorch/issues/12259). It matters in the first epochs: when they start at 1,
    the upper modules of learning_curves learn more slowly.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight)
    return net


def conv_layer(in_channels, out_channels, downsample):
    """A list of layers: 3×3 convolution, BN, ReLU; with ``downsample``, a 2×2 max pool first."""
    layers = []
    if downsample:
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
    layers.append(nn.BatchNorm2d(out_channels))
    layers.append(nn.ReLU(inplace=True))
    return layers


def layerwise_cnn(
    channels=64,
    depth=4,
    downsample=(1, 3),
    auxiliary="mlp-sr",
    classes=10,
    block_size=1,
    input_shape=(3, 32, 32),
    **auxiliary_options,
):
    """The layer-wise CNN of Sec. 5.2 and 5.3: ``depth`` 3×3 convolutions, ``block_size`` of them per module.

    Layers whose index is in ``downsample`` halve the height and width with a 2×2 max pool and double the channels.
    Every module except the last has the auxiliary network ``auxiliary``: mlp, mlp-sr or cnn, or a callable (shape (C,
    h, w), classes, **auxiliary_options) → module, (B, C, h, w) → (B, classes). The last module has ``head``. Batch norm
    weights are drawn as in the published runs. Raises InputError for an unknown auxiliary or an impossible block size.
    """
    layers = []
    in_channels = input_shape[0]
    out_channels = channels
    for index in range(depth):
        if index in downsample:
            out_channels *= 2
        layers.append(conv_layer(in_channels, out_channels, index in downsample))
        in_channels = out_channels
    modules = []
    shape = input_shape
    blocks = group_layers(layers, block_size)
    for index, block in enumerate(blocks):
        body = nn.Sequential(*itertools.chain(*block))
        shape = output_shape(body, shape)
        if index < len(blocks) - 1:
            aux = make_auxiliary(auxiliary, shape, classes, **auxiliary_options)
        else:
            aux = head(shape[0], classes)
        modules.append(DecoupledModule(body, aux))
    return draw_batch_norm_weights(DecoupledNetwork(modules))
