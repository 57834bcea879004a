"""Cuts any network into modules for DGL: the model's own layers, trained in place, and an auxiliary network for each
module but the last, which keeps the model's own head.
"""

import copy
import difflib
from contextlib import contextmanager

import pandas as pd
import torch
from torch import fx, nn

from decoupled.errors import InputError
from decoupled.networks import graph as tracing
from decoupled.networks.auxiliary import auxiliary_for
from decoupled.networks.graph import Flow, Untraceable, listing, same
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, eval_mode

LAYOUTS = ("channels_first", "channels_last")


TOLERANCE = 1.1  # a cut between larger parts of the model is preferred if the largest module grows by no more than this


ADAPTER = "write a module whose forward calls its parts in order, from one tensor to logits (README, Your own network)"


INSIDE = "to cut inside one of its parts, " + ADAPTER


def cuts(model, example_input):
    """Where ``model`` can be cut: a pandas frame by name, in order from the input.

    A name is the path of the module after which the cut is, or, with (), of a function in a forward. Columns: shape, of
    the representation of one input there; flops, the share of the model's FLOPs below it. Arguments and errors as in
    decouple; ``model`` stays as it is.
    """
    flow, places = examine(model, example_input)
    total = max(1, flow.flops[flow.output])
    rows = [(flow.names[node][0], tuple(flow.values[node].shape[1:]), flow.flops[node] / total) for node in places]
    return pd.DataFrame(rows, columns=["cut", "shape", "flops"]).set_index("cut")


def decouple(
    model, example_input, *, splits=None, at=None, classes=None, auxiliary="mlp-sr", layout=None, **auxiliary_options
):
    """``model`` as a DecoupledNetwork: of ``splits`` modules of about equal FLOPs, or cut after those named ``at`` (see
    cuts).

    The modules are made of the model's own parts: training them trains the model in place, whose forward, state_dict
    and pretrained weights stay as they were. The last module's body has the model's own head; its auxiliary is an
    identity.
      model          any module that maps a tensor (B, …) to logits (B, classes), in train and eval mode alike
      example_input  a batch of inputs, on the model's device; two are used. On the meta device nothing is computed, and
                     shapes alone are checked
      classes        number of classes of the model's head, checked; by default read from it
      auxiliary      mlp, mlp-sr or cnn, with ``auxiliary_options`` (see decoupled.networks.auxiliary), or a callable:
                     (shape without B, classes, **auxiliary_options) → module, (B, *shape) → (B, classes)
      layout         of the representations: channels_first, (B, C, h, w), or channels_last, (B, h, w, C) and (B, N, C);
                     needed only where shapes do not tell: maps of square inputs are square, rank 3 is tokens (B, N, C)
    The largest module is the smallest possible by forward FLOPs, auxiliaries left out, or up to 10 % larger where that
    lets the cut be between larger parts of the model. Checked at each call: the modules together compute what the model
    does, bit for bit, in train and in eval mode, batch norm's buffers included, and no two have a parameter in common.
    Raises InputError, which says the way out, for too few cuts, a name that is no cut, a forward that cannot be traced.

    Moving the network to a device moves the model's parameters; ``model.to(device)`` then moves the rest of the model.
    """
    if (splits is None) == (at is None):
        raise InputError("say how many modules (splits=K) or where to cut (at=[names]): one of the two")
    if layout not in (None, *LAYOUTS):
        raise InputError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    flow, places = examine(model, example_input)
    heads = flow.logits.shape[1]
    if classes not in (None, heads):
        raise InputError(f"the head of {flow.kind} has {heads} classes, not {classes}: build the model with {classes}")
    nodes = balanced(flow, places, splits) if at is None else named(flow, places, [at] if isinstance(at, str) else at)
    check(flow, nodes)
    modules = []
    for node, body in zip((*nodes, None), pieces(flow, model, nodes), strict=True):
        head = learner(flow, node, places, auxiliary, layout, auxiliary_options) if node else nn.Identity()
        modules.append(DecoupledModule(body, head))
    return DecoupledNetwork(modules)


