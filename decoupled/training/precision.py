"""The device of a run, and how modules take their steps on it: mixed precision, a loss scale for each module, a check
that their losses stay finite, compilation.
"""

import ctypes
import logging
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import SGD
from torch.utils._pytree import tree_map

from decoupled.errors import InputError
from decoupled.training.console import warn

# The device, its memory and its kernels


def pick_device(name, setting="--device "):
    """The torch.device called ``name``; "auto" prefers CUDA, then MPS, then the CPU.

    Raises InputError for a device that this machine does not have. In the message, ``setting`` is how it was set.
    """
    if name == "auto":
        name = best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"{setting}{name} is unknown: choose from auto, cpu, cuda, cuda:N, mps")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts[device.type]
    if (device.index or 0) >= count:
        plural = "" if count == 1 else "s"
        raise InputError(
            f"{setting}{name} is not on this machine ({count} such device{plural}): {setting}cpu always works"
        )
    return device


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def keep_freed_memory():
    """Lets the process keep the memory of freed CPU tensors, in huge pages, for the tensors of the next step.

    By default glibc returns the largest blocks to the kernel at once, and each step pays for mapping and clearing them
    again. On two cores, the DGL step of learning_curves processes 465 images/s with this and 407 without in fp32. In
    bf16, whose blocks are half as large, it makes no difference (benchmarks/throughput.py, with and without
    --plain-malloc). Has no effect on results, nor with other C libraries.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first large allocation
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD = -1  # these three from malloc.h
    M_TOP_PAD = -2
    M_MMAP_MAX = -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)


def choose_kernels(device, deterministic):
    """Lets cuDNN time its kernels and take the fastest or, with ``deterministic``, restricts PyTorch to kernels that
    give the same bits each time; it warns where an operation has none.

    Raises InputError for ``deterministic`` on any device but CUDA.
    """
    if deterministic and device.type == "cpu":
        raise InputError("--deterministic is for CUDA: leave it out, results on the CPU are exact without it")
    if deterministic and device.type != "cuda":
        raise InputError(f"--deterministic is for CUDA: leave it out on {device.type}")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # takes time, and nothing here reads it
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first matrix product


# Mixed precision


def warn_of_slow_half(device):
    """Warns where --half makes a run slower: on a CPU without bf16 instructions."""
    if device.type == "cpu" and not has_bf16_instructions():
        warn("--half: this CPU has no bf16 instructions, and bf16 is several times slower than fp32: leave --half out")


def has_bf16_instructions(cpuinfo="/proc/cpuinfo"):
    """Whether this CPU computes in bf16 itself; True where the system does not say, as on macOS and Windows."""
    try:
        words = Path(cpuinfo).read_text().split()
    except OSError:
        return True
    return any(flag in words for flag in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's


def allocate_momentum(optimizer):
    """Gives ``optimizer``, where it is SGD with momentum, momentum buffers of zeros. Its first step is the same, to the
    bit.

    PyTorch's fused SGD otherwise allocates them in its first step without a value. If fp16's loss scale finds an
    overflow there, the step that would fill them is skipped, and the next one adds whatever the memory held.
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
    """Compiles a small function. Raises InputError where that fails, before there is anything to lose."""
    logging_before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a failing compiler logs pages
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or outdated compiler leads to
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200] if lines else type(error).__name__
        raise InputError(
            f"--compile does not work here ({reason}): install a C++ compiler, or leave --compile out"
        ) from error
    finally:
        logging.disable(logging_before)


def compile_modules(net, cuda_graphs):
    """Compiles each module of ``net`` in place, with ``cuda_graphs`` for replay by CUDA graphs."""
    # Modules share the code of their forward. By default PyTorch compiles one code 8 times (for each module, training
    # and evaluation, the usual batch and a shorter last one), and silently runs the rest without compiling.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(net))
    for module in net:
        if cuda_graphs:
            compile_graphs(module)
        else:
            module.compile()


