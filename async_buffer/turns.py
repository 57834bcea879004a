"""The bookkeeping of asynchronous learning (Sec. 5.6): whose turn it is, how far each module has progressed, and what
it has learned from.
"""

import re

import pandas as pd
import torch
from replay_buffer import Sample

from decoupled import InputError
from decoupled.networks.evaluation import Meter

SEQUENCES = ("random", "sequential")
WARM_UP = 2  # turns of each module, lowest first, before the first random turn, so that no buffer is empty


class Turns:
    """Decides whose turn is next in the simulation, and counts the mini-batches that each module has learned from.

    ``weights``: each module is drawn with a probability proportional to its weight, by a separate random generator;
    None: the modules take turns in order. Each module learns for ``epochs`` of its own epochs of ``length``
    mini-batches.
    """

    def __init__(self, modules, length, epochs, *, weights=None, warm_up=True, seed=0):
        self.modules = modules
        self.length = length
        self.epochs = epochs
        self.warm_up = warm_up
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.taken = 0  # turns
        self.learned = [0] * modules  # mini-batches, per module
        self.frozen = [0] * modules  # turns after the module's last epoch, per module

    def until(self, epoch):
        """Yields the module (from 0) of each turn, until the slowest module has finished its own ``epoch``."""
        while min(self.learned) < epoch * self.length:
            module = self.draw()
            if not self.learns(module):
                self.frozen[module] += 1
            yield module

    def draw(self):
        """The module of the next turn."""
        turn = self.taken
        self.taken += 1
        if self.warm_up and turn < WARM_UP * self.modules:
            return turn // WARM_UP
        if self.weights is None:
            return turn % self.modules
        return torch.multinomial(self.weights, 1, generator=self.generator).item()

    def learns(self, module):
        """Whether ``module`` has epochs left to learn."""
        return self.learned[module] < self.epochs * self.length

    def feeds(self, module):
        """Whether a module above still learns from the representations of ``module``."""
        return any(self.learns(above) for above in range(module + 1, self.modules))

    def own_epochs(self, module):
        """The number of epochs that ``module`` has finished."""
        return self.learned[module] // self.length

    def state_dict(self):
        return {
            "generator": self.generator.get_state(),
            "taken": self.taken,
            "learned": self.learned,
            "frozen": self.frozen,
            "epochs": self.epochs,
        }

    def load_state_dict(self, state):
        check_epochs(state["epochs"], self.epochs, frozen=any(state["frozen"]))
        self.generator.set_state(state["generator"])
        self.taken = state["taken"]
        self.learned = list(state["learned"])
        self.frozen = list(state["frozen"])


def check_epochs(before, now, frozen):
    """Raises InputError if a run in which a module is ``frozen`` after its last epoch resumes with another number of
    epochs.
    """
    if now != before and frozen:
        raise InputError(f"a module has stopped learning after its epoch {before}: resume with --nepochs {before}")


class ImageStream:
    """What the lowest module reads: the mini-batches of the training images, epoch after epoch, at its own pace."""

    def __init__(self, batches):
        self.batches = batches
        self.iterator = iter(())

    def __len__(self):
        return len(self.batches)

    def __str__(self):
        return str(self.batches)

    def read(self):
        """The next Sample."""
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = iter(self.batches)  # begins an epoch
            batch = next(self.iterator)
        images, labels = batch
        return Sample(images, labels, uses=0, step=0)

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)
        self.iterator = self.batches.rest()


class Tally:
    """What one module has done in an epoch of the log: its training loss and top-1 (a Meter), its turns, and the
    staleness and reuse of the mini-batches that it has learned from.

    Staleness is the number of steps that the module below has taken since it wrote a mini-batch; reuse is how often the
    mini-batch had been read before.
    """

    def __init__(self):
        self.meter = Meter()
        self.begin()

    def begin(self):
        """Begins a new epoch."""
        self.meter.begin()
        self.turns = 0
        self.skipped = 0  # turns in which there was nothing to learn from; only in the simulation
        self.frozen = 0  # turns after the module's last epoch
        self.staleness = []
        self.reuse = []

    def state_dict(self):
        return {
            "meter": self.meter.state_dict(),
            "turns": self.turns,
            "skipped": self.skipped,
            "frozen": self.frozen,
            "staleness": self.staleness,
            "reuse": self.reuse,
        }

    def load_state_dict(self, state):
        self.meter.load_state_dict(state["meter"])
        self.turns = state["turns"]
        self.skipped = state["skipped"]
        self.frozen = state["frozen"]
        self.staleness = state["staleness"]
        self.reuse = state["reuse"]

    def add(self, loss, logits, labels, staleness, reuse):
        """Adds a mini-batch that the module has learned from; ``staleness`` is None for images."""
        self.meter.update(loss, logits, labels)
        if staleness is not None:
            self.staleness.append(staleness)
            self.reuse.append(reuse)

    @property
    def top1(self):
        """Running train top-1 in %; nan if the module has learned nothing."""
        return self.meter.top1 if self.meter.count else float("nan")

    def line(self, n, epoch):
        """The log's line about module ``n``, with staleness and reuse if it has learned from a buffer."""
        text = f"# module {n}, epoch {epoch}: turns {self.turns}, skipped {self.skipped}, frozen {self.frozen}"
        return text + mean_and_max("staleness", self.staleness) + mean_and_max("reuse", self.reuse)


def mean_and_max(name, values):
    """The part of a Tally's line for ``values``; empty if there are none."""
    if not values:
        return ""
    return f", {name} mean {sum(values) / len(values):.4f} max {max(values)}"


TALLY = re.compile(  # earlier versions called a module a layer
    r"(?:module|layer) (?P<n>\d+), epoch (?P<epoch>\d+): "
    r"turns (?P<turns>\d+), skipped (?P<skipped>\d+), frozen (?P<frozen>\d+)"
    r"(?:, staleness mean (?P<staleness>[\d.]+) max (?P<staleness_max>\d+), reuse mean "
    r"(?P<reuse>[\d.]+) max (?P<reuse_max>\d+))?"
)


def read_tallies(comments):
    """A data frame with a row for each of a log's ``comments`` that a Tally wrote; staleness and reuse are nan if the
    line has none.
    """
    rows = []
    for comment in comments:
        if match := TALLY.fullmatch(comment):
            rows.append(match.groupdict())
    return pd.DataFrame(rows, columns=list(TALLY.groupindex)).astype(float)
