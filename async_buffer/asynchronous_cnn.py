"""The layer-wise CNN of the asynchronous experiments (Sec. 5.6): every layer a module, every module with an MLP head of
its own.
"""

import argparse

from torch import nn

from decoupled import InputError
from decoupled.auxiliary import pool_to_quarter
from decoupled.network import DecoupledModule, DecoupledNetwork, draw_batch_norm_weights, output_shape

DOWNSAMPLING = ("maxpool", "avgpool", "stride", "psi")


def layer_list(text):
    """An argparse type: "[1,3]" or "1,3" → (1, 3)."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as [1,3]") from None


def layer(in_channels, out_channels, downsampling=None):
    """[down-sampling by 2,] 3×3 convolution without bias, BN, ReLU: (B, in_channels, h, w) → (B, out_channels, h or
    h/2, …).

    ``downsampling`` is maxpool, avgpool, stride (of the convolution) or psi (the invertible space-to-depth, which
    quadruples the channels first).
    """
    before = {"maxpool": [nn.MaxPool2d(2)], "avgpool": [nn.AvgPool2d(2)], "psi": [nn.PixelUnshuffle(2)]}.get(
        downsampling, []
    )
    in_channels *= 4 if downsampling == "psi" else 1
    convolution = nn.Conv2d(
        in_channels, out_channels, 3, stride=2 if downsampling == "stride" else 1, padding=1, bias=False
    )
    return nn.Sequential(*before, convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def layer_head(channels, size, classes, *, hidden_layers=3, convs=0, conv_channels=256, batch_norm=True):
    """A layer's classifier: average pool to 2×2, ``hidden_layers`` × [Linear, BN, ReLU] of width 4C, Linear: (B, C, h,
    w) → (B, classes).

    With ``convs``, that many 1×1 convolutions to ``conv_channels`` come first, at a quarter of the ``size`` (h, w), as
    in MLP-SR; C is then theirs.
    """
    layers = [pool_to_quarter(size)] if convs else []
    for _ in range(convs):
        layers += [
            nn.Conv2d(channels, conv_channels, 1, bias=not batch_norm),
            *norm(nn.BatchNorm2d(conv_channels), batch_norm),
        ]
        channels = conv_channels
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    width = 4 * channels
    for _ in range(hidden_layers):
        layers += [nn.Linear(width, width), *norm(nn.BatchNorm1d(width), batch_norm)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def norm(layer, batch_norm):
    return [layer, nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]


def asynchronous_cnn(
    channels=128, depth=6, down=(1, 3), downsampling="maxpool", classes=10, input_shape=(3, 32, 32), **head_options
):
    """``depth`` layers; the one *after* each listed in ``down`` (from 0) halves the size and doubles the channels.

    One layer later than in the other experiments: so it is in the released code. Raises InputError for a layer that is
    not there or has none after it, or when an odd size would have to be halved.
    """
    if len(set(down)) < len(down) or not set(down) <= set(range(depth - 1)):
        raise InputError(
            f"--down {list(down)} must list different layers from 0 to {depth - 2}: it takes effect in the layer after"
        )
    modules, width, shape = [], channels, input_shape
    for index in range(depth):
        halved = index - 1 in down
        if halved and any(side % 2 for side in shape[1:]):
            raise InputError(
                f"--down {list(down)} halves the size too often: layer {index} would have to halve "
                f"{shape[1]}x{shape[2]}"
            )
        width = 2 * width if halved else width
        body = layer(shape[0], width, downsampling if halved else None)
        shape = output_shape(body, shape)
        modules.append(DecoupledModule(body, layer_head(width, shape[1:], classes, **head_options)))
    return draw_batch_norm_weights(DecoupledNetwork(modules))  # as in the published runs


def representation_shapes(net, input_shape=(3, 32, 32)):
    """The (C, h, w) of every module's representation."""
    shapes = []
    for module in net:
        input_shape = output_shape(module.body, input_shape)
        shapes.append(input_shape)
    return shapes
