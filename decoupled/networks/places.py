"""Where a model can be cut: the places in its forward at which one tensor carries all that the rest needs of the input,
in train and in eval mode.
"""

from typing import NamedTuple

import torch

from decoupled.networks.body import is_inside
from decoupled.networks.graph import INPUT, OUTPUT, Forward, listing
from decoupled.networks.tracing import Untraceable, trace_with_export, trace_with_fx


class Place(NamedTuple):
    """A place to cut, or an end of the model. The name is that of the node behind which it is, in both modes."""

    name: str
    shape: tuple  # of the representation of one input
    flops: int  # of the model below it
    parameters: int  # how many of the model's parameters are used below it


class Cut(NamedTuple):
    """What decouple makes modules of."""

    graphs: list  # for each module, {training: the graph of its steps in that mode}
    opened: set  # paths of the modules whose parts or operators are called instead of themselves


class TracedModel:
    """A model whose forward is known in both modes. ``places``: {name: Place}, in order from the input."""

    calls_modules = False  # it calls operators, those of forwards with gradients

    def __init__(self, model, example, trace):
        """``trace``: (training) → Trace of ``model``. ``example``: a batch of inputs."""
        self.model = model
        self.example = example
        self.train = Forward(model, trace(True))
        self.eval = Forward(model, trace(False))
        self.train.record(example, training=True)
        self.eval.record(example, training=False)
        self.start = Place(INPUT, tuple(example.shape[1:]), 0, 0)
        self.stopped = None  # why torch.export could not look into the modules that torch.fx left whole
        self.end = Place(OUTPUT, (), self.train.flops[self.train.output], len(self.train.uses))
        self.places = {}
        for node in self.eval.nodes:
            name = self.eval.names[node][0]
            if self.eval.named[name] is node and is_worth_listing(node, name) and self.obstacle(name) is None:
                self.places[name] = self.describe_place(name)

    def describe_place(self, name):
        shape = tuple(self.eval.values[self.eval.named[name]].shape[1:])
        node = self.train.named[name]
        return Place(name, shape, self.train.flops[node], len(self.train.below(node)))

    def obstacle(self, name):
        """Why the network cannot be cut after the node called ``name`` in eval mode; None where it can."""
        if name not in self.train.named:
            return "the forward does not come there in train mode"
        below = set()
        above = set()
        for forward in (self.eval, self.train):
            node = forward.named[name]
            reason = forward.obstacle(node)
            if reason:
                return reason
            below |= forward.below(node)
            above |= forward.above(node)
        shared = [key for key, value in self.model.named_parameters() if value in below and value in above]
        if shared:
            return f"{listing(shared)} {'is' if len(shared) == 1 else 'are'} used on both sides of it"
        if not below:
            return "there is nothing to learn below it"
        if not above:
            return "there is nothing to learn above it"
        return None

    def cut(self, places):
        """The Cut between ``places``."""
        return cut_forwards({True: self.train, False: self.eval}, places)


class FxTracedModel(TracedModel):
    """A model traced by torch.fx, each of its modules as far as it can be."""

    calls_modules = True

    def __init__(self, model, example, returns_object):
        self.returns_object = returns_object
        super().__init__(model, example, lambda training: trace_with_fx(model, training, returns_object))

    def may_hide_places(self):
        """Whether torch.export may find many more places: inside modules that torch.fx could not trace, and where sizes
        are all that crosses.
        """
        for forward in (self.train, self.eval):
            for path in forward.trace.whole:
                called = [node for node in forward.nodes if node.target == path]
                if any(not forward.alive_over(node) for node in called):
                    return True
        hidden = 0
        for node, others in self.eval.crossing.items():
            is_module = node in self.eval.trace.module_ends
            if is_module and others and all(is_number(self.eval.values[other]) for other in others):
                hidden += 1
        return hidden > len(self.places)

    def cut(self, places):
        """The Cut between ``places``, which calls the model's modules whole but for those with a cut inside."""
        opened = {""}
        for place in places:
            opened.update(parents(place.name))
        forwards = {}
        try:
            for training in (True, False):
                trace = trace_with_fx(self.model, training, self.returns_object, opened)
                forwards[training] = Forward(self.model, trace)
        except Untraceable:  # where, say, a module is called whose tuple can only be unpacked when it is opened
            return super().cut(places)
        for forward in forwards.values():
            for place in places:
                node = forward.named.get(place.name)
                if forward.crossing.get(node) != []:  # more is needed to call a module than its parts use
                    return super().cut(places)
        return cut_forwards(forwards, places)


def trace_model(model, example, returns_object):
    """The TracedModel by torch.fx or, where that cannot trace it and hides places, by torch.export. Raises Untraceable.

    ``model`` is changed: its mode, its buffers, further attributes. ``returns_object``: it returns an object that has
    logits.
    """
    traced = None
    try:
        traced = FxTracedModel(model, example, returns_object)
        if not traced.may_hide_places():
            return traced
    except Untraceable:
        pass
    try:
        exported = TracedModel(model, example, lambda training: trace_with_export(model, training, example))
    except Untraceable as error:
        if traced is None:
            raise
        traced.stopped = error
        return traced
    if traced and len(traced.places) >= len(exported.places):
        return traced
    return exported


def cut_forwards(forwards, places):
    """The Cut of ``forwards``, {training: Forward}, between ``places``."""
    graphs = []
    start = INPUT
    for end in (*(place.name for place in places), OUTPUT):
        pair = {}
        for training, forward in forwards.items():
            pair[training] = forward.steps_between(forward.named[start], forward.named[end])
        graphs.append(pair)
        start = end
    return Cut(graphs, opened_modules(forwards[True]))


def opened_modules(forward):
    """Paths of the modules that ``forward`` does not call, nor a module around them."""
    called = {node.target for node in forward.nodes if node.op == "call_module"}
    paths = [path for path, _ in forward.model.named_modules()]
    return {path for path in paths if path not in called and not is_inside(path, called)}


def parents(name):
    """The paths of the modules around the place called ``name``."""
    path = name.split("#")[0].split("[")[0]
    names = path.split(".")[:-1]
    return {".".join(names[:length]) for length in range(1, len(names) + 1)}


def is_number(value):
    return isinstance(value, (int, float, torch.Size))


def is_worth_listing(node, name):
    """Whether a place is more than another view of what is there before it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or "()" not in name:
        return True
    return schema.is_mutable or all(argument.alias_info is None for argument in schema.arguments)