def examine(model, example_input):
    """(recorded Flow of a copy of ``model``, the nodes after which it can be cut). Raises InputError."""
    if not isinstance(example_input, torch.Tensor) or example_input.dim() < 2 or len(example_input) == 0:
        raise InputError("example_input must be a batch of inputs: a tensor (B, …)")
    inputs = (example_input if len(example_input) > 1 else torch.cat([example_input] * 2))[:2].clone()
    kind = type(model).__name__
    try:
        twin = copy.deepcopy(model).requires_grad_(False)
    except RuntimeError as error:
        raise InputError(f"{kind} holds tensors that autograd made: cut it before it runs, or build it anew") from error
    with torch.no_grad(), eval_mode(twin), seeded(inputs):
        try:
            logits = twin(inputs.clone())
        except Exception as error:  # whatever a model raises
            raise InputError(f"{kind} fails on inputs {tuple(inputs.shape)}: {tracing.first_line(error)}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"{kind} returns {what}, not logits (B, classes): {ADAPTER}")
    try:
        with seeded(inputs):
            flow = tracing.expand(twin).record(inputs)
    except Untraceable as error:
        raise InputError(f"the forward of {kind} {error}: {ADAPTER}") from error
    return flow, [node for node in flow.nodes if flow.obstacle(node) is None]


@contextmanager
def seeded(inputs):
    """Inside the block random numbers follow a fixed seed; after it they go on as if none had been drawn."""
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        torch.manual_seed(0)
        yield


def balanced(flow, places, splits):
    """The splits − 1 of ``places`` after which decouple cuts. Raises InputError when there are too few."""
    if not isinstance(splits, int) or splits < 1:
        raise InputError(f"splits must be an integer ≥ 1, not {splits!r}")
    most, low = 0, flow.input
    for high in (*places, flow.output):
        if teachable(flow, low, high):
            most, low = most + 1, high
    if splits > most:
        where = listing(flow.names[node][0] for node in places)
        raise InputError(f"{flow.kind} splits into {most} modules at most: it can be cut after {where}; {INSIDE}")
    best = partition(flow, places, splits)
    depths = {node: flow.names[node][0].count(".") for node in places}
    for depth in sorted(set(depths.values())):
        coarse = partition(flow, [node for node in places if depths[node] <= depth], splits)
        if coarse and coarse[0][0] <= TOLERANCE * best[0][0]:
            return coarse[1]
    return best[1]


def teachable(flow, low, high):
    """Whether what is above the node ``low`` up to ``high`` has a parameter, and FLOPs if the model has any."""
    works = flow.flops[high] > flow.flops[low] or flow.flops[flow.output] == 0
    return works and flow.learns(flow.position[low], flow.position[high])


def partition(flow, places, splits):
    """(FLOPs of the modules, descending; the nodes after which to cut) for the least such FLOPs in lexical order; of
    equal cuts, the latest. Each module is teachable. None if there is no such partition.
    """
    ends = [flow.input, *places, flow.output]
    flops = [flow.flops[node] for node in ends]
    # best[end]: the least (FLOPs, descending; cuts, negative) of the modules up to ends[end]. Adding a module to two
    # such tuples keeps their order, so that the best of the whole is made of bests.
    best = {0: ((), ())}
    for part in range(1, splits + 1):
        reached = {}
        for end in range(part, len(ends)) if part < splits else [len(ends) - 1]:
            options = [
                (tuple(sorted((*sizes, flops[end] - flops[start]), reverse=True)), (*taken, -start))
                for start, (sizes, taken) in best.items()
                if start < end and teachable(flow, ends[start], ends[end])
            ]
            if options:
                reached[end] = min(options)
        best = reached
    if not best:
        return None
    ((sizes, taken),) = best.values()
    return sizes, [ends[-start] for start in taken[1:]]


def named(flow, places, at):
    """The nodes whose names are ``at``, in order. Raises InputError for a name that is no cut."""
    known = {name: node for node in flow.nodes for name in flow.names[node]}
    for name in at:
        if known.get(name) not in places:
            raise InputError(no_cut(flow, places, name))
    nodes = sorted({known[name] for name in at}, key=flow.position.get)
    for low, high in zip((flow.input, *nodes), (*nodes, flow.output), strict=True):
        if not flow.learns(flow.position[low], flow.position[high]):
            between = f"{flow.names[low][0]} and {flow.names[high][0]}"
            raise InputError(f"there is no parameter to learn between {between}: leave out one of them")
    return nodes


def no_cut(flow, places, name):
    """What is wrong with the cut called ``name``, and which are nearest."""
    every = [flow.names[node][0] for node in places]
    path = name.split("#")[0]
    parents = [path[:end] for end, letter in enumerate(path) if letter == "."]
    try:
        inside = Flow(flow.model, flow.opened.union(parents))
    except Untraceable as error:
        return f"{name} is no place to cut (a forward around it {error}): choose from {listing(every)}"
    node = next((node for node in inside.nodes if name in inside.names[node]), None)
    if node is None:
        near = difflib.get_close_matches(name, every, n=4) or every
        return f"{flow.kind} calls no part named {name}: it can be cut after {listing(near)}"
    with seeded(flow.example):
        reason = inside.record(flow.example).obstacle(node) or "it is inside a part that is kept whole"
    order = [other for node in inside.nodes for other in inside.names[node] if other in every or other == name]
    near = [other for other in every if other in order[max(0, order.index(name) - 1) :][:3]]
    return f"{name} is no place to cut ({reason}): the nearest are {listing(near)}"


def pieces(flow, model, at):
    """The bodies between the nodes ``at`` as modules made of those of ``model``: the flow's, or one it is a copy of."""
    bodies, start = [], flow.input
    for end in (*at, flow.output):
        span = flow.nodes[flow.position[start] + 1 : flow.position[end] + 1]
        needed = {node for node in span if node in flow.dependent or not node.users}  # in-place calls may have no users
        for node in reversed(flow.nodes):  # what does not depend on the input is computed where it is used
            if node in needed:
                needed.update(source for source in node.all_input_nodes if source not in flow.dependent)
        graph = fx.Graph()
        copies = {start: graph.placeholder("representation")}
        for node in flow.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        if end is not flow.output:
            graph.output(copies[end])
        targets = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
        owners = {target: flow.model if tracing.CONSTANT in target else model for target in targets}
        parts = {target: tracing.attribute(owner, target) for target, owner in owners.items()}
        bodies.append(fx.GraphModule(parts, graph, type(model).__name__))
        bodies[-1].training = model.training
        start = end
    return bodies


@torch.no_grad()
def check(flow, nodes):
    """Raises InputError unless the pieces cut after ``nodes`` compute what the model does, buffers included."""
    twin, bodies = flow.model, pieces(flow, flow.model, nodes)
    start = [buffer.clone() for buffer in twin.buffers()]
    for training in (True, False):
        outcomes = []
        for network in ([twin], bodies):
            for buffer, value in zip(twin.buffers(), start, strict=True):
                buffer.copy_(value)
            with seeded(flow.example):
                value = flow.example.clone()
                for body in network:
                    value = body.train(training)(value)
            outcomes.append([value, *(buffer.clone() for buffer in twin.buffers())])
        if not all(map(same, *outcomes)):
            mode = "train" if training else "eval"
            raise InputError(
                f"cut, {flow.kind} computes something else in {mode} mode: its forward depends on values that were "
                f"fixed while it was traced; {ADAPTER}"
            )


def learner(flow, node, places, auxiliary, layout, options):
    """The auxiliary network for the representation at ``node``. Raises InputError."""
    value, classes, name = flow.values[node], flow.logits.shape[1], flow.names[node][0]
    shape = tuple(value.shape[1:])
    if callable(auxiliary):
        net = auxiliary(shape, classes, **options)
    else:
        net = auxiliary_for(auxiliary, shape, layout or guess(flow, node, places), classes, **options)
    net = net.to(value.device, value.dtype)
    with torch.no_grad(), eval_mode(net), seeded(value):
        logits = net(value.clone())
    if logits.shape != (len(value), classes):
        raise InputError(f"the auxiliary after {name} returns {tuple(logits.shape)}, not {(len(value), classes)}")
    return net


def guess(flow, node, places):
    """The layout that the shape of the representation at ``node`` tells, or those of the others. Raises InputError."""
    square = flow.example.dim() != 4 or flow.example.shape[2] == flow.example.shape[3]

    def tell(shape):
        if len(shape) != 3:
            return "channels_last"
        first, middle, last = shape
        if not square or (first == middle) == (middle == last):
            return None
        return "channels_last" if first == middle else "channels_first"

    shape = flow.values[node].shape[1:]
    others = {tell(flow.values[place].shape[1:]) for place in places if flow.values[place].dim() == 4} - {None}
    if layout := tell(shape) or (others.pop() if len(others) == 1 else None):
        return layout
    where = f"the shape {tuple(shape)} after {flow.names[node][0]}"
    raise InputError(f"{where} does not tell channels from space: pass layout={' or '.join(LAYOUTS)}")
