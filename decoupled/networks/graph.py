"""A model's forward as a graph: what each step computes and costs, which values are still needed after it, and the
steps between two cuts.
"""

import operator
from collections import Counter
from typing import NamedTuple

import torch
from torch import fx, nn

from decoupled.errors import first_line
from decoupled.networks.body import attribute
from decoupled.networks.flops import flop_counter
from decoupled.networks.tracing import Untraceable, follow_device

SIZE = torch.ops.aten.sym_size.int  # how torch.export records x.shape[dimension]

# Names of the two ends
INPUT = "the input"
OUTPUT = "the output"


class Obstacle(NamedTuple):
    """The reason why a model cannot be cut at a place."""

    text: str
    reads_input: bool = False  # the layers above also need the input
    shared: bool = False  # parameters are used on both sides


class Recorder(fx.Interpreter):
    """Runs a graph and records each node's value, the version of that value when it was new, and the FLOPs up to the
    node.
    """

    def __init__(self, model, graph, counter):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.counter = counter
        self.values = {}
        self.versions = {}
        self.flops = {}

    def call_module(self, target, args, kwargs):
        # A module may change a list that it receives, but the graph's own lists are immutable
        args = [list(value) if isinstance(value, list) else value for value in args]
        return super().call_module(target, args, kwargs)

    def run_node(self, node):
        value = super().run_node(node)
        self.values[node] = value
        self.versions[node] = value._version if isinstance(value, torch.Tensor) else None
        self.flops[node] = self.counter.get_total_flops()
        return value


