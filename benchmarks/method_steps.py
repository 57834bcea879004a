"""What the benchmarks measure: one training step of each method on one mini-batch, as its script takes it, no meters.

A step takes the network, one optimizer per module (back-propagation and DNI have one in all), images (B, 3, s, s),
labels (B,) and ``autocast``, a function that returns the context of a forward pass. Steps of a single module or stage
are for a device of its own: their inputs have arrived from below, and the gradient from above is allocated when it
arrives. tests/test_method_steps.py compares the steps with the scripts.
"""

import sys
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from dni import synthesizer_context

sys.path.append(str(Path(__file__).resolve().parents[1] / "ddg_comparison"))
from cifar_resnet import frozen_statistics


def autocast_on(device, half):
    """A function that returns a context for forward passes on ``device``: with ``half`` mixed precision, fp16 on CUDA
    and bf16 elsewhere.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype, enabled=half)


def sgd(module, lr=1e-4, weight_decay=0.0):
    """SGD with momentum, fused as in the scripts where there is such a kernel: not on meta or for FakeTensors."""
    parameters = list(module.parameters())
    fused = not (parameters[0].is_meta or isinstance(parameters[0], FakeTensor))
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused, foreach=False)


class ScaledOptimizer:
    """An optimizer with its own loss scale, as in the scripts: for fp16, which is what ``half`` means on CUDA.
    Elsewhere the scale is off.
    """

    def __init__(self, optimizer, half=False):
        self.optimizer = optimizer
        self.zero_grad = optimizer.zero_grad
        device_type = optimizer.param_groups[0]["params"][0].device.type
        # A scale of 1 costs as much as a larger one and cannot overflow, which would leave momentum without a value
        self.scaler = torch.amp.GradScaler(device_type, init_scale=1.0, enabled=half and device_type == "cuda")

    def update(self, loss):
        """zero_grad, backward, step."""
        self.zero_grad()
        self.scaler.scale(loss).backward()
        self.step()

    def step(self):
        """Steps by gradients that are there and have been scaled."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def backprop_step(net, optimizer, images, labels, autocast, checkpointing=False):
    """Back-propagation through ``net``, a list of parts. ``checkpointing`` keeps only what is between the parts, and
    recomputes all but the last.
    """
    *lower, last = net
    representation = images
    with autocast():
        for part in lower:
            representation = recomputed(part, representation) if checkpointing else part(representation)
        logits = last(representation)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.update(loss)


