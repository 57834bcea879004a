"""The steps of a model's forward in one mode, train or eval, as a graph. Two tracers give the same kind of Trace:

- torch.fx calls the forward with a stand-in for the input. PyTorch's modules, and those that cannot be traced, stay
  whole: one step each. It is fast, and what it gives still calls the model's own modules.
- torch.export runs the forward on an example and records every operator. It follows nearly all Python code, takes
  longer, and what it gives calls operators on the model's parameters.
"""

import copy
import operator
import os
import random
import re
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from decoupled.errors import first_line

# PyTorch's modules whose forward calls layers one after the other
CONTAINERS = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)

# Operators that torch.export records but that compute nothing: assertions about sizes, types and devices
ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")

CONSTANT_PREFIX = "_decoupled_constant"  # of the traced copy's attributes for a graph's constants


class Untraceable(Exception):
    """A forward that cannot be traced. The message is a predicate, to which callers add a subject: "cannot be traced
    past net.py:12 (…)".
    """


class Trace(NamedTuple):
    """A model's forward in one mode. Names in the graph are those of the model's own modules and tensors, or begin with
    CONSTANT_PREFIX.
    """

    graph: fx.Graph  # one input, "representation"; its output is the logits
    module_ends: dict  # {node: paths of the modules whose output it is}
    scopes: dict  # {node: path of the module whose forward made it}
    lines: dict  # {node: the line of the user's code that made it, as "file.py:12"}
    whole: dict  # {path: why a module had to stay whole, an Untraceable}


def is_internal(filename):
    """Whether a Python file belongs to PyTorch, the standard library or this package, and not to the user."""
    folder = os.path.dirname(filename)
    if folder in (os.path.dirname(__file__), os.path.dirname(os.__file__)):
        return True
    return filename.startswith((os.path.dirname(torch.__file__) + os.sep, "<"))


def line_of_error(error):
    """The last line of the user's code in the traceback of ``error``, as "file.py:12 (its code)", or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_internal(frame.filename):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} ({frame.line})"
    return ""


def current_line():
    """The line of the user's code that is running, as "file.py:12"."""
    frame = sys._getframe()
    while frame and is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else ""


def recorded_line(node):
    """The line of the user's code from which torch.export recorded ``node``, as "file.py:12"."""
    for line in reversed((node.stack_trace or "").splitlines()):
        found = re.search(r'File "(.+)", line (\d+)', line)
        if found and not is_internal(found[1]):
            return f"{os.path.basename(found[1])}:{found[2]}"
    return ""


def untraceable(error):
    """``error``, raised by a tracer, as an Untraceable that says where it happened."""
    if isinstance(error, Untraceable):
        return error
    place = line_of_error(error)
    if place:
        return Untraceable(f"cannot be traced past {place}: {first_line(error)}")
    return Untraceable(f"cannot be traced: {first_line(error)}")


@contextmanager
def no_random_numbers(which=("Python", "NumPy", "PyTorch")):
    """Raises Untraceable if the block draws random numbers: traced, they would be constants. Restores the generators'
    states.
    """
    before = random_states()
    try:
        yield
    finally:
        after = random_states()
        if after != before:
            random.setstate(before["Python"])
            np.random.set_state(before["NumPy"])  # noqa: NPY002  the ones that models use
            torch.set_rng_state(torch.tensor(before["PyTorch"], dtype=torch.uint8, device="cpu"))
    for name in which:
        if after[name] != before[name]:
            raise Untraceable(f"draws random numbers of {name} that would be constants when traced")


def random_states():
    """{library: the state of its generator}, without arrays."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "Python": random.getstate(),
        "NumPy": (name, keys.tolist(), *rest),
        "PyTorch": torch.get_rng_state().tolist(),
    }


def logits_of(output):
    """The logits in what a model returns: ``output`` itself, or its entry or attribute ``logits``, or None."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    return getattr(output, "logits", None)


# torch.fx


