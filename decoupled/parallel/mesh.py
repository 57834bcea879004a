"""The processes of a run as a mesh of stages × replicas. Each stage has some of the modules; the replicas of a stage
share every mini-batch. Data parallelism is a mesh with one stage.
"""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from decoupled.data.batches import Outline
from decoupled.errors import InputError
from decoupled.networks.evaluation import Meter


class Mesh:
    """The place of this process in the mesh: stage ``stage_index`` of ``stages`` and, within it, replica
    ``replica_index`` of ``replicas``. Both count from 0.

    The replicas of a stage have consecutive ranks, because gradients need more bandwidth than representations: torchrun
    then puts whole stages on each machine. Raises InputError if the number of processes is not a multiple of
    ``stages``.
    """

    def __init__(self, processes, stages):
        if processes.size % stages:
            raise InputError(
                f"--stages {stages} needs {stages} processes or a multiple of that, not {processes.size}: "
                "start as many with torchrun --nproc-per-node"
            )
        self.processes = processes
        self.stages = stages
        self.replicas = processes.size // stages
        self.is_data_parallel = False  # whether replicas average their gradients
        self.stage_index, self.replica_index = divmod(processes.rank, self.replicas)
        # Groups of the replicas of this stage
        self.group = None  # for tensors on the device; None: all processes
        self.control = processes.control  # for tensors on the CPU
        if stages > 1 and self.replicas > 1:
            self.make_groups()

    def make_groups(self):
        """Makes the groups of all stages, as every process must, and keeps those of this process's stage."""
        for first in range(0, self.processes.size, self.replicas):
            members = range(first, first + self.replicas)
            group = self.processes.group(members)
            control = self.processes.group(members, "gloo")
            if self.processes.rank in members:
                self.group = group
                self.control = control

    @property
    def below(self):
        """The rank of the process that sends representations to this one."""
        return self.processes.rank - self.replicas

    @property
    def above(self):
        """The rank of the process to which this one sends representations."""
        return self.processes.rank + self.replicas

    def links(self):
        """(group with the process below, group with the process above), or None if there is no such process. All
        processes must call this.
        """
        groups = {}
        for lower in range(self.processes.size - self.replicas):
            groups[lower] = self.processes.group([lower, lower + self.replicas])
        return groups.get(self.below), groups.get(self.processes.rank)

    # Among the replicas of a stage

    def sum(self, tensor):
        """The sum of a tensor over the replicas, on the CPU. With one replica, the tensor itself."""
        if self.replicas == 1:
            return tensor
        total = tensor.cpu().clone()
        with self.processes.waiting():
            distributed.all_reduce(total, group=self.control)
        return total

    def max(self, value):
        """The maximum of ``value``, an integer, over the replicas."""
        if self.replicas == 1:
            return value
        largest = torch.tensor([value])
        with self.processes.waiting():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.control)
        return int(largest)

    def data_parallel(self, modules, local_batch_norm=False):
        """Wraps each of ``modules`` in its own DistributedDataParallel, for training steps. With one replica, returns
        the modules themselves.

        Buffers are equal in all replicas at the start and stay equal, so they are not broadcast. With
        ``local_batch_norm``, running statistics differ, and each forward pass starts from those of replica 0.
        """
        if self.replicas == 1:
            return list(modules)
        self.is_data_parallel = True
        device = self.processes.device
        options = {
            "process_group": self.group,
            "device_ids": [device.index] if device.type == "cuda" else None,
            "broadcast_buffers": local_batch_norm,
            "gradient_as_bucket_view": True,
        }
        return [DistributedDataParallel(module, **options) for module in modules]

    def broadcast_buffers(self, net):
        """Copies the buffers of ``net`` from replica 0 to all replicas."""
        if self.replicas == 1:
            return
        first = self.processes.rank - self.replica_index
        with self.processes.waiting(first):
            for buffer in net.buffers():
                distributed.broadcast(buffer, first, group=self.group)

    # Among the stages

    def load_data(self, load):
        """In the lowest stage, what ``load()`` returns: (train, test, number of classes). In the stages above, Outlines
        instead of train and test. Process 0 loads first because it may have to download the images. Raises
        InputError if ``load`` does, or if a replica has different data than process 0, for example an incomplete
        copy.
        """
        if self.processes.size == 1:
            return load()
        loaded = None

        def load_and_outline():
            nonlocal loaded
            loaded = load()
            train, test, classes = loaded
            outlines = [(batches.outline_arguments, to_cpu(batches.example)) for batches in (train, test)]
            return outlines, classes, fingerprints(train, test)

        outlines, classes, expected = self.processes.from_first(load_and_outline)
        if self.stage_index > 0:
            return *(self.outline(*known) for known in outlines), classes
        if loaded is None:  # in the other replicas of the lowest stage
            loaded = load()
        train, test, _ = loaded
        if fingerprints(train, test) != expected:
            raise InputError(
                f"process {self.processes.rank} has other images than process 0, {train} and {test}: give all machines "
                "the same data set"
            )
        return loaded

    def outline(self, outline, example):
        """This process's Outline of mini-batches with the given ``outline`` and ``example``."""
        return Outline(*outline, self.replica_index, self.replicas, example)

    def to_first(self, value):
        """In process 0, the ``value`` of replica 0 of each stage, lowest first; elsewhere []."""
        return self.processes.to_first(value, range(0, self.processes.size, self.replicas))


def to_cpu(tensors):
    """Moves ``tensors``, in nested lists, tuples and dicts, to the CPU."""
    return tree_map(torch.Tensor.cpu, tensors)


def fingerprints(*splits):
    """The fingerprint of each split's images; None for a split without one."""
    return [getattr(split, "fingerprint", None) for split in splits]


def all_reduce_meters(meters, mesh):
    """Meters with the counts of all replicas of ``mesh``, a Mesh."""
    if mesh.replicas == 1 or not meters:
        return meters
    totals = mesh.sum(torch.stack([meter.sums() for meter in meters]))
    reduced = [Meter(meter.topk) for meter in meters]
    for meter, sums in zip(reduced, totals, strict=True):
        meter.load_state_dict({"sums": sums})
    return reduced
