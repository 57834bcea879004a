"""Cuts any network into modules for DGL. The modules are the model's own layers, trained in place. Each gets an
auxiliary network, except the last, which keeps the model's own head.
"""

import copy
import itertools
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from decoupled.errors import InputError, first_line
from decoupled.networks.auxiliary import auxiliary_for
from decoupled.networks.body import make_bodies
from decoupled.networks.choose_cuts import GUIDE, choose_balanced, explain_shared, find_named
from decoupled.networks.graph import listing
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, eval_mode
from decoupled.networks.per_token_auxiliary import per_token_auxiliary
from decoupled.networks.places import trace_model
from decoupled.networks.tracing import Untraceable, logits_of

LAYOUTS = ("channels_first", "channels_last")
UNBALANCED = 1.5  # warn if the largest module has more than this many times an equal share of the FLOPs


def cuts(model, example_input):
    """Where ``model`` can be cut: a pandas data frame indexed by name, in order from the input.

    A name is the path of the module that the cut follows or, with (), of a function in a forward. Columns: shape, the
    shape of the representation of one input; flops, the share of the model's FLOPs below the cut. Arguments and errors
    are those of decouple; ``model`` is not changed.
    """
    traced = trace_examined(examine(model, example_input))
    total = max(1, traced.end.flops)
    rows = [(place.name, place.shape, place.flops / total) for place in traced.places.values()]
    return pd.DataFrame(rows, columns=["cut", "shape", "flops"]).set_index("cut")


def decouple(
    model, example_input, *, splits=None, at=None, classes=None, auxiliary=None, layout=None, **auxiliary_options
):
    """Cuts ``model`` into a DecoupledNetwork: into ``splits`` modules of about equal FLOPs, or after the places named
    ``at`` (see cuts).

    The modules are made of the model's own parts: training them trains the model in place, whose forward, state_dict
    and pretrained weights stay as they were. The last module's body has the model's own head; its auxiliary is an
    identity.
      model          any module that maps a tensor (B, …) to logits (B, classes), or (B, N, classes) for sequences, or
                     to an object or dictionary with such ``logits``. Other arguments keep their defaults
      example_input  a batch of inputs, on the model's device; two are used. On the meta device nothing is computed, and
                     only shapes are checked
      classes        number of classes of the model's head, checked; by default read from it
      auxiliary      mlp, mlp-sr (the default) or cnn, with ``auxiliary_options`` (decoupled.networks.auxiliary); for
                     sequences linear or mlp (the default), which classify each token (per_token_auxiliary); or a
                     callable: (shape of the representation without B, classes, **auxiliary_options) → module that
                     returns logits of the model's shape
      layout         of the representations: channels_first, (B, C, h, w), or channels_last, (B, h, w, C) and (B, N, C);
                     needed only where shapes do not tell: maps of square inputs are square, rank 3 is tokens (B, N, C)
    With ``splits``, the largest module has as few forward FLOPs as possible (auxiliaries not counted), or up to 10 %
    more where cuts between larger parts of the model then suffice. Checked at each call: the modules together compute
    what the model does, bit for bit, in train and in eval mode, batch norm's buffers included, and no two share a
    parameter.

    An output layer tied to the embedding gets a copy of the shared matrix, in ``model`` too. Warns about this, about
    unbalanced modules, and about hooks that will not fire. Raises InputError where the model cannot be traced or cut.

    Moving the network to a device moves the model's parameters; ``model.to(device)`` then moves the rest of the model.
    """
    if (splits is None) == (at is None):
        raise InputError("decouple needs either splits=K, the number of modules, or at=[names], where to cut")
    if splits is not None and (not isinstance(splits, int) or splits < 1):
        raise InputError(f"splits must be an integer ≥ 1, not {splits!r}")
    if layout not in (None, *LAYOUTS):
        raise InputError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    model = original_of_compiled(model)
    examined = examine(model, example_input)
    if classes not in (None, examined.classes):
        build = f"build the model with {classes}"
        raise InputError(f"the head of {examined.class_name} has {examined.classes} classes, not {classes}: {build}")
    traced = trace_examined(examined)
    if at is None:
        places = choose_balanced(examined.class_name, traced, splits)
    else:
        places = find_named(examined.class_name, traced, [at] if isinstance(at, str) else at)
    cut = traced.cut(places)
    check(examined, traced, cut)
    auxiliaries = [auxiliary_after(place, examined, traced, auxiliary, layout, auxiliary_options) for place in places]
    if at is None:
        warn_if_unbalanced(examined.class_name, traced, places)
    warn_of_silent_hooks(model, examined.class_name, cut)
    if places:
        untie(model, examined.tied)
        warn_of_untied(examined.tied)
    bodies = make_bodies(cut.graphs, model, constants=traced.model)
    heads = [*auxiliaries, nn.Identity()]
    return DecoupledNetwork(DecoupledModule(body, head) for body, head in zip(bodies, heads, strict=True))


