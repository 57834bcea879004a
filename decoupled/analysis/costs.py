"""What a module and its auxiliary network cost: parameters, FLOPs, peak memory and time of a training step.

FLOPs: see decoupled.networks.flops.
"""

import copy
import time
import weakref
from functools import partial

import pandas as pd
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoupled.networks.flops import count_flops
from decoupled.networks.modules import eval_mode


class LiveStorages(TorchDispatchMode):
    """Counts the memory of the tensors that are made inside the block, in bytes: ``live``, of those still alive, and
    ``peak``, the maximum of that.

    A storage counts once, whatever views and in-place results share it, from the operation that makes it until the last
    of them is gone, autograd's graph included. A storage that appears as an operand first existed before and does not
    count. A storage that is resized later keeps its first size.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = {}  # id of a storage → weak reference to it, whose callback forgets it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # no operation: asks a FakeTensor for the device it stands for
            return func(*args)
        if torch.is_inference_mode_enabled():  # composite operations arrive whole: count what they make inside
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is not torch.ops.aten.lift_fresh.default:  # its operand is what torch.tensor has just made
            for storage in storages((args, kwargs)):
                self.remember(storage, 0)
        result = func(*args, **kwargs)
        for storage in storages(result):
            self.remember(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def remember(self, storage, size):
        """Counts ``storage`` with ``size`` bytes until it is freed, unless it is known already."""
        if id(storage) not in self.known:
            self.live += size
            self.known[id(storage)] = weakref.ref(storage, partial(self.forget, id(storage), size))

    def forget(self, key, size, reference):
        del self.known[key]
        self.live -= size


def storages(tree):
    """The storages of the tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_memory(step, device="cpu"):
    """The maximum of the bytes that tensors made while ``step()`` runs take, on top of what was alive before.

    On CUDA it is the allocator's count, in blocks of 512 bytes and with the workspaces of kernels. Elsewhere, meta
    included, it is the exact size of tensor storages (LiveStorages), without kernels' workspaces: the same on every
    machine, and on the meta device without computing anything.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages() as storages:
        step()
    return storages.peak


def step_seconds(step, calls=1, device="cpu"):
    """Average wall time of a call of ``step()`` over ``calls``, in seconds, the device's queued work included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device):
    device = torch.device(device)
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def costs(net, images):
    """Measures each module of ``net`` and its parts: a pandas frame with a row per (n, part), module n from 1, part
    "body", "auxiliary" or "module", which is both.

    ``images`` (B, …), at least two. Columns:
      parameters       trained or not
      flops            per image, forward, eval mode
      training_flops   per image, forward and backward, train mode. A module's input needs no gradient;
                         its auxiliary's does
      memory           bytes: the peak of a training step of that part alone, in the precision of ``images``
                         (see peak_memory)
    A training step is the scripts': forward, mean cross-entropy, zero_grad, backward, SGD with momentum. Memory is that
    of two steps, so that the gradients and the momentum left by the first count in the second; the network and the
    part's input do not count. A body alone is given a gradient of its output. ``net`` stays as it is, gradients, modes
    and batch norm statistics included, and so does the random number generator.
    """
    rows = {}
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    cuda_devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(cuda_devices), eval_mode(net):
        inputs = images
        for n, module in enumerate(net, start=1):
            with torch.no_grad():
                representation = module.body(inputs)
            for part, row in module_costs(module, inputs, representation, labels).items():
                rows[n, part] = row
            inputs = representation
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=("n", "part"))
    return frame


class Ones(torch.autograd.Function):
    """(B, …) → a scalar whose gradient is one for each element: stands for an auxiliary that costs nothing."""

    @staticmethod
    def forward(ctx, representation):
        ctx.save_for_backward(representation)
        return representation.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (representation,) = ctx.saved_tensors
        return torch.ones_like(representation)


def module_costs(module, inputs, representation, labels):
    """The three rows of costs for one module in eval mode: {part: {column: value}}. ``representation`` is what its body
    makes of ``inputs``.
    """
    learner = copy.deepcopy(module).train()
    body_learns = any(parameter.requires_grad for parameter in module.body.parameters())

    def body():
        representation = learner.body(inputs)
        return representation, Ones.apply(representation)

    def auxiliary():
        logits = learner.auxiliary(representation.detach().requires_grad_(body_learns))
        return logits, F.cross_entropy(logits.float(), labels)

    def both():
        representation, logits = learner(inputs)
        return representation, logits, F.cross_entropy(logits.float(), labels)

    with torch.no_grad():
        body_flops = count_flops(lambda: module.body(inputs))
        auxiliary_flops = count_flops(lambda: module.auxiliary(representation))
    return {
        "body": part_costs(learner.body, body, body_flops, inputs),
        "auxiliary": part_costs(learner.auxiliary, auxiliary, auxiliary_flops, inputs),
        "module": part_costs(learner, both, body_flops + auxiliary_flops, inputs),
    }


def part_costs(network, outputs, flops, inputs):
    """One row of costs, {column: value}: of ``network``, in train mode, whose forward pass is ``outputs`` (see
    training_step) and costs ``flops`` for all images of ``inputs``.
    """
    # This step also makes CUDA's libraries allocate their lasting workspaces.
    training_flops = count_flops(training_step(outputs, network))
    network.zero_grad()
    step = training_step(outputs, network)

    def two_steps():
        step()
        step()

    memory = peak_memory(two_steps, inputs.device)
    network.zero_grad()
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "flops": flops / len(inputs),
        "training_flops": training_flops / len(inputs),
        "memory": memory,
    }


def training_step(outputs, network):
    """A callable that takes a training step of ``network``: the last of ``outputs()`` is the loss, the others stay
    alive meanwhile, as in the scripts.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = None
    if parameters:
        # Fused as in the scripts; meta has no such kernel. Neither makes temporary tensors.
        optimizer = SGD(parameters, lr=0.0, momentum=0.9, fused=not parameters[0].is_meta)

    def step():
        *_kept, loss = outputs()
        network.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def relative_cost(frame):
    """Forward FLOPs of each module's auxiliary in % of its body's, as in the paper's Table 1, from a frame of costs: a
    Series by n.
    """
    flops = frame["flops"].unstack("part")
    return 100 * flops["auxiliary"] / flops["body"]