def compile_graphs(module):
    """Compiles ``module`` for replay by CUDA graphs: one launch for its forward pass, one for its backward pass.

    There is one graph for each size of mini-batch, so a shorter last one has its own. A replay overwrites the outputs
    of the one before, and all graphs share one memory pool. So outputs are copied, and the module above, meters and
    messages may read them at any time. Gradients stay in the pool: ``Steps.step`` reads them before any other replay,
    and zero_grad drops them unread. A module's backward pass must come before any other forward pass.
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
    """Whether any of the parameters of ``optimizer`` are not frozen."""
    return any(parameter.requires_grad for parameter in parameters_of(optimizer))


class Learner(NamedTuple):
    """What the steps of one optimizer need: the number of the module that it trains, from 1, and its loss scale."""

    n: int
    scaler: torch.amp.GradScaler


class WatchedLoss(NamedTuple):
    """A loss on its device, to be checked later: the mini-batch and the number of the module that it comes from."""

    batch: int
    n: int
    loss: torch.Tensor


class Steps:
    """The steps of modules on ``device``, in mixed precision with ``half``: fp16 on CUDA, bf16 elsewhere.

    ``loss_scale`` is that of fp16: a constant, or None for dynamic scaling.
    """

    def __init__(self, device, half, loss_scale=None):
        self.device = device
        self.half = half
        self.loss_scale = loss_scale
        self.first = 0  # number of modules below the lowest one that learns in this process
        self.learners = {}  # id of an optimizer → Learner
        self.replays = False  # whether modules are replayed as CUDA graphs
        self.watched = []  # WatchedLoss of each step since the last check

    def autocast(self):
        """The context for forward passes."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.half)

    def prepare(self, net, compiled, graphs=True):
        """Moves ``net`` to the device, in channels-last memory, and returns it. With ``compiled``, compiles each of its
        modules, on CUDA into CUDA graphs unless ``graphs`` is false.
        """
        net.to(self.device, memory_format=torch.channels_last)
        if compiled:
            check_compiler(self.device)
            if self.device.type == "cpu":
                warn("--compile: on CPUs, compiled modules ran slower than plain ones; it is meant for CUDA")
            self.replays = graphs and self.device.type == "cuda"
            compile_modules(net, self.replays)
        return net

    def learner(self, optimizer):
        """The Learner of ``optimizer``. Modules are numbered in the order in which they are asked for."""
        if id(optimizer) not in self.learners:
            allocate_momentum(optimizer)
            n = self.first + len(self.learners) + 1
            self.learners[id(optimizer)] = Learner(n, self.scaler())
        return self.learners[id(optimizer)]

    def scaler(self):
        """A new loss scale; a no-op except in fp16."""
        enabled = self.half and self.device.type == "cuda"
        if self.loss_scale is None:
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        return torch.amp.GradScaler(self.device.type, enabled=enabled, init_scale=self.loss_scale)

    def step(self, loss, optimizer, batch=0, weight=None, clip=None):
        """zero_grad, backward and step of one module, through its own loss scale. None of these if all its parameters
        are frozen.

        ``weight``, if given, multiplies the loss; ``clip``, if given, is the largest norm of the gradient, which is
        then no longer scaled. ``batch`` is the number of the mini-batch, for the check of losses.
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
        scaler.update(self.loss_scale if scaler.is_enabled() else None)
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()  # from here on, replays may overwrite the module's memory
        self.watch(loss, n, batch)

    # Losses

    def watch(self, loss, n, batch=0):
        """Notes the loss of module ``n`` in mini-batch ``batch``, for ``check`` and ``latest``."""
        self.watched.append(WatchedLoss(batch, n, loss.detach()))

    def latest(self, batch):
        """The losses noted in mini-batch ``batch``: a list of numbers. Waits for the device once."""
        losses = [watched.loss for watched in self.watched if watched.batch == batch]
        return torch.stack(losses).tolist() if losses else []

    def check(self, epoch, checkpoint):
        """Raises InputError, naming module, epoch and mini-batch, where a loss noted since the last check is not
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