class ModuleTracer(fx.Tracer):
    """Traces a forward with one input; other arguments keep their defaults. Follows the forward of the modules at the
    paths ``opened`` or, by default, of every module that can be opened and traced. All others are one step each.

    ``returns_object``: the model returns an object with logits. Forward hooks are not traced.
    """

    proxy_buffer_attributes = True  # changes of a buffer belong in the graph

    def __init__(self, returns_object, opened=None):
        super().__init__()
        self.returns_object = returns_object
        self.opened = opened
        self.module_ends = {}
        self.whole = {}
        self.attribute_proxies = {}
        self.lines = {}

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        self.lines[node] = current_line()
        return node

    def is_leaf_module(self, module, path):
        if self.opened is not None:
            return path not in self.opened
        return path in self.whole or not can_be_opened(module)

    def call_module(self, module, forward, args, kwargs):
        path = self.path_of_module(module)
        if self.is_leaf_module(module, path):
            output = super().call_module(module, forward, args, kwargs)
        else:
            output = self.call_opened(module, path, args, kwargs)
        if isinstance(output, fx.Proxy):
            self.module_ends.setdefault(output.node, []).append(path)
        return output

    def call_opened(self, module, path, args, kwargs):
        """Traces the forward of ``module``, or leaves it whole if that fails."""
        last_node = next(iter(reversed(self.graph.nodes)))  # not an iterator in PyTorch 2.9
        calls = dict(self.num_calls)
        stack = dict(self.module_stack)
        lists = [(value, list(value)) for value in args if isinstance(value, list)]
        try:
            with no_random_numbers():
                return super().call_module(module, module.forward, args, kwargs)
        except Exception as error:  # a forward may raise anything when given a stand-in
            if self.opened is not None:
                raise
            self.whole[path] = untraceable(error)
        # Remove all traces of the call
        self.remove_nodes_after(last_node)
        for current, before in ((self.num_calls, calls), (self.module_stack, stack)):
            current.clear()
            current.update(before)
        for value, before in lists:
            value[:] = before
        return super().call_module(module, module.forward, args, kwargs)

    def remove_nodes_after(self, last_node):
        for node in reversed(self.graph.nodes):
            if node is last_node:
                return
            self.module_ends.pop(node, None)
            for name, proxy in list(self.attribute_proxies.items()):
                if proxy.node is node:
                    del self.attribute_proxies[name]
            self.graph.erase_node(node)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        self.attribute_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        def forward(model, representation):
            output = root_fn(model, representation)
            if isinstance(output, fx.Proxy):
                return self.create_proxy("call_function", logits_of, (output,), {}) if self.returns_object else output
            return logits_of(output)

        return forward, [self.root, self.create_proxy("placeholder", "representation", (), {})]


def can_be_opened(module):
    """Whether to trace inside ``module``: it has children and is not one of PyTorch's own layers."""
    if hasattr(module, "_orig_mod"):  # a module returned by torch.compile
        return False
    from_pytorch = type(module).__module__.startswith("torch.nn.")
    if from_pytorch and not isinstance(module, CONTAINERS):
        return False
    return next(module.children(), None) is not None


def trace_with_fx(model, training, returns_object, opened=None):
    """Returns the Trace of ``model`` in train or eval mode. Leaves ``model`` in that mode and may add attributes to it.
    Raises Untraceable.
    """
    model.train(training)
    tracer = ModuleTracer(returns_object, opened)
    try:
        with no_random_numbers():
            graph = tracer.trace(model)
    except Exception as error:  # a forward may raise anything when given a stand-in
        raise untraceable(error) from error
    remove_unused_items(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):  # created in the forward
            store_constant(model, node, getattr(model, node.target), training)
    scopes = {}
    for node in graph.nodes:
        around = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        scopes[node] = around[-1] if around else ""
    return Trace(graph, tracer.module_ends, scopes, tracer.lines, tracer.whole)


def remove_unused_items(graph):
    """Removes the second item of ``output, _ = layer(x)``: with it, the tuple would seem to be needed later."""
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)


