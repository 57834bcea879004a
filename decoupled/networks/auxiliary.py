"""The auxiliary networks of the paper (Sec. 5.2, Table 1): small classifiers that give each module its own loss.

Each maps a representation (B, C, h, w) to logits (B, classes) and is built from the representation's ``shape`` (C, h,
w) and the number of ``classes``. Any callable with these two arguments can serve as an auxiliary network.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.errors import InputError


class EvenAveragePool(torch.autograd.Function):
    """Average pooling (B, C, h, w) → (B, C, *size) where ``size`` divides (h, w).

    The backward pass repeats the gradient over each window: bit-identical to PyTorch's where a window has 2^n elements,
    equal up to rounding elsewhere.
    """

    @staticmethod
    def forward(ctx, representation, size):
        ctx.window = tuple(side // parts for side, parts in zip(representation.shape[-2:], size, strict=True))
        channels_last = representation.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return F.adaptive_avg_pool2d(representation, size)

    @staticmethod
    def backward(ctx, gradient):
        h, w = ctx.window
        gradient = gradient.contiguous(memory_format=ctx.memory_format) / (h * w)
        return F.interpolate(gradient, scale_factor=(float(h), float(w)), mode="nearest-exact"), None


class AveragePool(nn.AdaptiveAvgPool2d):
    """Average pooling (B, C, h, w) → (B, C, *size), or (B, C, size, size) for an integer.

    The forward pass is PyTorch's. Where all windows have the same size, the backward pass repeats the gradient instead
    of summing: faster on CPUs (benchmarks/README.md), and deterministic on CUDA, where PyTorch's is not.
    """

    def forward(self, representation):
        size = self.output_size
        if isinstance(size, int):
            size = (size, size)
        even = all(side % parts == 0 for side, parts in zip(representation.shape[-2:], size, strict=True))
        # PyTorch computes a single window as a mean, whose backward pass already repeats the gradient
        if even and size != (1, 1) and representation.requires_grad:
            return EvenAveragePool.apply(representation, size)
        return super().forward(representation)


def mlp(features, classes, hidden_layers):
    """hidden_layers × [Linear, BN, ReLU] of constant width, then a Linear layer: (B, features) → (B, classes)."""
    hidden = []
    for _ in range(hidden_layers):
        hidden += [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(features, classes))


def pool_to_quarter(size):
    """Average pooling to a quarter of each side, rounded up: the first layer of MLP-aux and MLP-SR-aux."""
    return AveragePool(tuple(math.ceil(side / 4) for side in size))


def mlp_auxiliary(shape, classes, hidden_layers=3):
    """MLP-aux: average pool to a quarter of the size, then to 2×2, then an MLP of width 4C."""
    channels, *size = shape
    return nn.Sequential(pool_to_quarter(size), AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers))


def mlp_sr_auxiliary(shape, classes, convs=3, hidden_layers=3):
    """MLP-SR-aux ("spatial reduction"): average pool to a quarter of the size, 1×1 convolutions at that size, average
    pool to 2×2, MLP of width 4C.
    """
    channels, *size = shape
    layers = []
    for _ in range(convs):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(
        pool_to_quarter(size), *layers, AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers)
    )


def cnn_auxiliary(shape, classes, convs=2):
    """CNN-aux: 3×3 convolutions at the representation's full size, average pool to 2×2, BN, one Linear layer."""
    channels = shape[0]
    layers = []
    for _ in range(convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(
        *layers, AveragePool(2), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(4 * channels, classes)
    )


def head(channels, classes, hidden_layers=2):
    """The last module's head in the layer-wise CNNs, whatever the auxiliaries: average pool to 2×2, MLP of width 4C."""
    return nn.Sequential(AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers))


AUXILIARIES = {"mlp": mlp_auxiliary, "mlp-sr": mlp_sr_auxiliary, "cnn": cnn_auxiliary}


def make_auxiliary(name, shape, classes, **options):
    """The auxiliary network ``name`` (mlp, mlp-sr or cnn) for representations (B, C, h, w) with ``shape`` (C, h, w). If
    ``name`` is a callable, calls it with the same arguments.

    Raises InputError for any other name.
    """
    if callable(name):
        return name(shape, classes, **options)
    check_name(name)
    return AUXILIARIES[name](shape, classes, **options)


def check_name(name):
    """Raises InputError for a name that is not in AUXILIARIES."""
    if name not in AUXILIARIES:
        raise InputError(f"unknown auxiliary network {name!r}: choose from {', '.join(AUXILIARIES)}")


def pooled_mlp_auxiliary(shape, classes, hidden_layers=3):
    """MLP-aux for tokens (B, C, N), ``shape`` (C, N): the average over all tokens, then an MLP of width C."""
    channels = shape[0]
    return nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), mlp(channels, classes, hidden_layers))


def pooled_mlp_sr_auxiliary(shape, classes, convs=3, hidden_layers=3):
    """MLP-SR-aux for tokens (B, C, N), ``shape`` (C, N): average pool to a quarter of the tokens, 1×1 convolutions,
    the average over all tokens, then an MLP of width C.
    """
    channels, tokens = shape
    layers = []
    for _ in range(convs):
        layers += [nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(
        nn.AdaptiveAvgPool1d(math.ceil(tokens / 4)),
        *layers,
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        mlp(channels, classes, hidden_layers),
    )


POOLED_TOKEN_AUXILIARIES = {"mlp": pooled_mlp_auxiliary, "mlp-sr": pooled_mlp_sr_auxiliary}


class ToChannelsFirst(nn.Module):
    """(B, …, C) → (B, C, …), a view."""

    def forward(self, representation):
        return representation.movedim(-1, 1)


def auxiliary_for(name, shape, layout, classes, **options):
    """The auxiliary network ``name`` for representations (B, *shape): maps (C, h, w), tokens (C, N), or vectors (C,).
    With the ``layout`` channels_last, maps are (h, w, C) and tokens (N, C).

    Raises InputError for any other name or number of dimensions, and for cnn on anything but maps.
    """
    check_name(name)
    channels_last = layout == "channels_last" and len(shape) > 1
    if channels_last:
        *size, channels = shape
    else:
        channels, *size = shape
    if len(shape) == 3:
        net = make_auxiliary(name, (channels, *size), classes, **options)
    elif len(shape) > 3 or name == "cnn":
        raise InputError(
            f"no auxiliary {name} for representations {shape}: choose mlp or mlp-sr for tokens and vectors, or pass a "
            "callable (shape, classes) → module"
        )
    elif len(shape) == 2:
        net = POOLED_TOKEN_AUXILIARIES[name]((channels, *size), classes, **options)
    else:
        to_tokens = nn.Unflatten(1, (channels, 1))  # (B, C) → (B, C, 1)
        net = nn.Sequential(to_tokens, POOLED_TOKEN_AUXILIARIES[name]((channels, 1), classes, **options))
    if channels_last:
        net = nn.Sequential(ToChannelsFirst(), net)
    return net