class ForwardGraph:
    """The graph of a model's forward in one mode.

    nodes      in order
    position   {node: index among them}
    dependent  the nodes whose value depends on the input's values, not on its sizes alone
    crossing   {node: the earlier dependent nodes whose values are also needed after it}, for each dependent node that
               is used later. Only after a node with [] does one tensor carry everything
    names      {node: its names, the shortest path first}
    named      {name: node}
    uses       {parameter: where it is used} (find_uses)
    changes    {node: what changes its value in place} (find_changes)

    After record() also:

    values     {node: its value for the example}
    flops      {node: FLOPs of the model up to it}
    mutated    the nodes whose value a later one changes in place
    """

    def __init__(self, model, trace):
        self.model = model
        self.trace = trace
        self.nodes = list(trace.graph.nodes)
        self.position = {node: position for position, node in enumerate(self.nodes)}
        self.input = next(node for node in self.nodes if node.op == "placeholder")
        self.output = self.nodes[-1]
        self.dependent = self.find_dependent()
        self.crossing = self.find_crossing()
        self.names = self.find_names()
        self.named = {name: node for node in self.nodes for name in self.names[node]}
        self.uses = self.find_uses()
        self.changes = self.find_changes()
        self.values = None
        self.flops = None
        self.mutated = None

    def find_dependent(self):
        dependent = {self.input}
        for node in self.nodes:
            if node.target is SIZE:
                continue
            if is_random(node) or any(other in dependent for other in node.all_input_nodes):
                dependent.add(node)
        return dependent

    def last_use(self, node):
        """Position of the last node that uses the value of ``node`` and not only its sizes."""
        positions = [self.position[user] for user in node.users if user.target is not SIZE]
        return max(positions, default=-1)

    def find_crossing(self):
        crossing = {}
        alive = []
        for position, node in enumerate(self.nodes):
            alive = [other for other in alive if self.last_use(other) > position]
            if node in self.dependent and self.last_use(node) > position:
                crossing[node] = list(alive)
                alive.append(node)
        return crossing

    def skipping(self, node):
        """The dependent nodes before ``node`` whose values are also used after it, as in a skip connection."""
        position = self.position[node]
        return [other for other in self.dependent if self.position[other] < position < self.last_use(other)]

    def find_names(self):
        """{node: names}: the paths of the modules whose output it is, or else the function called, with (). The second
        node with the same name gets the suffix #2.
        """
        names = {}
        times = Counter()
        for node in self.nodes:
            if is_only_item(node):
                names[node] = names[node.args[0]]
                continue
            paths = sorted(self.trace.module_ends.get(node, []), key=lambda path: path.count("."))
            if not paths:
                paths = [self.name_call(node, names)]
            times.update(paths)
            names[node] = [path if times[path] == 1 else f"{path}#{times[path]}" for path in paths]
        names[self.input] = [INPUT]
        names[self.output] = [OUTPUT]
        return names

    def name_call(self, node, names):
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return f"{names[node.args[0]][0]}[{node.args[1]}]"
        function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
        function = function.split(".")[0]
        scope = self.trace.scopes[node]
        return f"{scope}.{function}()" if scope else f"{function}()"

    def find_uses(self):
        """{parameter: (first, last) position of a dependent node that uses it, or uses something computed from it}."""
        uses = {}
        used = {}
        for position, node in enumerate(self.nodes):
            used[node] = set()
            for source in node.all_input_nodes:
                if source not in self.dependent:
                    used[node].update(used[source])
            if node.op == "call_module":
                used[node].update(self.model.get_submodule(node.target).parameters())
            elif node.op == "get_attr":
                value = attribute(self.model, node.target)
                if isinstance(value, nn.Parameter):
                    used[node].add(value)
            if node in self.dependent:
                for parameter in used[node]:
                    first, _ = uses.get(parameter, (position, position))
                    uses[parameter] = (first, position)
        return uses

    def below(self, node):
        """The parameters used up to ``node``."""
        return {parameter for parameter, (first, _) in self.uses.items() if first <= self.position[node]}

    def above(self, node):
        """The parameters used after ``node``."""
        return {parameter for parameter, (_, last) in self.uses.items() if last > self.position[node]}

    @torch.no_grad()
    def record(self, example, training):
        """Runs the graph on ``example`` to set ``values``, ``flops`` and ``mutated``. Updates the model's buffers."""
        self.model.train(training)
        with flop_counter() as counter:
            recorder = Recorder(self.model, self.trace.graph, counter)
            try:
                recorder.run(example.clone())
            except Exception as error:  # a model may raise anything
                raise Untraceable(f"cannot be run as traced: {first_line(error)}") from error
        self.values = recorder.values
        self.flops = self.weigh_uncounted(recorder.flops, len(example))
        self.mutated = set()
        for node, version in recorder.versions.items():
            if version is not None and self.values[node]._version != version:
                self.mutated.add(node)

    def weigh_uncounted(self, flops, samples):
        """``flops`` up to each node. A step that has matrices of parameters and no formula counts 2 for each of their
        elements and each sample.
        """
        weighed = {}
        extra = 0
        before = 0
        for node in self.nodes:
            if node in self.dependent and flops[node] == before and not looks_up(self.model, node):
                extra += 2 * samples * sum(value.numel() for value in self.matrices(node))
            before = flops[node]
            weighed[node] = flops[node] + extra
        return weighed

    def matrices(self, node):
        parameters = set()
        if node.op == "call_module":
            parameters.update(self.model.get_submodule(node.target).parameters())
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                parameters.add(attribute(self.model, source.target))
        return [value for value in parameters if isinstance(value, nn.Parameter) and value.dim() > 1]

    def obstacle(self, node):
        """The Obstacle to a cut after ``node``, apart from parameters; None if there is none."""
        if node is self.input:
            return Obstacle("it is the input")
        if node not in self.crossing or self.output in node.users:
            return Obstacle("no later layer depends on it")
        crossing = self.crossing[node]
        if crossing:
            others = listing(self.describe(other) for other in crossing)
            return Obstacle(f"the layers above it also need {others}", reads_input=self.input in crossing)
        value = self.values[node]
        batch = len(self.values[self.input])
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            return Obstacle("it is not a floating-point tensor (B, …)")
        if len(value) != batch:
            return Obstacle(f"its shape {tuple(value.shape)} does not begin with the batch size {batch}")
        if node in self.mutated:
            return Obstacle("a layer above changes it in place: cut after that one")
        if self.lost_sizes(node):
            return Obstacle("the layers above need a size of the input that its own shape does not have")
        return None

    def describe(self, node):
        """Describes ``node`` in terms of the user's code."""
        if node is self.input:
            users = sorted(node.users, key=self.position.get)
            return f"the input (read again at {self.trace.lines.get(users[-1]) or self.names[users[-1]][0]})"
        name = self.names[node][0]
        line = self.trace.lines.get(node)
        return f"{name} [{line}]" if line and name.endswith("()") else name

    def lost_sizes(self, node):
        """The nodes that read a size of the input which is needed above ``node`` and cannot be read from the shape of
        its value.
        """
        untold = [size for size in self.nodes if size.target is SIZE and size_in(size, node) is None]
        if not untold:
            return []
        needed = self.needed(self.nodes[self.position[node] + 1 :])
        return [size for size in untold if size in needed and self.position[size.args[0]] < self.position[node]]

    def steps_between(self, start, end):
        """The graph of the steps between two nodes. Its input stands for the value of ``start``."""
        span = self.nodes[self.position[start] + 1 : self.position[end] + 1]
        needed = self.needed(span)
        graph = fx.Graph()
        copies = {start: graph.placeholder("representation")}
        for node in self.nodes:
            if node not in needed:
                continue
            if node.target is SIZE and node.args[0] not in copies:
                copies[node] = graph.call_function(SIZE, (copies[start], size_in(node, start)))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        if end is not self.output:
            graph.output(copies[end])
        follow_device(graph)
        return graph

    def needed(self, span):
        """The nodes for the steps in ``span``, with those that compute what these steps need independently of the
        input's values: they are computed again in each module that uses them.
        """
        needed = {node for node in span if node in self.dependent or not node.users}  # in-place calls may have no users
        unseen = list(needed)
        while unseen:
            for source in unseen.pop().all_input_nodes:
                if source in self.dependent:
                    continue
                for node in (source, *self.changes.get(source, [])):
                    if node not in needed:
                        needed.add(node)
                        unseen.append(node)
        return needed

    def find_changes(self):
        """{computed node: later nodes that change its value in place}, for nodes that are not dependent."""
        changes = {}
        for node in self.nodes:
            schema = getattr(node.target, "_schema", None)
            if node in self.dependent or schema is None or not schema.is_mutable:
                continue
            if not isinstance(node.args[0], fx.Node):
                continue
            sources = []
            changed = node.args[0]
            while changed.all_input_nodes:  # the changed value may be a view
                sources.append(changed)
                changed = changed.all_input_nodes[0]
            if changed.op != "get_attr":  # the model's own, which change but once
                for source in (*sources, changed):
                    changes.setdefault(source, []).append(node)
        return changes


def is_only_item(node):
    """Whether ``node`` is the only item used of the tuple that a layer returns."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1


def is_random(node):
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def looks_up(model, node):
    """Whether ``node`` only looks up rows of its parameters and computes nothing with them."""
    if node.op == "call_module":
        return isinstance(model.get_submodule(node.target), (nn.Embedding, nn.EmbeddingBag))
    return node.target in (torch.ops.aten.embedding.default, nn.functional.embedding)


def size_in(size, node):
    """The dimension of ``node``'s value whose size the node ``size`` reads; None if there is none."""
    for dimension, length in enumerate(node.meta["val"].shape):
        if str(length) == str(size.meta["val"]):
            return dimension
    return None


def listing(names, most=8):
    """The first few names, separated by commas, and the total number if there are more."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
