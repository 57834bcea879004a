"""A ready-made synthesizer. Your own is any module called as ``synthesizer(trigger, context)``; context is None outside
synthesizer_context.
"""

from itertools import pairwise

from torch import nn
from torch.nn import functional as F


class BasicSynthesizer(nn.Module):
    """An MLP: trigger (…, trigger_dim) and, with context_dim, context (…, context_dim) → (…, output_dim).

    ``n_hidden`` hidden layers of ``hidden_dim`` with ReLU; the context, through a linear layer of its own, is added to
    what enters the first ReLU (to the output when there is no hidden layer). Dimensions not given equal output_dim. The
    last layer starts at zero, so that untrained synthetic messages are zero. Raises RuntimeError when run without the
    context it was made for.
    """

    def __init__(self, output_dim, n_hidden=0, hidden_dim=None, trigger_dim=None, context_dim=None):
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        trigger_dim = output_dim if trigger_dim is None else trigger_dim
        widths = [trigger_dim, *[hidden_dim] * n_hidden, output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.context = None if context_dim is None else nn.Linear(context_dim, widths[1], bias=False)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        if self.context is not None and n_hidden == 0:
            nn.init.zeros_(self.context.weight)  # it is the last layer too

    def forward(self, trigger, context=None):
        first, *rest = self.layers
        output = first(trigger)
        if self.context is not None:
            if context is None:
                raise RuntimeError(
                    "this synthesizer was made with context_dim: run it inside dni.synthesizer_context(context)"
                )
            output = output + self.context(context)
        for layer in rest:
            output = layer(F.relu(output))
        return output