def recomputed(part, inputs):
    """part(inputs), whose activations are dropped now and computed again in the backward pass. Batch norm counts the
    batch once.
    """

    def contexts():
        return nullcontext(), frozen_statistics(part)

    return checkpoint(part, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def dgl_step(modules, optimizers, inputs, labels, autocast):
    """Decoupled Greedy Learning (Algorithm 1) of consecutive modules, of which the lowest gets ``inputs``. Returns the
    top representation, detached.
    """
    representation = inputs
    for module, optimizer in zip(modules, optimizers, strict=True):
        with autocast():
            representation, logits = module(representation)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.update(loss)
        representation = representation.detach()
    return representation


def sequential_step(net, optimizers, images, labels, autocast):
    """Sequential greedy learning: a step of each module in turn."""
    for module_index, optimizer in enumerate(optimizers):
        sequential_module_step(net, module_index, optimizer, images, labels, autocast)


def sequential_module_step(net, module_index, optimizer, images, labels, autocast):
    """Sequential greedy learning: one module learns on the frozen ones below it."""
    *frozen, module = net[: module_index + 1]
    net.eval()
    module.train()
    representation = images
    with autocast():
        with torch.no_grad():
            for below in frozen:
                representation = below.body(representation)
        _, logits = module(representation)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.update(loss)


class PassedBatch(NamedTuple):
    """A mini-batch that has passed a module of DDG."""

    inputs: torch.Tensor
    weights: dict  # copies of the weights it passed, by name; empty in the last module
    output: torch.Tensor  # with its graph; the loss in the last module


class InFlight:
    """DDG's mini-batches in one module whose gradient is still to come: one for each module above it.

    batches   PassedBatch, oldest first
    gradient  of the loss by the oldest output, as it came from the module above; None before the first
    """

    def __init__(self, num_modules, module_index):
        self.delay = num_modules - 1 - module_index
        self.is_first = module_index == 0
        self.is_last = self.delay == 0
        self.batches = deque()
        self.gradient = None


def ddg_step(net, optimizers, in_flight, images, labels, autocast):
    """Delayed gradients (DDG), one iteration of all modules; ``in_flight`` has an InFlight for each."""
    representation = images
    for module_index, (module, optimizer) in enumerate(zip(net, optimizers, strict=True)):
        representation, gradient = ddg_module_step(
            module, optimizer, in_flight[module_index], representation, labels, autocast
        )
        if gradient is not None:
            in_flight[module_index - 1].gradient = gradient  # for its next iteration


def ddg_module_step(module, optimizer, in_flight, inputs, labels, autocast):
    """One module's part of an iteration of DDG: forward for this mini-batch, then backward and a step for the oldest in
    flight. Returns the output, detached, and the gradient by the oldest one's inputs, None where there is none.
    """
    inputs = inputs.detach().requires_grad_(not in_flight.is_first)
    weights = {}
    if not in_flight.is_last:  # later steps must leave these alone; their gradient goes to the module's own
        weights = {name: weight.clone() for name, weight in module.named_parameters()}
    with autocast():
        output = functional_call(module, weights, inputs)
    representation = output.detach()
    if in_flight.is_last:
        output = F.cross_entropy(output.float(), labels)
        in_flight.gradient = torch.ones_like(output)
    in_flight.batches.append(PassedBatch(inputs, weights, output))
    if len(in_flight.batches) <= in_flight.delay:
        return representation, None
    oldest = in_flight.batches.popleft()
    # Each module has its own loss scale; gradients pass from one to the next without
    scale = optimizer.scaler.scale(torch.ones(1, device=labels.device))
    optimizer.zero_grad()
    oldest.output.backward((in_flight.gradient * scale).view_as(oldest.output).to(oldest.output.dtype))
    gradient = None if in_flight.is_first else oldest.inputs.grad / scale
    optimizer.step()
    return representation, gradient


def dni_step(net, optimizer, images, labels, autocast, context=None):
    """Decoupled neural interfaces (DNI): in the forward pass each interface back-propagates its synthetic gradient into
    the part below. In cDNI synthesizers see the labels: ``context`` (B, classes).
    """
    optimizer.zero_grad()  # first: the forward pass adds gradients already
    representation = images
    with autocast(), synthesizer_context(context):
        for part in net:
            representation = part(representation)
    loss = F.cross_entropy(representation.float(), labels)
    loss.backward()
    optimizer.step()


def dni_part_step(part, optimizer, inputs, labels, autocast, is_first, is_last):
    """One part of DNI: its interface has taught it by the time the true gradient arrives for the synthesizer."""
    optimizer.zero_grad()
    with autocast():
        output = part(inputs.detach().requires_grad_(not is_first))
    if is_last:
        loss = F.cross_entropy(output.float(), labels)
        loss.backward()
    else:
        output.backward(torch.empty_like(output))
    optimizer.step()


def pipeline_stage_step(stage, optimizer, inputs, labels, autocast, is_first, is_last):
    """Back-propagation of one mini-batch in one stage of a pipeline."""
    with autocast():
        output = stage(inputs.detach().requires_grad_(not is_first))
    if is_last:
        loss = F.cross_entropy(output.float(), labels)
        optimizer.zero_grad()
        loss.backward()
    else:
        optimizer.zero_grad()
        output.backward(torch.empty_like(output))
    optimizer.step()
