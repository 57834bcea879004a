"""The processes of a run as a mesh: stages, each with some of the modules, times replicas of each stage, which share
every mini-batch. Data parallelism is a mesh of one stage.
"""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from decoupled.data.batches import Outline
from decoupled.errors import InputError
from decoupled.networks.evaluation import Meter


class Mesh:
    """Where this process is: in ``stage`` of ``stages``, of which it is ``replica`` of ``replicas``.

    The replicas of a stage have consecutive numbers, since gradients are more than representations: of several
    machines, each should have whole stages. Raises InputError where the processes do not divide into stages.
    """

    def __init__(self, processes, stages):
        if processes.size % stages:
            raise InputError(
                f"--stages {stages} needs {stages} processes or a multiple of that, not {processes.size}: "
                "start as many with torchrun --nproc-per-node"
            )
        self.processes, self.stages, self.replicas = processes, stages, processes.size // stages
        self.stage, self.replica = divmod(processes.rank, self.replicas)
        self.group, self.control = None, processes.control  # of this stage's replicas: on their devices, on the CPU
        for first in range(0, processes.size, self.replicas) if stages > 1 and self.replicas > 1 else ():
            members = range(first, first + self.replicas)
            group, control = processes.group(members), processes.group(members, "gloo")
            if processes.rank in members:
                self.group, self.control = group, control

    @property
    def below(self):
        """The process that sends representations to this one."""
        return self.processes.rank - self.replicas

    @property
    def above(self):
        """The process that this one sends representations to."""
        return self.processes.rank + self.replicas

    def links(self):
        """(group with the process below, group with that above), None where there is none. All processes call this."""
        lower = range(self.processes.size - self.replicas)
        groups = {low: self.processes.group([low, low + self.replicas]) for low in lower}
        return groups.get(self.below), groups.get(self.processes.rank)

    # Among the replicas of this stage

    def sum(self, tensor):
        """The sum of a tensor over the replicas, on the CPU; alone, the tensor itself."""
        if self.replicas == 1:
            return tensor
        total = tensor.cpu().clone()
        with self.processes.waiting():
            distributed.all_reduce(total, group=self.control)
        return total

    def agree(self, value):
        """The greatest ``value``, an integer, of the replicas."""
        if self.replicas == 1:
            return value
        greatest = torch.tensor([value])
        with self.processes.waiting():
            distributed.all_reduce(greatest, distributed.ReduceOp.MAX, group=self.control)
        return int(greatest)

    def parallel(self, modules, local_batch_norm=False):
        """What a step calls instead of the ``modules``: each in its own DistributedDataParallel; alone, themselves.

        Parameters and batch norm start the same in all replicas and stay the same, so none are broadcast; with
        ``local_batch_norm`` running statistics differ, and those of replica 0 count.
        """
        if self.replicas == 1:
            return list(modules)
        device = self.processes.device
        options = {"device_ids": [device.index]} if device.type == "cuda" else {}
        options |= {"broadcast_buffers": local_batch_norm, "gradient_as_bucket_view": True}
        return [DistributedDataParallel(module, process_group=self.group, **options) for module in modules]

    def same_buffers(self, net):
        """Gives all replicas the buffers that ``net`` has in replica 0."""
        first = self.processes.rank - self.replica
        for buffer in net.buffers() if self.replicas > 1 else ():
            distributed.broadcast(buffer, first, group=self.group)

    # Among the stages

    def images(self, load):
        """What ``load()`` gives, (train, test, number of classes), in the lowest stage, and above it Outlines of that.
        Raises InputError where ``load`` does.
        """
        if self.stage == 0:
            train, test, classes = load()
        outline = self.processes.from_first(lambda: (train.outline, test.outline, classes))
        if self.stage > 0:
            train, test = (Outline(*sizes, self.replica, self.replicas) for sizes in outline[:2])
        return train, test, outline[2]

    def to_first(self, value):
        """The ``value`` of replica 0 of every stage, from the lowest up, in process 0; an empty list in the others."""
        return self.processes.to_first(value, range(0, self.processes.size, self.replicas))


def all_reduce_meters(meters, mesh):
    """The Meters of what all replicas of ``mesh`` (decoupled.parallel.mesh.Mesh) have measured, by one reduction."""
    if mesh.replicas == 1 or not meters:
        return meters
    totals = mesh.sum(torch.stack([meter.sums() for meter in meters]))
    everywhere = [Meter(meter.topk) for meter in meters]
    for meter, sums in zip(everywhere, totals, strict=True):
        meter.load_state_dict({"sums": sums})
    return everywhere