# The model and its input


class Examined(NamedTuple):
    """A model to be cut, and what it returns for an example."""

    class_name: str
    twin: nn.Module  # a copy of the model, to trace and to run
    inputs: torch.Tensor  # two
    logits: torch.Tensor  # of the inputs, in eval mode
    returns_object: bool  # whether logits are an entry or attribute of what the model returns
    tied: dict  # {name of a parameter of a head: name of the embedding's that it shared}

    @property
    def classes(self):
        """The number of classes of logits (B, classes), (B, N, classes) or (B, classes, h, w)."""
        return self.logits.shape[1 if self.logits.dim() == 4 else -1]


def original_of_compiled(model):
    """The model that was given to torch.compile, if ``model`` is compiled; else ``model``."""
    return getattr(model, "_orig_mod", model)


def examine(model, example_input):
    """Copies ``model`` and runs the copy on two inputs in eval mode. Raises InputError."""
    if not isinstance(example_input, torch.Tensor) or example_input.dim() < 2 or len(example_input) == 0:
        raise InputError("example_input must be a batch of inputs: a tensor (B, …)")
    model = original_of_compiled(model)
    class_name = type(model).__name__
    pair = example_input if len(example_input) > 1 else torch.cat([example_input] * 2)
    inputs = pair[:2].clone()
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:
        raise InputError(
            f"{class_name} contains tensors with an autograd history: cut the model before it runs, or build it again"
        ) from error
    for module in twin.modules():
        module._compiled_call_impl = None  # set by model.compile(): each mode would be compiled to run once
    tied = find_tied(twin)
    untie(twin, tied)
    with torch.no_grad(), eval_mode(twin), seeded(inputs):
        try:
            output = twin(inputs.clone())
        except Exception as error:  # a model may raise anything
            raise InputError(f"{class_name} fails on inputs {tuple(inputs.shape)}: {first_line(error)}") from error
    logits = logits_of(output)
    if not isinstance(logits, torch.Tensor):
        returned = f"a {type(output).__name__} without logits"
        raise InputError(
            f"{class_name} returns {returned}: it must return logits (B, classes), or an object that has them"
        )
    if logits.dim() < 2 or len(logits) != len(inputs):
        raise InputError(f"{class_name} returns {tuple(logits.shape)}, not logits (B, classes) of {len(inputs)} inputs")
    returns_object = not isinstance(output, torch.Tensor)
    return Examined(class_name, twin, inputs, logits, returns_object, tied)


def trace_examined(examined):
    """The TracedModel of an Examined model. Raises InputError."""
    try:
        with seeded(examined.inputs):
            return trace_model(examined.twin, examined.inputs, examined.returns_object)
    except Untraceable as error:
        raise InputError(f"the forward of {examined.class_name} {error}. {GUIDE}") from error


@contextmanager
def seeded(inputs):
    """Fixes the random seed inside the block, and restores the state of the random number generators afterwards."""
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        torch.manual_seed(0)
        yield


def find_tied(model):
    """{name of a parameter: name of the embedding's parameter that it is}, as in language models whose head is the
    embedding.
    """
    embeddings = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings[module.weight] = f"{path}.weight"
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter in embeddings and not isinstance(owner, nn.Embedding):
            tied[name] = embeddings[parameter]
    return tied


