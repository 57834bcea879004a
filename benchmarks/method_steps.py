"""What the benchmarks measure: a training step of each method on one mini-batch, as in its script but without meters.

The arguments of a step are the network, one optimizer per module (a single one for back-propagation and DNI), images
(B, 3, s, s), labels (B,) and ``autocast``, a function that returns a context for the forward pass. The steps of a
single module or stage are for modules that are on a device each: the inputs from the module below are given, and an
empty tensor stands in for the gradient from the module above. tests/test_method_steps.py compares the steps with the
scripts.
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
    """A function that returns a context for forward passes on ``device``. With ``half``, mixed precision: fp16 on CUDA
    and bf16 elsewhere.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return partial(torch.autocast, device.type, dtype, enabled=half)


def sgd(module, lr=1e-4, weight_decay=0.0):
    """SGD with momentum, fused as in the scripts, except on meta and for FakeTensors, for which there is no such
    kernel.
    """
    parameters = list(module.parameters())
    fused = not (parameters[0].is_meta or isinstance(parameters[0], FakeTensor))
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused, foreach=False)


class ScaledOptimizer:
    """An optimizer with its own loss scale, as in the scripts. The scale is for fp16, so it is used only with ``half``
    on CUDA.
    """

    def __init__(self, optimizer, half=False):
        self.optimizer = optimizer
        self.zero_grad = optimizer.zero_grad
        device_type = optimizer.param_groups[0]["params"][0].device.type
        # A scale of 1 costs as much as a larger one and cannot overflow: no step is skipped
        self.scaler = torch.amp.GradScaler(device_type, init_scale=1.0, enabled=half and device_type == "cuda")

    def update(self, loss):
        """zero_grad, backward, step."""
        self.zero_grad()
        self.scaler.scale(loss).backward()
        self.step()

    def step(self):
        """Steps with the gradients that are already there, which must be scaled."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def backprop_step(net, optimizer, images, labels, autocast, checkpointing=False):
    """Back-propagation through ``net``, a list of parts. With ``checkpointing``, only the representations between parts
    are kept, and all parts except the last are recomputed.
    """
    *lower, last = net
    representation = images
    with autocast():
        for part in lower:
            representation = run_checkpointed(part, representation) if checkpointing else part(representation)
        logits = last(representation)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.update(loss)


def run_checkpointed(part, inputs):
    """part(inputs), with activations that are dropped and recomputed in the backward pass. Batch norm's statistics are
    updated only once.
    """

    def contexts():
        return nullcontext(), frozen_statistics(part)

    return checkpoint(part, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def dgl_step(modules, optimizers, inputs, labels, autocast):
    """Decoupled Greedy Learning (Algorithm 1) of consecutive ``modules``; the lowest one gets ``inputs``. Returns the
    detached representation of the highest one.
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
    """Sequential greedy learning: one module learns; those below it are frozen."""
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


class MiniBatch(NamedTuple):
    """A mini-batch whose forward pass through a module of DDG is done."""

    inputs: torch.Tensor
    weights: dict  # copies of the weights that were used, by name; empty in the last module
    output: torch.Tensor  # with its graph; in the last module the loss


class InFlight:
    """The mini-batches in flight in one module of DDG, one for each module above it between iterations.

    batches   MiniBatch, oldest first
    gradient  of the loss with respect to the oldest one's output, from the module above; None before the first arrives
    """

    def __init__(self, module, num_modules, module_index):
        self.module = module
        self.delay = num_modules - 1 - module_index
        self.is_lowest = module_index == 0
        self.batches = deque()
        self.gradient = None


def ddg_step(queues, optimizers, images, labels, autocast):
    """Delayed gradients (DDG): one iteration of all modules. ``queues``: an InFlight for each."""
    representation = images
    for k, optimizer in enumerate(optimizers):
        representation = forward(queues[k], representation, labels, autocast)
        if len(queues[k].batches) > queues[k].delay:
            gradient_below = delayed_step(queues[k], optimizer)
            if k > 0:
                queues[k - 1].gradient = gradient_below  # for the next iteration of the module below


def ddg_module_step(in_flight, optimizer, inputs, labels, autocast):
    """One module's part of a DDG iteration: the forward pass of this mini-batch, then a step with the gradient of the
    oldest one in flight, once enough are in flight. Returns the detached output.
    """
    output = forward(in_flight, inputs, labels, autocast)
    if len(in_flight.batches) > in_flight.delay:
        delayed_step(in_flight, optimizer)
    return output


def forward(in_flight, inputs, labels, autocast):
    """Passes a mini-batch forward through one module and adds it to the module's mini-batches in flight. Returns the
    detached output.
    """
    inputs = inputs.detach().requires_grad_(not in_flight.is_lowest)
    weights = {}
    if in_flight.delay > 0:  # copies, which later steps do not change; their gradients go to the module's weights
        weights = {name: weight.clone() for name, weight in in_flight.module.named_parameters()}
    with autocast():
        output = functional_call(in_flight.module, weights, inputs)
    representation = output.detach()
    if in_flight.delay == 0:
        output = F.cross_entropy(output.float(), labels)
        in_flight.gradient = torch.ones_like(output)
    in_flight.batches.append(MiniBatch(inputs, weights, output))
    return representation


def delayed_step(in_flight, optimizer):
    """One step of a module with the gradient of its oldest mini-batch in flight. Returns the gradient with respect to
    the module's inputs, for the module below; None in the lowest module.
    """
    oldest = in_flight.batches.popleft()
    # Each module has its own loss scale; the gradients passed down are unscaled
    scale = optimizer.scaler.scale(torch.ones(1, device=oldest.output.device))
    optimizer.zero_grad()
    scaled_gradient = (in_flight.gradient * scale).view_as(oldest.output).to(oldest.output.dtype)
    oldest.output.backward(scaled_gradient)
    del scaled_gradient  # its memory must not count as part of the step
    gradient_below = None
    if not in_flight.is_lowest:
        gradient_below = oldest.inputs.grad / scale
    optimizer.step()
    return gradient_below


def dni_step(net, optimizer, images, labels, autocast, context=None):
    """Decoupled neural interfaces (DNI): in the forward pass, each interface back-propagates its synthetic gradient
    into the part below. In cDNI, the synthesizers also get the labels: ``context`` (B, classes).
    """
    optimizer.zero_grad()  # before the forward pass, which already adds gradients
    representation = images
    with autocast(), synthesizer_context(context):
        for part in net:
            representation = part(representation)
    loss = F.cross_entropy(representation.float(), labels)
    loss.backward()
    optimizer.step()


def dni_part_step(part, optimizer, inputs, labels, autocast, is_first, is_last):
    """One part of DNI. Its interface back-propagates into it in the forward pass; the gradient from above trains the
    synthesizer.
    """
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
