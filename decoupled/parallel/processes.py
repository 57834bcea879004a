"""The processes that torchrun starts for one run. Without torchrun there is a single process, and nothing here waits.

torchrun passes signals on to all processes, ends the others when one fails and, with --max-restarts, starts all of them
again.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

from decoupled.errors import EXIT_BAD_INPUT, InputError

TIMEOUT = 600.0  # seconds to wait for another process

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


class Launched(NamedTuple):
    """How torchrun started this process."""

    rank: int
    size: int  # number of processes
    local_rank: int  # rank among the processes of this machine


def launched():
    """How torchrun started this process, from its environment variables; (0, 1, 0) without torchrun."""
    if not os.environ.get("RANK"):
        return Launched(rank=0, size=1, local_rank=0)
    for name in VARIABLES:
        if not os.environ.get(name):
            raise InputError(f"RANK is set but {name} is not: start with torchrun, or unset RANK")
    return Launched(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


class Processes:
    """The processes of the run, as seen from this one: number ``rank`` of ``size``, on ``device``.

    Only process 0 prints, logs and saves. A process that waits longer than ``timeout`` seconds for another gives up.

    With --max-restarts, torchrun may start the processes several times: each time is an attempt. ``store`` is
    torchrun's key-value store for this attempt; None in a single process. ``earlier_checkpoint`` is the path that an
    earlier attempt passed to ``remember_checkpoint``; None if there was none.

    Raises InputError if there are more processes than GPUs, if the processes do not find each other and, in all
    methods, if another process has ended or does not answer.
    """

    def __init__(self, device, backend=None, timeout=TIMEOUT):
        self.rank, self.size, local_rank = launched()
        self.device = device
        self.timeout = timedelta(seconds=timeout)
        self.earlier_checkpoint = None
        self.store = None
        self.job_store = None  # the store of all attempts
        self.control = None  # a group for tensors on the CPU, so that no process waits for a GPU
        if self.size > 1:
            backend = backend or ("nccl" if device.type == "cuda" else "gloo")
            self.device = device_of_process(device, backend, local_rank, self.size)
            self.silence()
            self.connect(backend)

    def silence(self):
        """Discards what this process prints, unless it is process 0."""
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends

    def connect(self, backend):
        """Connects this process with the others."""
        try:
            self.job_store, _, _ = next(distributed.rendezvous("env://", timeout=self.timeout))
            # Read now: process 0 of this attempt may overwrite it as soon as all have called init_process_group.
            if self.job_store.check(["checkpoint"]):
                self.earlier_checkpoint = self.job_store.get("checkpoint").decode()
            # The store survives a restart. The prefix hides the entries of earlier attempts.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = distributed.PrefixStore(f"attempt {attempt}", self.job_store)
            distributed.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=self.timeout
            )
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"process {self.rank} could not find the others at {address} ({reason})") from error
        self.control = distributed.new_group(backend="gloo", timeout=self.timeout)

    def from_first(self, make):
        """Calls ``make()`` in process 0 and returns its result in all processes.

        If ``make`` raises InputError, process 0 prints the error and the others exit silently with code 2.
        """
        if self.size == 1:
            return make()
        if self.rank == 0:
            try:
                value = make()
            except InputError:
                self.broadcast([False, None])
                raise
            self.broadcast([True, value])
            return value
        received = [None, None]
        self.broadcast(received)
        succeeded, value = received
        if not succeeded:
            sys.exit(EXIT_BAD_INPUT)
        return value

    def broadcast(self, values):
        """Overwrites the list ``values`` with process 0's."""
        with self.waiting(None if self.rank == 0 else 0):
            distributed.broadcast_object_list(values, src=0, group=self.control, device="cpu")

    def to_first(self, value, senders):
        """In process 0, a list with the ``value`` of each of ``senders``, the first of which is process 0. In the
        others, [].
        """
        if self.rank == 0:
            return [value, *(self.receive(sender) for sender in senders[1:])]
        if self.rank in senders:
            with self.waiting(0):
                distributed.send_object_list([value], 0, group=self.control)
        return []

    def receive(self, sender):
        """The value that process ``sender`` passed to ``to_first``."""
        values = [None]
        with self.waiting(sender):
            distributed.recv_object_list(values, sender, group=self.control)
        return values[0]

    def group(self, members, backend=None):
        """A group of the processes ``members``. All processes must call this."""
        return distributed.new_group([*members], timeout=self.timeout, backend=backend)

    def wait(self):
        """Returns when all processes have called this."""
        if self.size > 1:
            with self.waiting():
                distributed.barrier(group=self.control)

    @contextmanager
    def waiting(self, other=None):
        """A context for an operation that waits for process ``other``, or for any process (None). Turns its
        RuntimeError into an InputError: the other process has ended or hangs.
        """
        try:
            yield
        except RuntimeError as error:
            raise self.lost(other) from error

    def lost(self, other=None):
        """An InputError: process ``other``, or any process (None), has ended or hangs."""
        name = "another process" if other is None else f"process {other}"
        return InputError(
            f"{name} has ended, or has not answered for {self.timeout.total_seconds():g} s (--timeout): see its output "
            "above; --resume continues from the last checkpoint"
        )

    def remember_checkpoint(self, checkpoint):
        """Keeps the path of this run's ``checkpoint`` for later attempts, as their ``earlier_checkpoint``."""
        if self.size > 1 and self.rank == 0:
            self.job_store.set("checkpoint", str(checkpoint))

    def __str__(self):
        return f"{self.size}, {distributed.get_backend()}"

    def close(self):
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def device_of_process(device, backend, local_rank, size):
    """The device of process ``local_rank`` of this machine. Raises InputError if there is none left for it."""
    if device.index is not None:
        raise InputError(
            f"--device {device} is a single device, but each process needs its own: choose --device {device.type}"
        )
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if backend == "nccl" and local_size > count:
        raise InputError(
            f"there are more processes than GPUs ({count}): start fewer, or let them share with --backend gloo"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device
