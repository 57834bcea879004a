"""The network of the asynchronous experiments (Sec. 5.6): every module is one layer with its own MLP head."""

import argparse

from torch import nn

from decoupled import InputError
from decoupled.networks.auxiliary import AveragePool
from decoupled.networks.layerwise import draw_batch_norm_weights
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, output_shape

DOWNSAMPLING = ("maxpool", "avgpool", "stride", "psi")


def module_list(text):
    """An argparse type: "[1,3]" or "1,3" → (1, 3)."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of modules such as [1,3]") from None


def make_body(in_channels, out_channels, downsampling=None, batch_norm=True):
    """A module's body: [down-sampling by 2,] 3×3 convolution without bias, BN, ReLU: (B, in_channels, h, w) → (B,
    out_channels, h or h/2, …). Without batch norm, the convolution has a bias.

    ``downsampling`` is maxpool, avgpool, stride (of the convolution) or psi (the invertible space-to-depth, which first
    quadruples the channels).
    """
    layers = []
    stride = 1
    if downsampling == "maxpool":
        layers.append(nn.MaxPool2d(2))
    elif downsampling == "avgpool":
        layers.append(nn.AvgPool2d(2))
    elif downsampling == "psi":
        layers.append(nn.PixelUnshuffle(2))
        in_channels = 4 * in_channels
    elif downsampling == "stride":
        stride = 2
    layers.append(nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=not batch_norm))
    layers += normalized(nn.BatchNorm2d, out_channels, batch_norm)
    return nn.Sequential(*layers)


def make_head(channels, pooled, classes, *, hidden_layers=3, convs=0, conv_channels=256, batch_norm=True):
    """A module's head: average pool to ``pooled`` (h', w'), ``hidden_layers`` × [Linear, BN, ReLU] of constant width
    h'·w'·C, Linear: (B, C, h, w) → (B, classes). Without hidden layers, BN follows the pooling.

    With ``convs``, that many [3×3 convolution without bias, BN, ReLU] with ``conv_channels`` come first, at full height
    and width; C is then their number of channels.
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
        layers.append(nn.Linear(width, width))
        layers += normalized(nn.BatchNorm1d, width, batch_norm)
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
    """A network of ``depth`` modules. The module *after* each one in ``down`` (from 0) halves height and width and
    doubles the channels: one module later than in the other experiments, as in the released code.

    ``pool`` is the window of the first head's average pooling. Each down-sampling also halves the window and doubles
    the heads' ``conv_channels``. Without ``batch_norm`` there is none in bodies and heads.

    Raises InputError if a module in ``down`` does not exist or is the last, if the size cannot be halved that often, or
    if the window does not fit.
    """
    check_down(down, depth, input_shape)
    check_window(pool, down, input_shape)
    _, height, width = input_shape
    pooled = (height // pool, width // pool)  # the same for every head, as window and size are halved together
    modules = []
    shape = input_shape
    for index in range(depth):
        halved = index - 1 in down
        if halved:
            channels = 2 * channels
            conv_channels = 2 * conv_channels
        body = make_body(shape[0], channels, downsampling if halved else None, batch_norm)
        shape = output_shape(body, shape)
        head = make_head(channels, pooled, classes, conv_channels=conv_channels, batch_norm=batch_norm, **head_options)
        modules.append(DecoupledModule(body, head))
    return draw_batch_norm_weights(DecoupledNetwork(modules))  # as in the published runs


def check_down(down, depth, input_shape):
    """Raises InputError unless the modules ``down`` can be followed by one that halves the size."""
    if len(set(down)) < len(down) or not set(down) <= set(range(depth - 1)):
        raise InputError(
            f"--down {list(down)} must list different modules from 0 to {depth - 2}: it takes effect in the one after"
        )
    _, height, width = input_shape
    divisor = 2 ** len(down)
    if height % divisor or width % divisor:
        raise InputError(
            f"--down {list(down)} halves the size too often: {height}x{width} cannot be halved {len(down)} times"
        )


def check_window(pool, down, input_shape):
    """Raises InputError unless a pooling window ``pool`` divides the size and can be halved as often as the size."""
    _, height, width = input_shape
    smallest = 2 ** len(down)
    fitting = []
    for window in range(smallest, height + 1, smallest):
        if height % window == 0 and width % window == 0:
            fitting.append(window)
    if pool not in fitting:
        raise InputError(
            f"--avg_size {pool} does not fit: it must divide {height}x{width} and be halved {len(down)} times (--down "
            f"{list(down)}): choose from {', '.join(map(str, fitting))}"
        )


def representation_shapes(net, input_shape=(3, 32, 32)):
    """The (C, h, w) of every module's representation."""
    shapes = []
    shape = input_shape
    for module in net:
        shape = output_shape(module.body, shape)
        shapes.append(shape)
    return shapes