def untie(model, names):
    """Replaces the parameters called ``names`` with copies."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        shared = getattr(owner, attribute)
        setattr(owner, attribute, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))


def warn_if_unbalanced(class_name, traced, places):
    """Warns if one module has far more than its share of the FLOPs: then none of the others can be large."""
    ends = [traced.start, *places, traced.end]
    flops = [high.flops - low.flops for low, high in itertools.pairwise(ends)]
    largest = flops.index(max(flops))
    share = flops[largest] / max(1, traced.end.flops)
    if share > UNBALANCED / len(flops):
        between = f"between {ends[largest].name} and {ends[largest + 1].name}"
        module = (
            f"module {largest + 1} of {len(flops)}, {between}, has {100 * share:.0f} % of the FLOPs of {class_name}"
        )
        warnings.warn(module + explain_shared(traced, ends[largest], ends[largest + 1]), stacklevel=3)


def warn_of_untied(tied):
    for name, embedding in tied.items():
        warnings.warn(
            f"{name} was {embedding}, which is in another module: it is a separate copy now, in the model as well",
            stacklevel=3,
        )


def warn_of_silent_hooks(model, class_name, cut):
    silent = []
    for path, module in model.named_modules():
        forward = module._forward_hooks or module._forward_pre_hooks
        backward = module._backward_hooks or module._backward_pre_hooks
        if path in cut.opened and (forward or backward):
            silent.append(path or class_name)
    if silent:
        warnings.warn(
            f"hooks on {listing(silent)} will not fire: their modules are not called, only the parts",
            stacklevel=3,
        )


# Checks of the result


def run_modules(modules, inputs, training):
    """The logits of a list of modules called one after the other, in that mode, with the same random numbers in each
    call.
    """
    with seeded(inputs):
        value = inputs.clone()
        for module in modules:
            value = module.train(training)(value)
        return logits_of(value).detach()


def check(examined, traced, cut):
    """Raises InputError unless the modules of ``cut`` compute what the model does and share no parameter."""
    bodies = make_bodies(cut.graphs, examined.twin, constants=traced.model)
    check_outputs(bodies, examined, traced)
    check_parameters(bodies)


def check_outputs(bodies, examined, traced):
    """Raises InputError unless ``bodies`` together compute the model's logits and buffers, in both modes."""
    twin = examined.twin
    initial_buffers = [buffer.clone() for buffer in twin.buffers()]
    for training in (True, False):
        outcomes = []
        for modules in ([twin], bodies):
            restore(twin.buffers(), initial_buffers)
            # torch.export records with gradients on; without them some layers of the model call fused kernels that
            # round differently
            with torch.set_grad_enabled(training or not traced.calls_modules):
                logits = run_modules(modules, examined.inputs, training)
            outcomes.append([logits, *(buffer.clone() for buffer in twin.buffers())])
        if not all(map(is_same, *outcomes)):
            mode = "train" if training else "eval"
            raise InputError(
                f"cut, {examined.class_name} does not compute the same in {mode} mode: its forward depends on values "
                f"that were fixed while it was traced. {GUIDE}"
            )


def check_parameters(bodies):
    """Raises InputError if two of ``bodies`` share a parameter."""
    owners = {}
    for index, body in enumerate(bodies):
        for name, parameter in body.named_parameters():
            if owners.setdefault(parameter, index) != index:
                raise InputError(f"{name} is used in modules {owners[parameter] + 1} and {index + 1}. {GUIDE}")


@torch.no_grad()
def restore(buffers, values):
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def is_same(one, other):
    """Whether two tensors are equal, NaNs included; on the meta device, whether their shape and dtype are."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta:
        return True
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def auxiliary_after(place, examined, traced, auxiliary, layout, options):
    """The auxiliary network for the representation at ``place``. Raises InputError."""
    value = traced.eval.values[traced.eval.named[place.name]]
    if callable(auxiliary):
        net = auxiliary(place.shape, examined.classes, **options)
    elif examined.logits.dim() == 2:
        layout = layout or guess_layout(traced, place)
        net = auxiliary_for(auxiliary or "mlp-sr", place.shape, layout, examined.classes, **options)
    elif examined.logits.dim() == 3:
        net = per_token_auxiliary(auxiliary or "mlp", place.shape, examined.classes, **options)
    else:
        shape = ", ".join(map(str, examined.logits.shape[1:]))
        raise InputError(
            f"logits have the shape (B, {shape}): pass auxiliary=, a callable (shape, classes) → module. {GUIDE}"
        )
    net = net.to(value.device, value.dtype)
    with torch.no_grad(), eval_mode(net), seeded(value):
        given = value.clone()
        version = given._version
        logits = net(given)
    if given._version != version:
        raise InputError(
            f"the auxiliary after {place.name} changes the representation, which the layers above read, too: give its "
            "first layer inplace=False"
        )
    if logits.shape != examined.logits.shape:
        expected = tuple(examined.logits.shape)
        raise InputError(f"the auxiliary after {place.name} returns {tuple(logits.shape)}, not {expected}")
    return net


def guess_layout(traced, place):
    """The layout that the shape at ``place`` implies or, if that is ambiguous, the layout that the other places imply.
    Raises InputError if none does.
    """
    images = traced.example
    square = images.dim() != 4 or images.shape[2] == images.shape[3]
    maps = [other for other in traced.places.values() if len(other.shape) == 3]
    others = {implied_layout(other.shape, square) for other in maps} - {None}
    layout = implied_layout(place.shape, square)
    if layout is None and len(others) == 1:
        layout = others.pop()
    if layout is None:
        where = f"the shape {place.shape} after {place.name}"
        raise InputError(f"{where} does not tell channels from space: pass layout={' or '.join(LAYOUTS)}")
    return layout


def implied_layout(shape, square):
    """The layout of representations (B, *shape), or None if ambiguous. ``square``: whether maps are square."""
    if len(shape) != 3:
        return "channels_last"
    first, middle, last = shape
    if not square or (first == middle) == (middle == last):  # ambiguous: all sides equal, or no two neighbors
        return None
    return "channels_last" if first == middle else "channels_first"
