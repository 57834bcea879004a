"""What a module and its auxiliary network cost: parameters, FLOPs, peak memory and time of a training step.

One multiply-add is 2 FLOPs; matrix products and convolutions count, nothing else does (torch.utils.flop_counter).
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
    """Inside the block: ``live``, the bytes of tensor storages made there and still alive, and ``peak``, the most there
    were at once.

    A storage counts once, whatever views and in-place results share it, from the operation that makes it until the last
    of them is gone, autograd's graph included. One that appears as an operand first was alive before and does not
    count. A storage resized later keeps its first size.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}  # id of a storage → weak reference to it, whose callback forgets it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # no operation: a FakeTensor is asked where it would be
            return func(*args)
        if torch.is_inference_mode_enabled():  # composite operations come whole: what they make inside counts too
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is not torch.ops.aten.lift_fresh.default:  # which is handed what torch.tensor has just made
            for storage in storages((args, kwargs)):
                self.know(storage, 0)
        result = func(*args, **kwargs)
        for storage in storages(result):
            self.know(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def know(self, storage, size):
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
    """The most bytes that tensors made while ``step()`` runs take at once, on top of what was alive before.

    On CUDA the allocator's own count, in blocks of 512 bytes and with the workspaces of kernels. Elsewhere, meta
    included, the exact sizes of tensor storages (LiveStorages), without kernels' workspaces: the same on every machine,
    and on the meta device without computing anything.
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
    """Wall time of a call of ``step()`` in seconds, on average of ``calls``, the device's queued work included."""
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
    """A pandas frame with a row for each (n, part): module n from 1; part "body", "auxiliary" or "module", which is
    both.

    ``images`` (B, …), at least two. Columns:
      parameters       trained or not
      flops            per image, forward, eval mode
      training_flops   per image, forward and backward, train mode. A module's input needs no gradient;
                         its auxiliary's does
      memory           bytes: the peak of a training step of that part alone, in the precision of ``images``
                         (see peak_memory)
    A training step is the scripts': forward, mean cross-entropy, zero_grad, backward, SGD with momentum. Two are taken,
    so that the gradients and the momentum that the first leaves count in the second; the network and the part's input
    do not. A body alone is handed a gradient of its output. ``net`` stays as it is, gradients, modes and batch norm
    statistics included, and so does the random number generator.
    """
    rows = {}
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    with torch.random.fork_rng([images.device] if images.is_cuda else []), eval_mode(net):
        representation = images
        for n, module in enumerate(net, start=1):
            below = representation
            with torch.no_grad():
                representation = module.body(below)
            rows |= {(n, part): row for part, row in module_costs(module, below, representation, labels).items()}
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


def module_costs(module, below, representation, labels):
    """The three rows of costs for one module in eval mode: {part: {column: value}}. Its input is ``below``, its body's
    output ``representation``.
    """
    learner = copy.deepcopy(module).train()
    learns = any(parameter.requires_grad for parameter in module.body.parameters())

    def body():
        representation = learner.body(below)
        return representation, Ones.apply(representation)

    def auxiliary():
        logits = learner.auxiliary(representation.detach().requires_grad_(learns))
        return logits, F.cross_entropy(logits.float(), labels)

    def both():
        representation, logits = learner(below)
        return representation, logits, F.cross_entropy(logits.float(), labels)

    with torch.no_grad():
        forward = {
            "body": count_flops(lambda: module.body(below)),
            "auxiliary": count_flops(lambda: module.auxiliary(representation)),
        }
    forward["module"] = sum(forward.values())
    rows = {}
    for part, outputs, network in (
        ("body", body, learner.body),
        ("auxiliary", auxiliary, learner.auxiliary),
        ("module", both, learner),
    ):
        # This also lets CUDA's libraries take their lasting workspaces
        training = count_flops(training_step(outputs, network))
        network.zero_grad()
        step = training_step(outputs, network)
        rows[part] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": forward[part] / len(labels),
            "training_flops": training / len(labels),
            "memory": peak_memory(lambda step=step: (step(), step()), below.device),
        }
        network.zero_grad()
    return rows


def training_step(outputs, network):
    """A callable that takes a training step: the last of ``outputs()`` is the loss, the others stay alive as in the
    scripts.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # As in the scripts; meta has no such kernel. Neither makes temporary tensors
    fused = bool(parameters) and not parameters[0].is_meta
    optimizer = SGD(parameters, lr=0.0, momentum=0.9, fused=fused) if parameters else None

    def step():
        *_kept, loss = outputs()
        network.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if optimizer:
            optimizer.step()

    return step


def relative_cost(frame):
    """Forward FLOPs of each module's auxiliary in % of its body's, as in the paper's Table 1, from a frame of costs: a
    Series by n.
    """
    flops = frame["flops"].unstack("part")
    return 100 * flops["auxiliary"] / flops["body"]
