"""The processes that torchrun started together; a process started without it is the only one."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from decoupled.errors import InputError
from decoupled.training.console import silent_libraries

TIMEOUT = 600.0  # seconds until a process that waits for another gives up


GRACE = 3.0  # seconds in which a process that ends for a reason lets the others know


LOOK = 0.5  # seconds between looks whether torchrun lives


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def launched():
    """(rank, number of processes, rank on this machine) as torchrun's variables say; (0, 1, 0) without it.

    Raises InputError where they are incomplete or contradict each other.
    """
    if not any(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return 0, 1, 0
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise InputError(
            f"{missing[0]} is not set, and other variables of torchrun are: start with torchrun, or unset them"
        )
    try:
        rank, size, local = (int(os.environ[name]) for name in VARIABLES[:3])
        consistent = 0 <= local <= rank < size and 0 < int(os.environ["MASTER_PORT"]) < 65536
    except ValueError:
        consistent = False
    if not consistent:
        values = " ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
        raise InputError(f"{values} contradict each other: start with torchrun, or unset them")
    return rank, size, local


_job = {}  # "store": of all processes of this job, once this one has found it


def job_store(seconds=TIMEOUT):
    """The key-value store of all processes of this job, through all its attempts; the first call waits for the others
    for at most so many ``seconds``.
    """
    if "store" not in _job:
        _job["store"] = next(distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
    return _job["store"]


def end_with_torchrun():
    """Ends this process with exit code 2 soon after torchrun, which started it, died without ending it: nobody would
    start it anew, and a run that goes on unseen keeps a new one from its files.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(LOOK)
        if os.environ["RANK"] == "0":
            name = os.path.basename(sys.argv[0])
            print(f"{name}: error: torchrun has died; --resume goes on from the last checkpoint", file=sys.stderr)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def attempt_store():
    """The part of the job's store that is of this attempt: torchrun's store outlives the processes, and one that was
    restarted must not meet what the last attempt left there.
    """
    return distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", job_store())


def first_to_say(message):
    """Whether this process is the first of its run to say ``message``, by which it ends, and so the one to print it.
    The others are told that it ended for a reason.
    """
    there = _job or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not there or not os.environ.get("RANK"):
        return True
    try:
        store = attempt_store()
        store.set(f"ended {os.environ['RANK']}", "")
        return store.add(f"said {message}", 1) == 1
    except (RuntimeError, ValueError):  # the store is gone
        return True


