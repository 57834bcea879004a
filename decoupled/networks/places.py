"""Where a model can be cut: the places in its forward at which a single tensor carries everything that the rest of the
model needs from the input, in train and in eval mode.
"""

from typing import NamedTuple

import torch

from decoupled.networks.body import ancestors, is_inside
from decoupled.networks.graph import INPUT, OUTPUT, ForwardGraph, Obstacle, listing
from decoupled.networks.tracing import Untraceable, trace_with_export, trace_with_fx


class Place(NamedTuple):
    """A place to cut, or an end of the model. It has the ``name`` of the node before it, which is the same in both
    modes.
    """

    name: str
    shape: tuple  # shape of the representation of one input
    flops: int  # FLOPs of the model below it
    parameters: int  # how many of the model's parameters are used below it


class Cut(NamedTuple):
    """The parts from which decouple builds modules."""

    graphs: list  # for each module, {training: the graph of its steps in that mode}
    opened: set  # paths of the modules that are not called themselves, only their parts or operators


class TracedModel:
    """A model whose forward is traced in both modes. ``places``: {name: Place}, in order from the input."""

    calls_modules = False  # whether torch.export recorded operators, with gradients enabled

    def __init__(self, model, example, trace_in_mode):
        """``trace_in_mode(training)`` returns the Trace of ``model`` in that mode. ``example``: a batch of inputs."""
        self.model = model
        self.example = example
        self.train = ForwardGraph(model, trace_in_mode(True))
        self.eval = ForwardGraph(model, trace_in_mode(False))
        self.train.record(example, training=True)
        self.eval.record(example, training=False)
        self.start = Place(INPUT, tuple(example.shape[1:]), 0, 0)
        self.export_error = None  # why torch.export could not open the modules that torch.fx left whole
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
        """The Obstacle to a cut after the node called ``name`` in eval mode; None if there is none."""
        if name not in self.train.named:
            return Obstacle("the forward skips it in train mode")
        below = set()
        above = set()
        for forward in (self.eval, self.train):
            node = forward.named[name]
            obstacle = forward.obstacle(node)
            if obstacle:
                return obstacle
            below |= forward.below(node)
            above |= forward.above(node)
        shared = [key for key, value in self.model.named_parameters() if value in below and value in above]
        if shared:
            verb = "is" if len(shared) == 1 else "are"
            return Obstacle(f"{listing(shared)} {verb} used on both sides of it", shared=True)
        if not below:
            return Obstacle("no parameter is used below it")
        if not above:
            return Obstacle("no parameter is used above it")
        return None

    def cut(self, places):
        """The Cut between ``places``."""
        return cut_forwards({True: self.train, False: self.eval}, places)


class FxTracedModel(TracedModel):
    """A model traced by torch.fx, which opens each module as far as possible."""

    calls_modules = True

    def __init__(self, model, example, returns_object):
        self.returns_object = returns_object
        super().__init__(model, example, lambda training: trace_with_fx(model, training, returns_object))

    def may_hide_places(self):
        """Whether torch.export may find many more places: inside modules that torch.fx could not trace, or where only
        sizes cross.
        """
        for forward in (self.train, self.eval):
            for path in forward.trace.whole:
                called = [node for node in forward.nodes if node.target == path]
                if any(not forward.skipping(node) for node in called):
                    return True
        hidden = 0
        for node, others in self.eval.crossing.items():
            is_module = node in self.eval.trace.module_ends
            if is_module and others and all(is_number(self.eval.values[other]) for other in others):
                hidden += 1
        return hidden > len(self.places)

    def cut(self, places):
        """The Cut between ``places``. It calls the model's modules whole, except those with a cut inside."""
        opened = {""}
        for place in places:
            opened.update(ancestors(path_of(place.name)))
        forwards = {}
        try:
            for training in (True, False):
                trace = trace_with_fx(self.model, training, self.returns_object, opened)
                forwards[training] = ForwardGraph(self.model, trace)
        # For example `a, b = layer(x)`: a layer that is called whole returns a stand-in, which cannot be unpacked
        except Untraceable:
            return super().cut(places)
        for forward in forwards.values():
            for place in places:
                node = forward.named.get(place.name)
                # A module called whole takes all its arguments, even those its parts do not use: one may cross here
                if forward.crossing.get(node) != []:
                    return super().cut(places)
        return cut_forwards(forwards, places)


def trace_model(model, example, returns_object):
    """The TracedModel by torch.fx or, if torch.fx cannot trace the model or may hide places, by torch.export. Raises
    Untraceable.

    Changes ``model``: its mode, its buffers, additional attributes. ``returns_object``: the model returns an object
    that has logits.
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
        traced.export_error = error
        return traced
    if traced and len(traced.places) >= len(exported.places):
        return traced
    return exported


def cut_forwards(forwards, places):
    """Cuts ``forwards``, {training: ForwardGraph}, between ``places``. Returns a Cut."""
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
    """Paths of the modules that ``forward`` calls neither themselves nor as a part of another module."""
    called = {node.target for node in forward.nodes if node.op == "call_module"}
    paths = [path for path, _ in forward.model.named_modules()]
    return {path for path in paths if path not in called and not is_inside(path, called)}


def path_of(name):
    """The path in the name of a place, without #2 and [0]."""
    return name.split("#")[0].split("[")[0]


def is_number(value):
    return isinstance(value, (int, float, torch.Size))


def is_worth_listing(node, name):
    """Whether a place is more than another view of the place before it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or "()" not in name:
        return True
    return schema.is_mutable or all(argument.alias_info is None for argument in schema.arguments)
