"""The memory of a CPU process."""

import ctypes
import os
import platform


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
