"""Whose turn it is, what it found, and how far each module has come: the bookkeeping of the asynchronous simulation
(Sec. 5.6).
"""

import re

import pandas as pd
import torch
from replay_buffer import Sample

from decoupled import InputError
from decoupled.networks.evaluation import Meter

SEQUENCES = ("random", "sequential")
WARM_UP = 2  # turns of each module, from the lowest up, before the first draw: then every buffer holds something


class Turns:
    """Decides which module is next and counts the mini-batches each has learned from.

    ``weights``: a module is drawn with a probability proportional to its own, from the draws' own generator; None: the
    modules take turns in order. ``length``: mini-batches an epoch. A module learns for ``epochs`` of its own epochs.
    """

    def __init__(self, modules, length, epochs, *, weights=None, warm_up=True, seed=0):
        self.modules, self.length, self.epochs, self.warm_up = modules, length, epochs, warm_up
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        self.taken = 0
        self.learned = [0] * modules  # mini-batches
        self.frozen = [0] * modules  # turns since its last epoch was over

    def until(self, epoch):
        """Yields the module (from 0) of each turn, until the slowest module has finished ``epoch`` of its own."""
        while min(self.learned) < epoch * self.length:
            module = self.draw()
            self.frozen[module] += not self.learns(module)
            yield module

    def draw(self):
        turn, self.taken = self.taken, self.taken + 1
        if self.warm_up and turn < WARM_UP * self.modules:
            return turn // WARM_UP
        if self.weights is None:
            return turn % self.modules
        return torch.multinomial(self.weights, 1, generator=self.generator).item()

    def learns(self, module):
        return self.learned[module] < self.epochs * self.length

    def feeds(self, module):
        """Whether a module above still learns from what this one makes."""
        return any(self.learns(above) for above in range(module + 1, self.modules))

    def own_epochs(self, module):
        """The epochs that ``module`` has finished."""
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
        if state["epochs"] != self.epochs and any(state["frozen"]):
            raise InputError(
                f"a module has stopped learning after its epoch {state['epochs']}: resume with "
                f"--nepochs {state['epochs']}"
            )
        self.generator.set_state(state["generator"])
        self.taken, self.learned, self.frozen = state["taken"], list(state["learned"]), list(state["frozen"])


class ImageStream:
    """What the lowest module reads: the training images' mini-batches, pass after pass, in its own time."""

    def __init__(self, batches):
        self.batches = batches
        self.iterator = iter(())

    def __len__(self):
        return len(self.batches)

    def __str__(self):
        return str(self.batches)

    def read(self):
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = iter(self.batches)  # begins a pass
            batch = next(self.iterator)
        return Sample(*batch, uses=0, step=0)

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)
        self.iterator = self.batches.rest()


class Tally:
    """What one module did between two lines of the log: a Meter of its learning, its turns, and the age and uses of
    what it learned from.

    Staleness is the steps that the module below has taken since it wrote the mini-batch; reuse how often the mini-batch
    had been read before.
    """

    def __init__(self):
        self.meter = Meter()
        self.begin()

    def begin(self):
        """Forgets everything: a new epoch."""
        self.meter.begin()
        self.turns = self.skipped = self.frozen = 0
        self.staleness, self.reuse = [], []

    def state_dict(self):
        return {**vars(self), "meter": self.meter.state_dict()}

    def load_state_dict(self, state):
        self.meter.load_state_dict(state["meter"])
        vars(self).update({key: value for key, value in state.items() if key != "meter"})

    def learned(self, loss, logits, labels, staleness, reuse):
        """Adds a mini-batch that the module learned from; ``staleness`` None: from the images."""
        self.meter.update(loss, logits, labels)
        if staleness is not None:
            self.staleness.append(staleness)
            self.reuse.append(reuse)

    @property
    def top1(self):
        """Running train top-1 in %; nan when the module has learned nothing."""
        return self.meter.top1 if self.meter.count else float("nan")

    def line(self, n, epoch):
        """The line of the log: staleness and reuse only above the lowest module, and where it learned."""
        text = f"# module {n}, epoch {epoch}: turns {self.turns}, skipped {self.skipped}, frozen {self.frozen}"
        for name in ("staleness", "reuse"):
            if values := getattr(self, name):
                text += f", {name} mean {sum(values) / len(values):.4f} max {max(values)}"
        return text


TALLY = re.compile(  # earlier versions called a module a layer
    r"(?:module|layer) (?P<n>\d+), epoch (?P<epoch>\d+): "
    r"turns (?P<turns>\d+), skipped (?P<skipped>\d+), frozen (?P<frozen>\d+)"
    r"(?:, staleness mean (?P<staleness>[\d.]+) max (?P<staleness_max>\d+), reuse mean "
    r"(?P<reuse>[\d.]+) max (?P<reuse_max>\d+))?"
)


def tallies(comments):
    """A frame with a row for each line that Tally.line wrote among a log's ``comments``; staleness and reuse are nan
    where the line has none.
    """
    rows = [match.groupdict() for match in map(TALLY.fullmatch, comments) if match]
    return pd.DataFrame(rows, columns=list(TALLY.groupindex)).astype(float)
