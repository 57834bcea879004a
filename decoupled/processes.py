"""The processes that torchrun started together; a process started without it is the only one."""

import os
import sys
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from decoupled import InputError

TIMEOUT = timedelta(minutes=10)  # until a process that waits for another gives up
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


class Processes:
    """This process among those that share a run: number ``rank`` of ``size``, on ``device``.

    Process 0 alone prints, logs and saves. Raises InputError when there are more processes than GPUs, and when they do
    not find each other.
    """

    def __init__(self, device, backend=None):
        self.rank, self.size, local = launched()
        self.device, self.control, self.store = device, None, None
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
        try:
            # torchrun's store outlives the processes: a restarted attempt must not meet what the last one left there.
            self.store, _, _ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
            attempt = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", self.store)
            where = {"store": attempt, "rank": self.rank, "world_size": self.size}
            distributed.init_process_group(backend, timeout=TIMEOUT, **where)
        except (distributed.DistError, RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"process {self.rank} has not found the others at {address} ({reason})") from error
        self.control = distributed.new_group(backend="gloo", timeout=TIMEOUT)  # for what the CPU decides: no GPU waits

    def sum(self, tensor):
        """The sum of a tensor over all processes, on the CPU; alone, the tensor itself."""
        if self.size == 1:
            return tensor
        total = tensor.cpu().clone()
        distributed.all_reduce(total, group=self.control)
        return total

    def agree(self, value):
        """The greatest ``value``, an integer, of all processes."""
        if self.size == 1:
            return value
        greatest = torch.tensor([value])
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX, group=self.control)
        return int(greatest)

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
        distributed.broadcast_object_list(outcome, src=0, group=self.control, device="cpu")
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]

    def replicas(self, net, local_batch_norm=False):
        """What a step calls instead of the modules of ``net``: each in its own DistributedDataParallel; alone,
        themselves.

        Parameters and batch norm start the same in all processes and stay the same, so none are broadcast; with
        ``local_batch_norm`` running statistics differ, and process 0's count.
        """
        if self.size == 1:
            return list(net)
        options = {"device_ids": [self.device.index]} if self.device.type == "cuda" else {}
        options |= {"broadcast_buffers": local_batch_norm, "gradient_as_bucket_view": True}
        return [DistributedDataParallel(module, **options) for module in net]

    def same_buffers(self, net):
        """Gives all processes the buffers that ``net`` has in process 0."""
        for buffer in net.buffers() if self.size > 1 else ():
            distributed.broadcast(buffer, 0)

    def __str__(self):
        return f"{self.size}, {distributed.get_backend()}"

    def close(self):
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
