"""The layer-wise CNN of the asynchronous experiments (Sec. 5.6): every layer a module, every module with an MLP head of
its own.
"""

import argparse

from torch import nn

from decoupled import InputError
from decoupled.networks.auxiliary import AveragePool
from decoupled.networks.layerwise import draw_batch_norm_weights
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, output_shape

DOWNSAMPLING = ("maxpool", "avgpool", "stride", "psi")


def layer_list(text):
    """An argparse type: "[1,3]" or "1,3" → (1, 3)."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of modules such as [1,3]") from None


def layer(in_channels, out_channels, downsampling=None, batch_norm=True):
    """[down-sampling by 2,] 3×3 convolution without bias, BN, ReLU: (B, in_channels, h, w) → (B, out_channels, h or
    h/2, …). Without batch norm the convolution has a bias.

    ``downsampling`` is maxpool, avgpool, stride (of the convolution) or psi (the invertible space-to-depth, which
    quadruples the channels first).
    """
    before = {"maxpool": [nn.MaxPool2d(2)], "avgpool": [nn.AvgPool2d(2)], "psi": [nn.PixelUnshuffle(2)]}.get(
        downsampling, []
    )
    in_channels *= 4 if downsampling == "psi" else 1
    stride = 2 if downsampling == "stride" else 1
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=not batch_norm)
    return nn.Sequential(*before, convolution, *normalized(nn.BatchNorm2d, out_channels, batch_norm))


def layer_head(channels, pooled, classes, *, hidden_layers=3, convs=0, conv_channels=256, batch_norm=True):
    """A module's head: average pool to ``pooled`` (h', w'), ``hidden_layers`` × [Linear, BN, ReLU] of constant
    width h'·w'·C, Linear: (B, C, h, w) → (B, classes). Without hidden layers, BN follows the pooling.

    With ``convs``, that many [3×3 convolution without bias, BN, ReLU] of ``conv_channels`` come first, at full size; C
    is then theirs.
    """
    layers = []
    for _ in range(convs):
        layers.append(nn.Conv2d(channels, conv_channels, 3, padding=1, bias=False))
        layers += normalized(nn.BatchNorm2d, conv_channels, batch_norm)
        channels = conv_channels
    layers.append(AveragePool(pooled))
    if hidden_layers == 0 and batch_norm:
        layers.append(nn.BatchNorm2d(channels))
    layers.append(nn.Flatten())
    width = pooled[0] * pooled[1] * channels
    for _ in range(hidden_layers):
        layers += [nn.Linear(width, width), *normalized(nn.BatchNorm1d, width, batch_norm)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def normalized(kind, channels, batch_norm):
    """[BN of the ``kind``, if ``batch_norm``,] ReLU: a list of layers."""
    relu = nn.ReLU(inplace=True)
    return [kind(channels), relu] if batch_norm else [relu]


def asynchronous_cnn(
    channels=128,
    depth=6,
    down=(1, 3),
    downsampling="maxpool",
    classes=10,
    input_shape=(3, 32, 32),
    *,
    pool=16,
    conv_channels=256,
    batch_norm=True,
    **head_options,
):
    """``depth`` modules, a layer each; the one *after* each listed in ``down`` (from 0) halves the size and doubles the
    channels.

    One module later than in the other experiments: so it is in the released code. ``pool`` is the window of the first
    head's average pooling; with each halving the window is halved, too, and the heads' ``conv_channels`` are doubled.
    Without ``batch_norm`` there is none, neither in bodies nor in heads. Raises InputError for a module that is not
    there or has none after it, for more halvings than the size allows, and for a window that does not fit.
    """
    if len(set(down)) < len(down) or not set(down) <= set(range(depth - 1)):
        raise InputError(
            f"--down {list(down)} must list different modules from 0 to {depth - 2}: it takes effect in the one after"
        )
    _, height, width = input_shape
    least = 2 ** len(down)  # what the halvings divide sizes and windows by
    if height % least or width % least:
        raise InputError(
            f"--down {list(down)} halves the size too often: {height}x{width} cannot be halved {len(down)} times"
        )
    fitting = [window for window in range(least, height + 1, least) if height % window == width % window == 0]
    if pool not in fitting:
        raise InputError(
            f"--avg_size {pool} does not fit: it must divide {height}x{width} and be halved {len(down)} times (--down "
            f"{list(down)}): choose from {', '.join(map(str, fitting))}"
        )
    pooled = height // pool, width // pool  # the same for every head: window and size are halved together
    modules, shape = [], input_shape
    for index in range(depth):
        halved = index - 1 in down
        if halved:
            channels, conv_channels = 2 * channels, 2 * conv_channels
        body = layer(shape[0], channels, downsampling if halved else None, batch_norm)
        shape = output_shape(body, shape)
        head = layer_head(channels, pooled, classes, conv_channels=conv_channels, batch_norm=batch_norm, **head_options)
        modules.append(DecoupledModule(body, head))
    return draw_batch_norm_weights(DecoupledNetwork(modules))  # as in the published runs


def representation_shapes(net, input_shape=(3, 32, 32)):
    """The (C, h, w) of every module's representation."""
    shapes = []
    for module in net:
        input_shape = output_shape(module.body, input_shape)
        shapes.append(input_shape)
    return shapes
