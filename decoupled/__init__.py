"""What the experiments of Decoupled Greedy Learning share: images, logs, checkpoints, precision, networks, costs and
plots.

The algorithms are not here. Each experiment's script holds its own, top to bottom.
"""

from decoupled.errors import InputError
from decoupled.networks.decouple import cuts, decouple
from decoupled.networks.evaluation import evaluate
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training.loading import load

__all__ = ["DecoupledModule", "DecoupledNetwork", "InputError", "cuts", "decouple", "evaluate", "load"]
