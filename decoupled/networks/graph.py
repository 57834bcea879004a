"""A model's forward as a graph, and the places in it where one tensor carries all that the rest needs of the input.

Modules are traced whole (torch.fx) and opened only where there are such places inside, so the graph stays as coarse as
the model's own parts. One graph serves train and eval mode.
"""

import functools
import operator
from collections import Counter, defaultdict

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import FlopCounterMode

CONSTANT = "_tensor_constant"  # how torch.fx names a tensor made while tracing


class Untraceable(Exception):
    """A forward that torch.fx cannot trace, or that takes other steps in train than in eval mode."""


class Tracer(fx.Tracer):
    """Traces a forward of one input, other arguments left at their defaults; every module but those at the paths
    ``opened`` stays whole. ``modules``: {node: paths of the modules whose output it is, innermost first}.
    """

    proxy_buffer_attributes = True  # what a forward does to a buffer belongs in the graph

    def __init__(self, opened):
        super().__init__()
        self.opened = opened
        self.modules = defaultdict(list)

    def is_leaf_module(self, module, path):
        return path not in self.opened

    def call_module(self, module, forward, args, kwargs):
        output = super().call_module(module, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.modules[output.node].append(self.path_of_module(module))
        return output

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        return root_fn, [self.root, self.create_proxy("placeholder", "representation", (), {})]


def trace(model, opened=()):
    """The graph of ``model``'s forward and its Tracer's ``modules``. A constant that is True in train and False in eval
    mode becomes the attribute ``training``, so that ``F.dropout(x, training=self.training)`` follows the mode.

    ``model`` is left in eval mode. Raises Untraceable.
    """
    graphs = []
    for training in (True, False):
        model.train(training)
        tracer = Tracer(opened)
        try:
            graphs.append(tracer.trace(model))
        except Exception as error:  # whatever a forward raises when it is given a proxy
            raise Untraceable(f"cannot be traced ({first_line(error)})") from error
    train, graph = graphs
    flag, twins = None, dict(zip(train.nodes, graph.nodes, strict=False))
    different = Untraceable("does not trace alike in train and in eval mode")
    if len(train.nodes) != len(graph.nodes):
        raise different
    for before, node in twins.items():
        ours, theirs, merged = [], [], []
        map_aggregate((node.args, node.kwargs), ours.append)
        map_aggregate((before.args, before.kwargs), theirs.append)
        if node.op != before.op or not same_target(model, node, before) or len(ours) != len(theirs):
            raise different
        for here, there in zip(ours, theirs, strict=True):
            if here is False and there is True:
                with graph.inserting_before(next(iter(graph.nodes)).next):
                    flag = flag or graph.create_node("get_attr", "training")
                here = flag
            elif (twins.get(there) is not here) if isinstance(here, fx.Node) else (here != there):
                raise different
            merged.append(here)
        values = iter(merged)
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda leaf, values=values: next(values))
    return graph, tracer.modules


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def same_target(model, node, before):
    """Whether two nodes call the same; a tensor made while tracing has another name in each trace."""
    if all(CONSTANT in str(target) for target in (node.target, before.target)):
        return same(attribute(model, node.target), attribute(model, before.target))
    return node.target == before.target


def attribute(model, path):
    return operator.attrgetter(path)(model)


