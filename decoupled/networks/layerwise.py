"""The layer-wise CNN of the paper's Sec. 5.2 and 5.3."""

from torch import nn

from decoupled.networks.auxiliary import auxiliary as make_auxiliary
from decoupled.networks.auxiliary import head
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, group, output_shape


def draw_batch_norm_weights(net):
    """Draws the weights of every batch norm in ``net`` from U(0, 1), and returns ``net``.

    PyTorch did so by default up to release 1.1, with which the authors' logs of the CIFAR experiments were made; since
    1.2 they start at 1 (https://github.com/pytorch/pytorch/issues/12259). It matters in the first epochs: from 1, the
    upper modules of learning_curves learn more slowly.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight)
    return net


def conv_layer(in_channels, out_channels, downsample):
    """[2×2 max pool], 3×3 convolution, BN, ReLU: a list of layers."""
    pool = [nn.MaxPool2d(2)] if downsample else []
    return [
        *pool,
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


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
    """The layer-wise CNN of Sec. 5.2 and 5.3: ``depth`` 3×3 convolutions, ``block_size`` of them a module.

    Layers listed in ``downsample`` (from 0) halve the size by a 2×2 max pool first and double the channels. Every
    module but the last has the auxiliary network called ``auxiliary``; the last has ``head``. Batch norm weights are
    drawn as in the published runs. Raises InputError for an unknown auxiliary or an impossible block size.
    """
    layers, width, below = [], channels, input_shape[0]
    for index in range(depth):
        width = 2 * width if index in downsample else width
        layers.append(conv_layer(below, width, index in downsample))
        below = width
    modules, shape = [], input_shape
    blocks = group(layers, block_size)
    for index, block in enumerate(blocks):
        body = nn.Sequential(*(layer for layers in block for layer in layers))
        shape = output_shape(body, shape)
        last = index == len(blocks) - 1
        aux = (
            head(shape[0], classes)
            if last
            else make_auxiliary(auxiliary, shape[0], shape[1:], classes, **auxiliary_options)
        )
        modules.append(DecoupledModule(body, aux))
    return draw_batch_norm_weights(DecoupledNetwork(modules))