class Processes:
    """This process among those that share a run: number ``rank`` of ``size``, on ``device``. One that waits for another
    longer than ``timeout`` seconds gives up.

    Process 0 alone prints, logs and saves. Raises InputError when there are more processes than GPUs, when they do not
    find each other and, in any method, when another process has ended or does not answer.
    """

    def __init__(self, device, backend=None, timeout=TIMEOUT):
        self.rank, self.size, local = launched()
        self.device, self.timeout, self.control, self.store = device, timedelta(seconds=timeout), None, None
        self.remembered = None
        if self.size > 1:
            self.join(local, backend)

    def join(self, local, backend):
        """Meets the other processes."""
        if self.device.index is not None:
            raise InputError(
                f"--device {self.device} is one device, and each process takes its own: "
                f"choose --device {self.device.type}"
            )
        backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")
        if self.device.type == "cuda":
            count = torch.cuda.device_count()
            if backend == "nccl" and int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) > count:
                raise InputError(
                    f"there are more processes than GPUs ({count}): start fewer, or let them share with --backend gloo"
                )
            self.device = torch.device("cuda", local % count)
            torch.cuda.set_device(self.device)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it lives as long as the process
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_torchrun()
        try:
            with silent_libraries():
                job = job_store(self.timeout.total_seconds())
            self.store = attempt_store()
            if job.check(["checkpoint"]):  # asked before process 0 can have one in this attempt
                self.remembered = job.get("checkpoint").decode()
            where = {"store": self.store, "rank": self.rank, "world_size": self.size}
            distributed.init_process_group(backend, timeout=self.timeout, **where)
        except (distributed.DistError, RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"process {self.rank} has not found the others at {address} ({reason})") from error
        # For what the CPU decides: no GPU waits.
        self.control = distributed.new_group(backend="gloo", timeout=self.timeout)

    def from_first(self, make):
        """What ``make()`` gives in process 0, in all of them. An InputError there is raised in all."""
        if self.size == 1:
            return make()
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except InputError as error:
                outcome[1] = str(error)
        with self.waiting(None if self.rank == 0 else 0):
            distributed.broadcast_object_list(outcome, src=0, group=self.control, device="cpu")
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def to_first(self, value, senders):
        """The ``value`` of each of ``senders``, process 0 and others, in process 0; an empty list in the others."""
        if self.rank == 0:
            return [value, *(self.receive(other) for other in senders[1:])]
        if self.rank in senders:
            with self.waiting(0):
                distributed.send_object_list([value], 0, group=self.control)
        return []

    def receive(self, other):
        """What process ``other`` sends by ``to_first``."""
        values = [None]
        with self.waiting(other):
            distributed.recv_object_list(values, other, group=self.control)
        return values[0]

    def group(self, members, backend=None):
        """A group of the processes ``members``. All processes call this."""
        return distributed.new_group([*members], timeout=self.timeout, backend=backend)

    def wait(self):
        """Returns when all processes are here."""
        if self.size > 1:
            with self.waiting():
                distributed.barrier(group=self.control)

    # Signals, restarts and failures, by way of the store: nobody waits for anybody

    @contextmanager
    def noting(self):
        """In this block the store is used, which goes where torchrun does. Raises InputError then."""
        try:
            with silent_libraries():
                yield
        except RuntimeError as error:
            time.sleep(GRACE)  # in which end_with_torchrun ends this process
            raise InputError("the store of torchrun has gone; --resume goes on from the last checkpoint") from error

    def tell_first(self, number):
        """Tells process 0 the ``number`` of the signal that this one has received, 0 for none. Returns there what any
        process has told, 0 in the others.
        """
        with self.noting():
            if number and self.rank:
                self.store.set("signal", str(number))
            if number or self.rank:
                return 0 if self.rank else number
            return int(self.store.get("signal")) if self.store.check(["signal"]) else 0

    def note(self, name, value=""):
        """Lets all processes know ``value`` under this name, for as long as this attempt goes on."""
        with self.noting():
            self.store.set(name, str(value))

    def noted(self, *names):
        """Whether there is a note under each of the names."""
        with self.noting():
            return self.store.check([*names])

    def note_of(self, name):
        """The note under this name; None where there is none."""
        with self.noting():
            return self.store.get(name).decode() if self.store.check([name]) else None

    def beats(self):
        """How often each process has called this; an empty list until all have."""
        names = [f"beats {rank}" for rank in range(self.size)]
        with self.noting():
            self.store.add(names[self.rank], 1)
            return [int(count) for count in self.store.multi_get(names)] if self.store.check(names) else []

    def remember(self, checkpoint):
        """Notes the path of this job's ``checkpoint``, which is ``remembered`` in the processes that torchrun starts
        when one has failed.
        """
        if self.size > 1 and self.rank == 0:
            with self.noting():
                job_store().set("checkpoint", str(checkpoint))

    @contextmanager
    def waiting(self, other=None):
        """In this block the process waits for process ``other``, None: for all. It ends with an InputError where that
        one has ended or hangs, and without a word where that one said why.
        """
        try:
            yield
        except RuntimeError as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, while this process says what it knows
            late = "imed out" in str(error) or "imeout" in str(error)
            with self.noting():
                self.store.set(f"ended {self.rank}", "")
                told = self.told(other)
            if told:
                sys.exit(2)
            name = "another process" if other is None else f"process {other}"
            if late:
                outcome = f"has not answered for {self.timeout.total_seconds():g} s: raise --timeout if it was slow"
            else:
                outcome = "has ended: see its own words"
            raise InputError(f"{name} {outcome}; --resume goes on from the last checkpoint") from error

    def told(self, other):
        """Whether process ``other``, or any where it is None, ends for a reason: because it waited in vain itself, for
        one. The one that was killed or hangs says nothing.
        """
        others = [other] if other is not None else [rank for rank in range(self.size) if rank != self.rank]
        end = time.monotonic() + GRACE
        while not (told := any(self.store.check([f"ended {rank}"]) for rank in others)) and time.monotonic() < end:
            time.sleep(0.05)
        return told

    def __str__(self):
        return f"{self.size}, {distributed.get_backend()}"

    def close(self):
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
            _job.clear()
