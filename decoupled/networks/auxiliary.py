"""The auxiliary networks of the paper (Sec. 5.2, Table 1): small classifiers that give each module a loss of its own.

All take a representation (B, C, h, w) and return logits (B, classes). ``size`` is its (h, w).
"""

import torch
from torch import nn
from torch.nn import functional as F

from decoupled.errors import InputError


class EvenWindows(torch.autograd.Function):
    """Average pooling (B, C, h, w) → (B, C, *size) where ``size`` divides (h, w), with the gradient repeated over each
    window: exact where a window has 2^n elements, to rounding elsewhere.
    """

    @staticmethod
    def forward(ctx, representation, size):
        ctx.window = tuple(side // part for side, part in zip(representation.shape[-2:], size, strict=True))
        last = representation.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return F.adaptive_avg_pool2d(representation, size)

    @staticmethod
    def backward(ctx, gradient):
        h, w = ctx.window
        gradient = gradient.contiguous(memory_format=ctx.layout) / (h * w)
        return F.interpolate(gradient, scale_factor=(float(h), float(w)), mode="nearest-exact"), None


class AveragePool(nn.AdaptiveAvgPool2d):
    """Average pooling (B, C, h, w) → (B, C, *size), or (B, C, size, size) for a number.

    PyTorch's, but for its backward pass, which adds a gradient up that windows of one size need only repeat: this one
    takes less time on CPUs (benchmarks/README.md), for the same bits in windows of 2^n elements, and gives the same
    ones each time on CUDA, where PyTorch's does not.
    """

    def forward(self, representation):
        size = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        even = not any(side % part for side, part in zip(representation.shape[-2:], size, strict=True))
        if even and size != (1, 1) and representation.requires_grad:  # of a single window PyTorch's is a mean
            return EvenWindows.apply(representation, size)
        return super().forward(representation)


def mlp(features, classes, hidden_layers):
    """hidden_layers × [Linear, BN, ReLU] of constant width, then a Linear layer: (B, features) → (B, classes)."""
    hidden = [
        m
        for _ in range(hidden_layers)
        for m in (nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*hidden, nn.Linear(features, classes))


def pool_to_quarter(size):
    """The spatially reduced size of MLP and MLP-SR: a quarter of each side, rounded up."""
    return AveragePool(tuple(-(-side // 4) for side in size))


def mlp_auxiliary(channels, size, classes, hidden_layers=3):
    """MLP-aux: average pool to a quarter of the size, then to 2×2, then an MLP of width 4C."""
    return nn.Sequential(pool_to_quarter(size), AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers))


def mlp_sr_auxiliary(channels, size, classes, convs=3, hidden_layers=3):
    """MLP-SR-aux ("spatial reduction"): average pool to a quarter of the size, 1×1 convolutions there, average pool to
    2×2, MLP of width 4C.
    """
    layers = [
        m
        for _ in range(convs)
        for m in (nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(
        pool_to_quarter(size), *layers, AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers)
    )


def cnn_auxiliary(channels, size, classes, convs=2):
    """CNN-aux: 3×3 convolutions at the representation's full size, average pool to 2×2, BN, one Linear layer. ``size``
    is not needed.
    """
    layers = [
        m
        for _ in range(convs)
        for m in (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
    ]
    return nn.Sequential(
        *layers, AveragePool(2), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(4 * channels, classes)
    )


def head(channels, classes, hidden_layers=2):
    """The last module's head in the layer-wise CNNs, whatever the auxiliaries below: average pool to 2×2 and an MLP of
    width 4C.
    """
    return nn.Sequential(AveragePool(2), nn.Flatten(), mlp(4 * channels, classes, hidden_layers))


AUXILIARIES = {"mlp": mlp_auxiliary, "mlp-sr": mlp_sr_auxiliary, "cnn": cnn_auxiliary}


def auxiliary(name, channels, size, classes, **options):
    """The auxiliary network called ``name`` (mlp, mlp-sr or cnn) for a representation of ``channels`` and ``size`` =
    (h, w).

    Raises InputError for another name.
    """
    if name not in AUXILIARIES:
        raise InputError(f"unknown auxiliary network {name!r}: choose from {', '.join(AUXILIARIES)}")
    return AUXILIARIES[name](channels, size, classes, **options)


def token_auxiliary(name, channels, tokens, classes, convs=3, hidden_layers=3):
    """MLP-aux ("mlp") or MLP-SR-aux ("mlp-sr") for tokens (B, C, N), N = ``tokens``: as above, but the average is over
    all tokens, and so the MLP has width C. With N = 1 they are an MLP on a vector.
    """
    reduced, layers = 1, []
    if name == "mlp-sr":
        reduced = -(-tokens // 4)
        layers = [
            m
            for _ in range(convs)
            for m in (nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True))
        ]
    pool = [nn.AdaptiveAvgPool1d(reduced), *layers, nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*pool, nn.Flatten(), mlp(channels, classes, hidden_layers))


class ToChannelsFirst(nn.Module):
    """(B, …, C) → (B, C, …), a view."""

    def forward(self, representation):
        return representation.movedim(-1, 1)


def auxiliary_for(name, shape, layout, classes, **options):
    """The auxiliary network called ``name`` for representations (B, *shape): maps (C, h, w) or, where ``layout`` is
    channels_last, (h, w, C); tokens (C, N) or (N, C); vectors (C,).

    Raises InputError for another name, another number of dimensions, and for cnn on anything but maps.
    """
    moved = layout == "channels_last" and len(shape) > 1
    channels, *size = (shape[-1], *shape[:-1]) if moved else shape
    if len(shape) == 3 or name not in AUXILIARIES:
        net = auxiliary(name, channels, tuple(size), classes, **options)
    elif len(shape) < 3 and name != "cnn":
        net = token_auxiliary(name, channels, *(size or [1]), classes, **options)
        net = net if size else nn.Sequential(nn.Unflatten(1, (channels, 1)), net)
    else:
        raise InputError(
            f"no auxiliary {name} for representations {shape}: choose mlp or mlp-sr for tokens and vectors, a callable "
            "(shape, classes) → module for others"
        )
    return nn.Sequential(ToChannelsFirst(), net) if moved else net
