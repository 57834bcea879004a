"""The device, and how modules take their steps on it: precision, a loss scale for each module, and a watch on their
losses.
"""

import ctypes
import logging
import os
import platform
import sys

import torch
from torch.optim import SGD
from torch.utils._pytree import tree_map

from decoupled.errors import InputError


def pick_device(name):
    """The torch.device called ``name``; auto takes CUDA, then MPS, then the CPU. Raises InputError for one that is not
    there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name} is unknown: choose from auto, cpu, cuda, cuda:N, mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise InputError(
            f"--device {name} is not on this machine ({count} such device{'s' * (count != 1)}): "
            f"--device cpu always works"
        )
    return device


def keep_freed_memory():
    """Lets the process keep the memory of freed CPU tensors, in huge pages, for the next step's.

    glibc gives the largest blocks back to the kernel at once, and each step then pays for mapping and clearing them
    again. On two cores the DGL step of learning_curves deals with 465 images/s with this and 407 without in fp32, and
    with as many in bf16, whose blocks are half as large (benchmarks/throughput.py, with and without --plain-malloc). No
    effect on results, nor on other C libraries.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first large allocation
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)


def choose_kernels(device, deterministic):
    """Lets cuDNN time its kernels and take the fastest or, with ``deterministic``, takes those that give the same bits
    each time; PyTorch warns of operations that it has none for. Raises InputError for the latter on anything but CUDA.
    """
    if deterministic and device.type != "cuda":
        exact = ", where a run's results are exact without it" if device.type == "cpu" else ""
        raise InputError(f"--deterministic is for CUDA: leave it out on {device.type}{exact}")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # takes time, and nothing here reads it
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first matrix product


def momentum_from_zeros(optimizer):
    """Gives ``optimizer``, where it is SGD with momentum, buffers of zeros: its first step is the same, bit for bit.

    PyTorch's fused SGD otherwise allocates them in that step without a value, and where fp16's loss scale finds an
    overflow there, the step that would fill them is skipped: the next one adds whatever the memory held.
    """
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def check_compiler(device):
    """Compiles a little. Raises InputError where that does not work, before there is anything to lose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of what the compiler has left where it failed
    try:
        torch.compile(lambda values: values + 1)(torch.ones(2, device=device))
    except Exception as error:  # of a compiler that is missing or too old, or of PyTorch's own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(
            f"--compile does not work here ({lines[0][:200]}): install a C++ compiler, or leave --compile out"
        ) from error
    finally:
        logging.disable(before)


def compile_graphs(module):
    """Compiles ``module`` for replay by CUDA graphs: a launch for its forward pass, one for its backward pass.

    A graph for each size of mini-batch, so a shorter last one has its own. A replay writes its outputs where the one
    before did, and all graphs share a memory pool: what leaves the module is a copy, which the module above, meters and
    messages may read whatever is replayed meanwhile. Gradients stay in the pool: ``Steps.step`` reads them before any
    other replay, and zero_grad drops them unread. A module's backward pass must come before any other forward pass.
    """
    graphs = torch.compile(module.forward, mode="reduce-overhead", dynamic=False)
    module.forward = lambda *inputs: tree_map(torch.clone, graphs(*inputs))


class Steps:
    """The steps of modules on ``device``, in mixed precision with ``half``: fp16 on CUDA, bf16 elsewhere.

    ``loss_scale`` of fp16: constant; None: as large as gradients allow.
    """

    def __init__(self, device, half, loss_scale=None):
        self.device, self.half, self.loss_scale = device, half, loss_scale
        self.first = 0  # modules below those that learn in this process
        self.learners = {}  # id of an optimizer → (the number of the module it teaches, its loss scale)
        self.replays = False  # modules are CUDA graphs
        self.watched = []  # (mini-batch, number of the module, loss)

    def autocast(self):
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.half)

    def prepare(self, net, compiled, graphs=True):
        """``net`` on the device; ``compiled``: each module of it, into CUDA graphs there if ``graphs``."""
        net.to(self.device, memory_format=torch.channels_last)
        if compiled:
            check_compiler(self.device)
            if self.device.type == "cpu":
                print(
                    "--compile: on CPUs modules ran slower compiled than plain; it is meant for CUDA", file=sys.stderr
                )
            self.replays = graphs and self.device.type == "cuda"
            # Modules share the code of their forward, whose compiled versions (each module's, in both modes, for the
            # usual batch and a shorter last one) PyTorch otherwise limits to 8, going on without compiling.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 * len(net))
            for module in net:
                if self.replays:
                    compile_graphs(module)
                else:
                    module.compile()
        return net

    def learner(self, optimizer):
        """(number of the module that ``optimizer`` teaches, from 1 as they are asked for; its loss scale)."""
        if id(optimizer) not in self.learners:
            momentum_from_zeros(optimizer)
            self.learners[id(optimizer)] = self.first + len(self.learners) + 1, self.scaler()
        return self.learners[id(optimizer)]

    def scaler(self):
        """A loss scale; a no-op except in fp16."""
        initial = {} if self.loss_scale is None else {"init_scale": self.loss_scale}
        return torch.amp.GradScaler(self.device.type, enabled=self.half and self.device.type == "cuda", **initial)

    def step(self, loss, optimizer, batch=0, weight=None):
        """zero_grad, backward and step of one module through its own loss scale. ``batch`` is the mini-batch's number,
        ``weight`` a factor of the loss, which is watched without it.
        """
        n, scaler = self.learner(optimizer)
        optimizer.zero_grad()
        scaler.scale(loss if weight is None else loss * weight).backward()
        scaler.step(optimizer)
        scaler.update(self.loss_scale if scaler.is_enabled() else None)
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()  # what the module's graphs hold may be written over from here on
        self.watch(loss, n, batch)

    def watch(self, loss, n, batch=0):
        self.watched.append((batch, n, loss.detach()))

    def latest(self, batch):
        """The losses noted in mini-batch ``batch``: a list of numbers, read from the device at once."""
        losses = [loss for number, _, loss in self.watched if number == batch]
        return torch.stack(losses).tolist() if losses else []

    def check(self, epoch, checkpoint):
        """Raises InputError, naming module, epoch and mini-batch, for the first loss noted since the last check that is
        not finite. Waits for the device.
        """
        if not self.watched:
            return
        finite = torch.stack([loss for _, _, loss in self.watched]).isfinite().tolist()
        if not all(finite):
            batch, n, loss = self.watched[finite.index(False)]
            raise InputError(
                f"the loss of module {n} became {loss.item()} in epoch {epoch}, batch {batch}: "
                f"the last good checkpoint stays in {checkpoint}"
            )
        self.watched.clear()
