"""The device of a run, its memory and its kernels."""

import ctypes
import os
import platform

import torch

from decoupled.errors import InputError


def pick_device(name, setting="--device "):
    """The torch.device called ``name``. "auto" is CUDA if available, else MPS, else the CPU.

    Raises InputError for a device that this machine does not have. ``setting`` says in the message how it was chosen.
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

    By default, glibc returns the largest blocks to the kernel immediately, and each step pays for mapping and clearing
    them again. On two cores, the DGL step of learning_curves processes 465 images/s with this and 407 without in fp32.
    In bf16, whose blocks are half as large, it makes no difference (benchmarks/throughput.py, with and without
    --plain-malloc). It does not affect results, and has no effect with other C libraries.
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
    """Lets cuDNN time its kernels and choose the fastest. With ``deterministic``, makes PyTorch use deterministic
    kernels instead, and warn about operations that have none.

    Raises InputError for ``deterministic`` on any device but CUDA.
    """
    if deterministic and device.type != "cuda":
        raise InputError(f"--deterministic is for CUDA: leave it out on {device.type}")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # filling new memory takes time, and nothing here reads it uninitialized
        )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first matrix product
