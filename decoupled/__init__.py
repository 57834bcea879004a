"""Shared code of the experiments on Decoupled Greedy Learning: images, logs, checkpoints, precision, networks, costs
and plots.

The algorithms are not here: each experiment's script spells out its own.
"""

from decoupled.errors import InputError
from decoupled.networks.decouple import cuts, decouple
from decoupled.networks.evaluation import evaluate
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training.loading import load

__all__ = ["DecoupledModule", "DecoupledNetwork", "InputError", "cuts", "decouple", "evaluate", "load"]