def store_constant(model, node, value, training):
    """Stores ``value`` as an attribute of ``model`` under a name that no other Trace uses, and makes the get_attr
    ``node`` read it from there.
    """
    mode = "train" if training else "eval"
    node.target = "_".join([CONSTANT_PREFIX, mode, node.target.replace(".", "_").lstrip("_")])
    if isinstance(value, fx.GraphModule):  # the body of a torch.no_grad() or autocast block
        follow_device(value.graph)
        value.recompile()
    setattr(model, node.target, value)


def follow_device(graph):
    """Replaces the devices in ``graph``, which are those of the example, with the device of its first input."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    if first is None:
        return
    with graph.inserting_after(first):
        device = graph.call_function(getattr, (first, "device"))
    for node in graph.nodes:
        if node is not device:
            arguments = (node.args, node.kwargs)
            node.args, node.kwargs = map_aggregate(
                arguments, lambda value: device if isinstance(value, torch.device) else value
            )
    if not device.users:
        graph.erase_node(device)


# torch.export


class ReturnsLogits(nn.Module):
    """``model`` in the form that torch.export needs: one input, one output tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, representation):
        return logits_of(self.model(representation))


def trace_with_export(model, training, example):
    """Returns the Trace of ``model`` in train or eval mode, for inputs like ``example`` with any batch size and, if
    they are tokens (B, N), any length. May add attributes to ``model``. Raises Untraceable.
    """
    # Export with gradients: without them, PyTorch's layers call operators in eval mode that have no backward pass
    exported = copy.deepcopy(model).train(training)
    for tensor in exported.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    sizes = {0: torch.export.Dim.DYNAMIC}
    if example.dim() == 2 and not example.is_floating_point():
        sizes[1] = torch.export.Dim.AUTO
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            model_with_logits = ReturnsLogits(exported)
            with no_random_numbers(which=("Python", "NumPy")):  # PyTorch's are recorded
                program = torch.export.export(model_with_logits, (example,), dynamic_shapes=(sizes,), strict=False)
            module = program.module()
    except Exception as error:  # a forward may raise anything when given a tensor without values
        if "Constraints violated" in str(error):
            raise Untraceable("has a fixed batch size when traced: write x.shape[0] instead of len(x)") from error
        raise untraceable(error) from error
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    remove_assertions(graph)
    remove_unused_items(graph)
    own_names = names_of_tensors(model)
    for node in graph.nodes:
        if node.op == "get_attr":
            name = node.target.removeprefix("model.")
            if name in own_names:
                node.target = name
            else:
                store_constant(model, node, operator.attrgetter(node.target)(module), training)
    output = graph.output_node()
    (logits,) = output.args[0]
    output.args = (logits,)
    scopes = {node: (modules_around(node) or [""])[-1] for node in graph.nodes}
    lines = {node: recorded_line(node) for node in graph.nodes}
    return Trace(graph, ends_of_modules(graph), scopes, lines, {})


def names_of_tensors(model):
    """The names of all parameters and buffers; a tensor may have several."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def remove_assertions(graph):
    for node in reversed(graph.nodes):
        is_assertion = node.op == "call_function" and getattr(node.target, "_opname", "") in ASSERTIONS
        is_guard = node.op == "call_module"  # the only submodule: it checks that inputs are like the example
        if is_guard or is_assertion:
            graph.erase_node(node)


def modules_around(node):
    """Paths of the modules inside which torch.export recorded ``node``, outermost first: "" is the model itself."""
    paths = []
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        name = path.split("@")[0]
        if name == "model" or name.startswith("model."):
            paths.append(name.removeprefix("model").removeprefix("."))
    return paths


def ends_of_modules(graph):
    """{node: paths of the modules whose last operator it is}."""
    ends = {}
    following = []
    for node in reversed(graph.nodes):
        if isinstance(node.meta.get("val"), torch.Tensor) and node.op == "call_function":
            around = modules_around(node)
            finished = [path for path in around if path not in following]
            ends[node] = [path for path in reversed(finished) if path]
            following = around
    return ends