def same(one, other):
    """Whether two tensors are equal bit for bit; on the meta device, where there are no bits, in shape and dtype."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or not one.is_floating_point():
        return one.is_meta or torch.equal(one, other)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


class Recorder(fx.Interpreter):
    """Runs a graph and keeps each node's value, that value's version when it was new, and the FLOPs up to it."""

    def __init__(self, module, graph, counter):
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.counter = counter
        self.values, self.versions, self.flops = {}, {}, {}

    def call_module(self, target, args, kwargs):
        # The graph's own cannot be changed
        args = [list(value) if isinstance(value, list) else value for value in args]
        return super().call_module(target, args, kwargs)

    def run_node(self, node):
        value = self.values[node] = super().run_node(node)
        self.versions[node] = value._version if isinstance(value, torch.Tensor) else None
        self.flops[node] = self.counter.get_total_flops()
        return value


class Flow:
    """What of the input is alive where in ``model``'s forward. ``nodes``, in order; ``position``: {node: place among
    them}; ``dependent``: nodes that depend on the input; ``names``: {node: its names, the shortest path first};
    ``crossing``: {dependent node that is used later: other such nodes alive after it}.
    """

    def __init__(self, model, opened=()):
        self.model, self.kind, self.opened = model, type(model).__name__, frozenset(opened)
        self.graph, modules = trace(model, self.opened)
        self.nodes = list(self.graph.nodes)
        self.position = {node: position for position, node in enumerate(self.nodes)}
        self.input, self.output = self.nodes[0], self.nodes[-1]
        self.dependent, self.crossing, alive = {self.input}, {}, []
        for position, node in enumerate(self.nodes):
            if any(source in self.dependent for source in node.all_input_nodes):
                self.dependent.add(node)
            alive = [other for other in alive if self.last_use(other) > position]
            if node in self.dependent and self.last_use(node) > position:
                self.crossing[node] = list(alive)
                alive.append(node)
        self.names = self.name(modules)

    def last_use(self, node):
        return max(map(self.position.get, node.users), default=-1)

    def name(self, modules):
        """{node: names}: paths of the modules whose output it is, else the function called, with (). The second of a
        name has #2 behind it.
        """
        names, times = {self.input: ["the input"], self.output: ["the output"]}, Counter()
        for node in self.nodes[1:-1]:
            paths = sorted(modules.get(node, []), key=lambda path: path.count("."))
            if not paths and node.target is operator.getitem and isinstance(node.args[1], int):
                paths = [f"{names[node.args[0]][0]}[{node.args[1]}]"]
            elif not paths:
                inside = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
                paths = [".".join([*inside[-1:], f"{function}()"])]
            times.update(paths)
            names[node] = [path if times[path] == 1 else f"{path}#{times[path]}" for path in paths]
        return names

    def spine(self):
        """The modules after which only their own output is alive: their nodes."""
        return [node for node, others in self.crossing.items() if node.op == "call_module" and not others]

    @torch.no_grad()
    def record(self, example):
        """Runs the graph on ``example`` in both modes, which updates the model's buffers. Notes the ``values`` at each
        node in eval mode, the ``flops`` up to it in train mode (where attention takes no path that is not counted), and
        in ``mutated`` the nodes whose value a later one changes in place.
        """
        module, self.example, self.mutated = fx.GraphModule(self.model, self.graph), example, set()
        for training in (True, False):
            module.train(training)
            with FlopCounterMode(display=False) as counter:
                recorder = Recorder(module, self.graph, counter)
                try:
                    self.logits = recorder.run(example.clone())
                except Exception as error:  # whatever a model raises
                    raise Untraceable(f"does not run as traced ({first_line(error)})") from error
            self.values = recorder.values
            self.flops = recorder.flops if training else self.flops
            for node, version in recorder.versions.items():
                if version is not None and self.values[node]._version != version:
                    self.mutated.add(node)
        self.uses = self.parameters()
        self.learnt = [  # for each position, where the next parameter has had its last use
            min((last for first, last in self.uses.values() if first >= position), default=len(self.nodes) + 1)
            for position in range(len(self.nodes) + 1)
        ]
        return self

    def parameters(self):
        """{parameter: (first, last) position of a dependent node that uses it}."""
        uses, used = {}, {}
        for position, node in enumerate(self.nodes):
            used[node] = set().union(*(used[source] for source in node.all_input_nodes if source not in self.dependent))
            if node.op == "call_module":
                used[node].update(self.model.get_submodule(node.target).parameters())
            elif node.op == "get_attr" and isinstance(value := attribute(self.model, node.target), nn.Parameter):
                used[node].add(value)
            if node in self.dependent:
                uses |= {parameter: (uses.get(parameter, (position,))[0], position) for parameter in used[node]}
        return uses

    def learns(self, below, above):
        """Whether a parameter is used behind position ``below`` and up to ``above``, and only there."""
        return self.learnt[below + 1] <= above

    def obstacle(self, node):
        """Why the network cannot be cut after ``node``; None where it can."""
        if node not in self.crossing or node is self.input or self.output in node.users:
            return "no layer above it depends on it" if node is not self.input else "it is the input"
        if self.crossing[node]:
            return f"{listing(self.names[other][0] for other in self.crossing[node])} crosses there, too"
        value, batch = self.values[node], len(self.values[self.input])
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            return "it is no floating-point tensor (B, …)"
        if len(value) != batch:
            return f"its shape {tuple(value.shape)} does not begin with the batch size {batch}"
        if node in self.mutated:
            return "a layer above changes it in place: cut behind that one"
        position = self.position[node]
        for parameter, (first, last) in self.uses.items():
            if first <= position < last:
                name = next(name for name, value in self.model.named_parameters() if value is parameter)
                return f"{name} is used on both sides of it"
        sides = {"below": (0, position), "above": (position, len(self.nodes))}
        return next(
            (f"there is nothing to learn {side} it" for side, span in sides.items() if not self.learns(*span)), None
        )


def expand(model):
    """The Flow of ``model``, its modules opened as far as there are cuts inside. Raises Untraceable."""

    @functools.cache
    def traceable(path):
        module = model.get_submodule(path)
        whole = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
        try:
            return not whole and next(module.children(), None) is not None and bool(trace(module))
        except Untraceable:
            return False

    def opens(node):
        """Whether the module called at ``node`` may be opened: it has one input, children, and a forward to trace."""
        return len(node.args) == 1 and not node.kwargs and traceable(node.target)

    flow, whole = Flow(model), set()
    while candidates := {node.target for node in flow.spine() if node.target not in whole and opens(node)}:
        trial = Flow(model, flow.opened | candidates)
        found = {
            path
            for node in trial.spine()
            for path in candidates
            if node.target.startswith(path + ".") and (path not in trial.names[node] or opens(node))
        }
        whole |= candidates - found
        if found:
            flow = trial if found == candidates else Flow(model, flow.opened | found)
    return flow


def listing(names, most=8):
    """The first names, with commas between them, and how many there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
