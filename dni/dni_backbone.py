"""The CIFAR-10 CNN of the DNI paper (Jaderberg et al. 2017, App. C.1) and its synthesizer, shared by the four methods
that are compared here.
"""

from torch import nn

from decoupled.networks.layerwise import draw_batch_norm_weights


def backbone(channels, classes):
    """([block, block, block], head): a block is 5×5 convolution, BN, ReLU, 3×3 pooling of stride 3.

    (B, 3, 32, 32) → (B, C, 10, 10) → (B, C, 3, 3) → (B, C, 1, 1) → logits (B, classes). Make it before synthesizers and
    auxiliaries, so that all methods start from the same weights with the same seed. Batch norm weights are drawn as in
    the published runs.
    """
    blocks = [
        block(3, channels, nn.MaxPool2d(3)),
        block(channels, channels, nn.AvgPool2d(3)),
        block(channels, channels, nn.AvgPool2d(3)),
    ]
    for each in blocks:
        draw_batch_norm_weights(each)
    return blocks, head(channels, classes)


def block(in_channels, channels, pool):
    return nn.Sequential(conv(in_channels, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), pool)


def head(channels, classes):
    """(B, C, 1, 1) → logits (B, classes)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, classes))


def conv(in_channels, channels):
    return nn.Conv2d(in_channels, channels, 5, padding=2)


class ConvSynthesizer(nn.Module):
    """Trigger (B, C, h, w) → (B, C, h, w): three 5×5 convolutions at full size, BN and ReLU after the first two. The
    weight of the last starts at zero.

    With ``context_dim``, a linear layer of the context (B, context_dim) is added to every position of the first
    convolution's output.
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
        nn.init.zeros_(self.layers[-1].weight)  # the bias keeps PyTorch's default, as in the released code

    def forward(self, trigger, context=None):
        output = self.trigger(trigger)
        if self.context is not None:
            output = output + self.context(context)[:, :, None, None]
        return self.layers(output)
