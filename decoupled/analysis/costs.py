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
    """Tracks the memory of tensors created inside the block: ``live``, the bytes in use now, and ``peak``, the most
    that were in use at once.

    A storage is counted once, however many views share it, from the operation that creates it until nothing refers to
    it anymore, including autograd's graph. A storage that first appears as an operand was created before the block and
    is not counted. A storage that is resized later keeps its first size.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = {}  # id of a storage → weak reference to it, whose callback calls forget

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # not an operation, but a query: which device a FakeTensor stands for
            return func(*args)
        if torch.is_inference_mode_enabled():  # composite operations are not decomposed before they arrive here
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is not torch.ops.aten.lift_fresh.default:  # its operand was just created, by torch.tensor
            for storage in storages((args, kwargs)):
                self.remember(storage, 0)
        result = func(*args, **kwargs)
        for storage in storages(result):
            self.remember(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def remember(self, storage, size):
        """Counts ``storage`` as ``size`` bytes until it is freed, unless it is already counted."""
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
    """The peak memory of ``step()`` in bytes, without what was allocated before.

    On CUDA, this is the allocator's count, in blocks of 512 bytes and including kernels' workspaces. Elsewhere,
    including meta, it is the exact size of tensor storages (LiveStorages) without kernels' workspaces: the same on
    every machine. On the meta device nothing is computed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages() as memory:
        step()
    return memory.peak


def step_seconds(step, calls=1, device="cpu"):
    """The average wall time of ``step()`` over ``calls`` calls, in seconds, including the device's queued work."""
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
    """The costs of each module of ``net``: a pandas frame with one row per (n, part). n counts modules from 1; part is
    "body", "auxiliary", or "module" for both together.

    ``images`` (B, …), B at least 2. Columns:
      parameters       trained or not
      flops            per image, forward, eval mode
      training_flops   per image, forward and backward, train mode. No gradient is computed for a module's input,
                         but one is for its auxiliary's
      memory           bytes: the peak of a training step of that part alone, in the precision of ``images``
                         (see peak_memory)
    A training step is as in the scripts: forward, mean cross-entropy, zero_grad, backward, SGD with momentum. Memory is
    measured over two steps, so that the gradients and the momentum of the first are there in the second; the network
    and the part's input do not count. A body alone is given a gradient of its output. ``net`` is left unchanged,
    gradients, modes and batch norm statistics included, and so is the random number generator.
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
    """(B, …) → a scalar whose gradient is one for each element: replaces an auxiliary at no cost."""

    @staticmethod
    def forward(ctx, representation):
        ctx.save_for_backward(representation)
        return representation.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (representation,) = ctx.saved_tensors
        return torch.ones_like(representation)


def module_costs(module, inputs, representation, labels):
    """The three rows of costs for one module in eval mode: {part: {column: value}}. ``representation`` is its body's
    output for ``inputs``.
    """
    learner = copy.deepcopy(module).train()
    body_learns = any(parameter.requires_grad for parameter in module.body.parameters())

    def forward_body():
        representation = learner.body(inputs)
        return representation, Ones.apply(representation)

    def forward_auxiliary():
        logits = learner.auxiliary(representation.detach().requires_grad_(body_learns))
        return logits, F.cross_entropy(logits.float(), labels)

    def forward_module():
        representation, logits = learner(inputs)
        return representation, logits, F.cross_entropy(logits.float(), labels)

    with torch.no_grad():
        body_flops = count_flops(lambda: module.body(inputs))
        auxiliary_flops = count_flops(lambda: module.auxiliary(representation))
    return {
        "body": part_costs(learner.body, forward_body, body_flops, inputs),
        "auxiliary": part_costs(learner.auxiliary, forward_auxiliary, auxiliary_flops, inputs),
        "module": part_costs(learner, forward_module, body_flops + auxiliary_flops, inputs),
    }


def part_costs(network, forward, flops, inputs):
    """One row of costs, {column: value}, for ``network`` in train mode. ``forward`` runs its forward pass (see
    training_step), which takes ``flops`` for all of ``inputs``.
    """
    # In this step, CUDA's libraries also allocate workspaces that they keep; peak_memory must not count those.
    training_flops = count_flops(training_step(forward, network))
    network.zero_grad()
    step = training_step(forward, network)

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


def training_step(forward, network):
    """Returns a function that does one training step of ``network``. ``forward()`` returns a tuple that ends with the
    loss; the tensors before the loss stay alive until the step is done, as in the scripts.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = None
    if parameters:
        # Fused as in the scripts, except on meta, which has no such kernel. Neither allocates temporaries.
        optimizer = SGD(parameters, lr=0.0, momentum=0.9, fused=not parameters[0].is_meta)

    def step():
        *_kept_alive, loss = forward()
        network.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def relative_cost(frame):
    """A Series by n: the forward FLOPs of each module's auxiliary in % of its body's, as in the paper's Table 1.
    ``frame`` comes from costs.
    """
    flops = frame["flops"].unstack("part")
    return 100 * flops["auxiliary"] / flops["body"]
