"""What the experiments of Decoupled Greedy Learning share: images, logs, checkpoints, precision, networks, costs and
plots.

The algorithms are not here. Each experiment's script holds its own, top to bottom.
"""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line that names it and says the way out; scripts exit
    with code 2.
    """


from decoupled.loading import load  # noqa: E402, they need InputError
from decoupled.splitting import cuts, decouple  # noqa: E402

__all__ = ["InputError", "cuts", "decouple", "load"]
