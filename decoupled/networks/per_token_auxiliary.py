"""Auxiliary networks that classify each token of a sequence, for language models, whose logits are (B, N, classes)."""

from torch import nn

from decoupled.errors import InputError


def linear_per_token(channels, classes):
    """LayerNorm and a Linear layer, like the head of most language models: (B, N, C) → (B, N, classes)."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, classes))


def mlp_per_token(channels, classes, hidden_layers=1, width=None):
    """LayerNorm, hidden_layers × [Linear, GELU] of ``width`` (default C), and a Linear layer: (B, N, C) → (B, N,
    classes).
    """
    width = width or channels
    layers = [nn.LayerNorm(channels)]
    features = channels
    for _ in range(hidden_layers):
        layers.append(nn.Linear(features, width))
        layers.append(nn.GELU())
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


PER_TOKEN_AUXILIARIES = {"linear": linear_per_token, "mlp": mlp_per_token}


def per_token_auxiliary(name, shape, classes, **options):
    """The auxiliary network ``name``, linear or mlp, for representations (B, *shape) with shape = (N, C).

    Raises InputError for any other name or shape.
    """
    if len(shape) != 2:
        raise InputError(
            f"no per-token auxiliary for representations {shape}: cut where they are (N, C), or pass a "
            "callable (shape, classes) → module"
        )
    if name not in PER_TOKEN_AUXILIARIES:
        names = ", ".join(PER_TOKEN_AUXILIARIES)
        raise InputError(f"unknown per-token auxiliary network {name!r}: choose from {names}, or pass a callable")
    return PER_TOKEN_AUXILIARIES[name](shape[-1], classes, **options)
