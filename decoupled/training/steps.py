"""Training steps of modules: mixed precision with a loss scale for each module, compilation, and a check that losses
are finite.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import SGD
from torch.utils._pytree import tree_map

from decoupled.errors import InputError
from decoupled.training.console import warn

# Mixed precision


def warn_if_half_is_slow(device):
    """Warns if --half makes a run slower, as on a CPU without bf16 instructions."""
    if device.type == "cpu" and not has_bf16_instructions():
        warn("--half: this CPU has no bf16 instructions, and bf16 is several times slower than fp32: leave --half out")


def has_bf16_instructions(cpuinfo="/proc/cpuinfo"):
    """Whether this CPU has bf16 instructions. True if the system does not say, as on macOS and Windows."""
    try:
        words = Path(cpuinfo).read_text().split()
    except OSError:
        return True
    return any(flag in words for flag in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's


def allocate_momentum(optimizer):
    """Sets the momentum buffers of ``optimizer`` to zero if it is SGD with momentum. Its first step stays the same to
    the bit.

    Otherwise, PyTorch's fused SGD would allocate uninitialized buffers in its first step. If that step is skipped
    because fp16 gradients overflow, the buffers are never filled, and the next step adds to whatever was in the memory.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


# Compilation


def check_compiler(device):
    """Compiles a small function. Raises InputError if that fails, now and not only in the first step."""
    logging_before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a failing compiler logs many pages
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2, device=device))
    except Exception as error:  # a missing or outdated compiler can raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200] if lines else type(error).__name__
        raise InputError(
            f"--compile does not work here ({reason}): install a C++ compiler, or leave --compile out"
        ) from error
    finally:
        logging.disable(logging_before)


def compile_modules(net, cuda_graphs):
    """Compiles each module of ``net`` in place; with ``cuda_graphs``, to CUDA graphs."""
    # All modules share one forward function. PyTorch compiles a function at most 8 times by default, and then silently
    # runs it uncompiled. Each module needs its own, for training, for evaluation, and for a shorter last mini-batch.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(net))
    for module in net:
        if cuda_graphs:
            compile_to_cuda_graphs(module)
        else:
            module.compile()


def compile_to_cuda_graphs(module):
    """Compiles ``module`` to CUDA graphs: one launch for its forward pass, one for its backward pass.

    Each size of mini-batch has its own graph, so a shorter last one does, too. All graphs share one memory pool, and a
    replay overwrites the outputs of the previous one. Outputs are therefore copied: the module above, meters and the
    process above may read them later. Gradients are not copied: ``Steps.step`` uses them before the next replay, and
    zero_grad drops them. A module's backward pass and step must come before any other forward pass.
    """
    graphs = torch.compile(module.forward, mode="reduce-overhead", dynamic=False)
    module.forward = lambda *inputs: tree_map(torch.clone, graphs(*inputs))


# Steps


def parameters_of(optimizer):
    """The parameters that ``optimizer`` trains, a list."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def learns(optimizer):
    """Whether any parameter of ``optimizer`` is not frozen."""
    return any(parameter.requires_grad for parameter in parameters_of(optimizer))


class Learner(NamedTuple):
    """The module that an optimizer trains: its number ``n``, from 1, and its loss scale."""

    n: int
    scaler: torch.amp.GradScaler


class WatchedLoss(NamedTuple):
    """The ``loss`` of module ``n`` in mini-batch ``batch``, still on the device, to be checked later."""

    batch: int
    n: int
    loss: torch.Tensor


class Steps:
    """Training steps of modules on ``device``. With ``half``, in mixed precision: fp16 on CUDA, bf16 elsewhere.

    ``loss_scale`` is a constant loss scale for fp16; None for dynamic scaling.
    """

    def __init__(self, device, half, loss_scale=None):
        self.device = device
        self.half = half
        self.loss_scale = loss_scale
        self.modules_below = 0  # how many modules below this process's learn in other processes
        self.learners = {}  # id of an optimizer → Learner
        self.cuda_graphs = False  # whether modules are compiled to CUDA graphs
        self.watched = []  # a WatchedLoss for each step since the last check

    def autocast(self):
        """The context manager for forward passes."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.half)

    def prepare(self, net, compiled, cuda_graphs=True):
        """Moves ``net`` to the device, in channels-last memory, and returns it. With ``compiled``, compiles each
        module, on CUDA to CUDA graphs unless ``cuda_graphs`` is False.
        """
        net.to(self.device, memory_format=torch.channels_last)
        if compiled:
            check_compiler(self.device)
            if self.device.type == "cpu":
                warn("--compile: on CPUs, compiled modules ran slower than plain ones; it is meant for CUDA")
            self.cuda_graphs = cuda_graphs and self.device.type == "cuda"
            compile_modules(net, self.cuda_graphs)
        return net

    def learner(self, optimizer):
        """The Learner of ``optimizer``. An optimizer seen for the first time gets the number of the next module, so the
        first calls must go from the lowest module up.
        """
        if id(optimizer) not in self.learners:
            allocate_momentum(optimizer)
            n = self.modules_below + len(self.learners) + 1
            self.learners[id(optimizer)] = Learner(n, self.new_scaler())
        return self.learners[id(optimizer)]

    def new_scaler(self):
        """A new loss scale; it has no effect except in fp16."""
        enabled = self.half and self.device.type == "cuda"
        if self.loss_scale is None:
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        return torch.amp.GradScaler(self.device.type, enabled=enabled, init_scale=self.loss_scale)

    def step(self, loss, optimizer, batch=0, weight=None, clip=None):
        """zero_grad, backward and step of one module, with its own loss scale. Does nothing if all its parameters are
        frozen.

        ``weight``, if given, multiplies the loss; ``clip``, if given, is the maximum norm of the unscaled gradient.
        ``batch`` is the number of the mini-batch, for the check of losses.
        """
        n, scaler = self.learner(optimizer)
        if not learns(optimizer):
            self.watch(loss, n, batch)
            return
        weighted = loss if weight is None else loss * weight
        optimizer.zero_grad()
        scaler.scale(weighted).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters_of(optimizer), clip)
        scaler.step(optimizer)
        scaler.update(self.loss_scale)  # set a constant loss scale again, so that overflows do not lower it
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # from here on, replays may overwrite the module's memory
        self.watch(loss, n, batch)

    # Losses

    def watch(self, loss, n, batch=0):
        """Records the loss of module ``n`` in mini-batch ``batch``, for ``check`` and ``latest``."""
        self.watched.append(WatchedLoss(batch, n, loss.detach()))

    def latest(self, batch):
        """The losses recorded in mini-batch ``batch``: a list of numbers. Waits for the device once."""
        losses = [watched.loss for watched in self.watched if watched.batch == batch]
        return torch.stack(losses).tolist() if losses else []

    def check(self, epoch, checkpoint):
        """Raises an InputError that names module, epoch and mini-batch if a loss recorded since the last check is not
        finite. Waits for the device.
        """
        if not self.watched:
            return
        finite = torch.stack([watched.loss for watched in self.watched]).isfinite().tolist()
        if not all(finite):
            bad = self.watched[finite.index(False)]
            raise InputError(
                f"the loss of module {bad.n} became {bad.loss.item()} in epoch {epoch}, batch {bad.batch}: "
                f"the last good checkpoint stays in {checkpoint}"
            )
        self.watched.clear()
