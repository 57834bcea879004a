"""The part of a model between two cuts, as a module built from the model's own modules."""

import importlib
import linecache
import operator
from collections import Counter
from itertools import count
from types import ModuleType

import torch
from torch import nn

from decoupled.networks.tracing import CONSTANT_PREFIX, names_of_tensors

NUMBERS = count(1)


class Body(nn.Module):
    """The steps of a model's forward between two cuts: (B, …) → (B, …), in train and in eval mode.

    Its submodules, parameters and buffers are the model's own and keep their names. The steps are two Python functions
    written by torch.fx; ``code`` shows them.
    """

    def __init__(self, graphs):
        """``graphs``: {True: the graph in train mode, False: the graph in eval mode}."""
        super().__init__()
        self._sources = {}
        self._names = {}
        self._imports = {}  # not with the other names: Python modules cannot be pickled
        for training, graph in graphs.items():
            code = graph.python_code("self")
            self._sources[training] = code.src
            self._names[training] = {}
            self._imports[training] = {"torch": "torch"}
            for name, value in code.globals.items():
                if isinstance(value, ModuleType):
                    self._imports[training][name] = value.__name__
                else:
                    self._names[training][name] = value
        self.compile_steps()

    def compile_steps(self):
        self._steps = {}
        for training, source in self._sources.items():
            filename = f"<decoupled body {next(NUMBERS)}>"
            linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
            names = dict(self._names[training])
            for name, module in self._imports[training].items():
                names[name] = importlib.import_module(module)
            exec(compile(source, filename, "exec"), names)
            self._steps[training] = names["forward"]

    def forward(self, representation):
        return self._steps[self.training](self, representation)

    @property
    def code(self):
        """The source of the forward in train mode and in eval mode."""
        return f"# train mode\n{self._sources[True]}\n# eval mode\n{self._sources[False]}"

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["_steps"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.compile_steps()


def make_bodies(graphs, model, constants):
    """A Body for each of ``graphs``, [{training: graph}, …], with the modules and tensors of ``model``. Names that
    begin with CONSTANT_PREFIX are attributes of ``constants``, a copy of ``model``.
    """
    names_of_bodies = [called_names(pair) for pair in graphs]
    times_used = Counter()
    for names in names_of_bodies:
        times_used.update(names)
    remembered = set(model.state_dict())
    bodies = []
    for pair, names in zip(graphs, names_of_bodies, strict=True):
        own_names = {name for name in names if times_used[name] == 1}
        body = Body(pair)
        parts = {}
        for name in names:
            value = attribute(constants if name.startswith(CONSTANT_PREFIX) else model, name)
            path = highest_module(model, name, own_names)
            if path and isinstance(value, torch.Tensor):
                parts[path] = model.get_submodule(path)
            else:
                parts[name] = value
        for path, part in parts.items():  # in call order
            if not is_inside(path, parts):
                attach(body, path, part, persistent=path in remembered)
        body.training = model.training
        bodies.append(body)
    return bodies


def called_names(graphs):
    """The names of the modules and tensors that ``graphs``, {training: graph}, call and get, in order, without
    repetitions.
    """
    names = {}
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                names[node.target] = None
    return list(names)


def ancestors(path):
    """The paths that contain ``path``, outermost first: a.b.c → a, a.b."""
    names = path.split(".")[:-1]
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def is_inside(path, modules):
    """Whether one of the paths in ``modules`` contains ``path``."""
    return any(parent in modules for parent in ancestors(path))


def highest_module(model, name, own):
    """The path of the outermost module that contains the tensor ``name`` and only tensors in ``own``, or ""."""
    for path in ancestors(name):  # constants have none
        module = model.get_submodule(path)
        if all(f"{path}.{key}" in own for key in names_of_tensors(module)):
            return path
    return ""


def attach(root, path, value, persistent=True):
    """Sets ``value``, a module, parameter or tensor, as the attribute of ``root`` at the dotted ``path``."""
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner._modules[parent]
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        owner.register_buffer(name, value, persistent=persistent)
    else:
        setattr(owner, name, value)


def attribute(model, path):
    return operator.attrgetter(path)(model)
