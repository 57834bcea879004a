"""The CIFAR-10 CNN of the DNI paper (Jaderberg et al. 2017, App. C.1) and its synthesizer: what the four methods
compared here share.
"""

from torch import nn

from decoupled.networks.layerwise import draw_batch_norm_weights


def backbone(channels, classes):
    """Its three blocks, 5×5 convolution, BN, ReLU, 3×3 pooling of stride 3, and its head: ([block, block, block],
    head).

    (B, 3, 32, 32) → (B, C, 10, 10) → (B, C, 3, 3) → (B, C, 1, 1) → logits (B, classes). Made before synthesizers and
    auxiliaries, so that all methods start from the same weights with the same seed. Batch norm weights, the
    synthesizer's too, are drawn as in the published runs.
    """
    layers = [(3, nn.MaxPool2d(3)), (channels, nn.AvgPool2d(3)), (channels, nn.AvgPool2d(3))]
    blocks = [
        nn.Sequential(conv(below, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), pool)
        for below, pool in layers
    ]
    return [draw_batch_norm_weights(block) for block in blocks], head(channels, classes)


def head(channels, classes):
    """(B, C, 1, 1) → logits (B, classes)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, classes))


def conv(below, channels):
    return nn.Conv2d(below, channels, 5, padding=2)


class ConvSynthesizer(nn.Module):
    """Trigger (B, C, h, w) → (B, C, h, w): 5×5 convolutions at full size, BN and ReLU after the first two, the last
    with zero weight at start.

    With ``context_dim``, a linear layer of the context (B, context_dim) is added, everywhere in space, to what the
    first convolution gives.
    """

    def __init__(self, channels, context_dim=None):
        super().__init__()
        self.trigger = conv(channels, channels)
        self.context = None if context_dim is None else nn.Linear(context_dim, channels)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv(channels, channels),
        )
        draw_batch_norm_weights(self.layers)
        nn.init.zeros_(self.layers[-1].weight)  # its bias keeps PyTorch's default, as in the released code

    def forward(self, trigger, context=None):
        output = self.trigger(trigger)
        if self.context is not None:
            output = output + self.context(context)[:, :, None, None]
        return self.layers(output)
