"""Modules that learn at the same time, in a pipeline of processes. Each stage of a decoupled.parallel.mesh.Mesh has
some consecutive modules, the lowest stage the lowest ones. Representations and labels travel up, and nothing travels
back: no module waits for one above it (Algorithm 1), unless the queue between two stages is full.

Each mini-batch travels with a request: an integer that tells the run what to do after it (decoupled.training.run). The
lowest stage chooses the request, so all stages do the same after the same mini-batch.

A run in one process has a single stage with all modules, which reads the images itself.
"""

import time
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import distributed, nn

from decoupled.errors import InputError
from decoupled.networks.evaluation import Meter, WithEnsembles, normalize_sums, weighted_sums
from decoupled.networks.modules import DecoupledNetwork
from decoupled.parallel.balance import TensorFormat, balance, check_modules_per_stage, survey
from decoupled.parallel.mesh import all_reduce_meters


class Stage:
    """This process's modules, ``modules_here``, of the network ``net``, which all processes have built identically. The
    first of them is module ``first_module`` of the network, counted from 0. The parameters of all other modules are
    freed.

    ``heads``, to be passed to ``evaluate``, returns the logits of this process's heads and sends the representation on.

    example            a batch of inputs of the network, on its device. Its values do not matter
    modules_per_stage  a list of numbers; None: balanced by FLOPs
    queue              mini-batches that may be in flight to the stage above before ``send`` waits
    autocast           the context of a forward pass
    pending_request    called in the lowest stage before each mini-batch; returns what the run should do after it: an
                       integer, 0 for nothing. The largest request of all replicas travels with the mini-batch
    """

    def __init__(
        self,
        net,
        example,
        mesh,
        *,
        modules_per_stage=None,
        queue=2,
        autocast=nullcontext,
        pending_request=lambda: 0,
    ):
        check_modules_per_stage(modules_per_stage, len(net), mesh.stages)
        self.net = net
        self.mesh = mesh
        self.processes = mesh.processes
        self.device = next(net.parameters()).device
        self.queue = queue
        self.pending_request = pending_request
        self.lowest = mesh.stage_index == 0
        self.highest = mesh.stage_index == mesh.stages - 1
        # The current mini-batch:
        self.request = 0
        self.labels = None
        self.label_formats = [TensorFormat(torch.zeros(1, dtype=torch.int64))]  # format of each of its labels
        self.ensemble_sum = 0  # weighted sum of the outputs of all heads below this stage
        self.sending = deque()  # (works, tensors) of each mini-batch in flight to the stage above
        self.waited = 0.0  # seconds spent waiting for other stages
        if mesh.stages == 1:
            self.modules_per_stage = [len(net)]
            self.first_module = 0
            self.modules_here = net
            self.heads = net
        else:
            measured = survey(net, example, autocast)
            self.modules_per_stage = modules_per_stage or balance(measured.flops, mesh.stages)
            self.first_module = sum(self.modules_per_stage[: mesh.stage_index])
            self.modules_here = net[self.first_module : self.end_module]
            self.heads = Heads(self, self.modules_here)
            self.free_other_modules()
            self.prepare_transfers(measured)

    @property
    def end_module(self):
        """The index after this process's last module."""
        return self.first_module + self.modules_per_stage[self.mesh.stage_index]

    def free_other_modules(self):
        """Frees the parameters of the other processes' modules."""
        for index, module in enumerate(self.net):
            if not self.first_module <= index < self.end_module:
                module.to("meta")

    def prepare_transfers(self, measured):
        """Prepares transfers to and from the processes below and above, of tensors described by the Survey
        ``measured``.
        """
        self.input_format = measured.inputs[self.first_module]
        self.output_format = None if self.highest else measured.inputs[self.end_module]
        self.logits_format = measured.logits
        self.group_below, self.group_above = self.mesh.links()
        # Gloo only transfers from and to main memory.
        self.transfer_device = torch.device("cpu") if distributed.get_backend() == "gloo" else self.device

    def __str__(self):
        modules = ",".join(map(str, self.modules_per_stage))
        if self.mesh.replicas > 1:
            return f"{modules}, {self.mesh.replicas} replicas of each"
        return modules

    def __repr__(self):
        return repr(self.net)

    def train(self):
        """Sets all modules to training mode."""
        self.net.train()

    def take_request(self):
        """The request of the latest mini-batch; 0 if called again before the next mini-batch."""
        request = self.request
        self.request = 0
        return request

    # Receiving

    def inputs(self, batches, with_ensemble_sum=False):
        """The inputs of this process's lowest module for ``batches`` (see decoupled.data.batches) or their Outline,
        with the same methods. Iterates over (representation (B, …), labels).

        ``labels`` are (B,), or whatever the mini-batches have instead: soft labels (B, classes), or a tuple of tensors
        (B, …) if every module needs more information about a sample.

        ``with_ensemble_sum``: whether mini-batches travel with the sum of the outputs of all heads below, which
        ``ensembles`` needs.
        """
        if self.mesh.stages == 1:
            return batches
        return Inputs(self, batches, with_ensemble_sum)

    def read_images(self, inputs):
        """Iterates over the rest of the epoch, in the lowest stage."""
        batches = inputs.batches
        for number, (images, labels) in enumerate(batches.rest(), start=batches.done):
            self.request = 0
            if number < inputs.common:  # otherwise, some replicas have no share of this mini-batch
                self.request = self.mesh.max(self.pending_request())
            self.labels = labels
            yield images, labels

    def receive_representations(self, inputs):
        """Iterates over the rest of the epoch, in the stages above the lowest."""
        sizes = inputs.batches.left
        receiving = deque(self.begin_receive(size, inputs.with_ensemble_sum) for size in sizes[: self.queue])
        for number in range(len(sizes)):
            works, request, labels, packed, ensemble_sum = receiving.popleft()
            self.wait_for(works, self.mesh.below)
            if number + self.queue < len(sizes):
                receiving.append(self.begin_receive(sizes[number + self.queue], inputs.with_ensemble_sum))
            inputs.batches.advance()
            self.request = int(request)
            self.labels = self.unpack_labels(labels)
            self.ensemble_sum = 0 if ensemble_sum is None else ensemble_sum.to(self.device)
            yield self.input_format.unpack(packed.to(self.device)), self.labels

    def begin_receive(self, samples, with_ensemble_sum):
        """Starts to receive a mini-batch of ``samples`` samples into new tensors. Returns an Arriving."""
        request = torch.empty((), dtype=torch.int64)
        labels = [form.empty(samples, self.transfer_device) for form in self.label_formats]
        packed = self.input_format.empty(samples, self.transfer_device)
        tensors = [request, *labels, packed]
        ensemble_sum = None
        if with_ensemble_sum:
            ensemble_sum = self.logits_format.empty(samples, self.transfer_device)
            tensors.append(ensemble_sum)
        works = self.transfer(distributed.irecv, tensors, self.mesh.below, self.group_below)
        return Arriving(works, request, labels, packed, ensemble_sum)

    def unpack_labels(self, packed):
        """The labels that were sent as ``packed``, a list of tensors: a single tensor, or a tuple of several."""
        labels = [form.unpack(one.to(self.device)) for form, one in zip(self.label_formats, packed, strict=True)]
        return labels[0] if len(labels) == 1 else tuple(labels)

    # Sending

    def send(self, representation, labels, *ensemble_sum):
        """Sends a mini-batch to the stage above: ``representation`` (B, …), detached, and ``labels`` as received.

        Waits only while the queue is full. Does nothing in the highest stage. Raises InputError for tensors in another
        form than the example of the data.
        """
        if self.highest:
            return
        while len(self.sending) >= self.queue:
            self.finish_oldest_send()
        request = torch.tensor(self.request)
        packed = [*self.pack_labels(labels), self.output_format.pack(representation)]
        tensors = [request, *(tensor.to(self.transfer_device) for tensor in (*packed, *ensemble_sum))]
        works = self.transfer(distributed.isend, tensors, self.mesh.above, self.group_above)
        self.sending.append((works, tensors))  # the tensors must live until they are sent

    def pack_labels(self, labels):
        """Packs ``labels`` for ``unpack_labels``. Raises InputError for another number of tensors."""
        tensors = as_list(labels)
        if len(tensors) != len(self.label_formats):
            raise InputError(
                f"the labels on their way to the stage above are {len(tensors)} tensors, where the example of the data "
                f"has {len(self.label_formats)}: send the labels as they came"
            )
        return [form.pack(one) for form, one in zip(self.label_formats, tensors, strict=True)]

    def finish_oldest_send(self):
        """Waits until the oldest mini-batch in the queue has been sent, and frees its tensors."""
        works, _ = self.sending.popleft()
        self.wait_for(works, self.mesh.above)

    def transfer(self, begin, tensors, other, group):
        """Starts to send the ``tensors`` of a mini-batch to process ``other``, or to receive them from it: ``begin`` is
        isend or irecv. Returns the list of works.

        The first tensor, the request, travels from CPU to CPU, so that no process waits for a GPU to read it.
        """
        request, *others = tensors
        with self.processes.waiting(other):
            works = [begin(request, other, group=self.processes.control, tag=1)]
            for number, tensor in enumerate(others, start=2):
                works.append(begin(tensor, other, group=group, tag=number))
        return works

    def wait_for(self, works, other):
        """Waits until the ``works`` with process ``other`` are done."""
        since = time.perf_counter()
        with self.processes.waiting(other):
            for work in works:
                work.wait()
        self.waited += time.perf_counter() - since

    # Evaluation

    def recompute_statistics(self, images):
        """Recomputes batch norm's running means and variances with the current weights, as the means over the
        mini-batches of ``images`` (Batches.without_augmentation). Training does not read them; evaluation does.

        The usual running statistics average over the latest mini-batches, which were computed with other weights. With
        few mini-batches per epoch, test top-1 then jumps between epochs. "Precise" statistics: Wu and Johnson (2021,
        arXiv 2105.07576), Sec. 3.
        """
        norms = batch_norms(self.modules_here)
        momenta = [norm.momentum for norm in norms]
        counts = [norm.num_batches_tracked.clone() for norm in norms]
        self.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all mini-batches have the same weight
        with torch.no_grad():
            for representation, labels in self.inputs(images):
                for module in self.modules_here:
                    representation, _ = module(representation)
                self.send(representation, labels)
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)

    def heads_of(self, modules):
        """Like ``heads``, with other ``modules`` in place of ``modules_here``, such as averages of their weights."""
        if self.mesh.stages == 1:
            return DecoupledNetwork(modules)
        return Heads(self, modules)

    def ensembles(self, probabilities=True):
        """Like ``heads``, followed by the ensembles up to each head: of probabilities, or of logits. See
        decoupled.networks.evaluation.WithEnsembles.
        """
        if self.mesh.stages == 1:
            return WithEnsembles(self.net, probabilities)
        return Heads(self, self.modules_here, ensembles="probabilities" if probabilities else "logits")

    # Gathering in process 0

    def gather(self, *meters_of_kinds):
        """For each list of Meters of this process's modules, gathers the Meters of all modules, summed over replicas,
        in process 0. Returns empty lists in the other processes.
        """
        reduced = [all_reduce_meters(meters, self.mesh) for meters in meters_of_kinds]
        if self.mesh.stages == 1:
            return reduced
        states = [[(meter.topk, meter.state_dict()) for meter in meters] for meters in reduced]
        gathered = [[] for _ in states]
        for states_of_stage in self.mesh.to_first(states):
            for meters, meter_states in zip(gathered, states_of_stage, strict=True):
                for topk, state in meter_states:
                    meter = Meter(topk)
                    meter.load_state_dict(state)
                    meters.append(meter)
        return gathered

    def own(self, values):
        """The part of ``values``, which has one entry for each module of the network, that belongs to this process's
        modules; [] if ``values`` is empty. Raises ValueError for another number of values.
        """
        if values and len(values) != len(self.net):
            raise ValueError(f"{len(values)} modules, not {len(self.net)}")
        return values[self.first_module : self.first_module + len(self.modules_here)]

    def state_dict(self):
        """The parameters and buffers of this process's modules, under their names in the whole network."""
        return {key: value for key, value in self.net.state_dict().items() if not value.is_meta}

    def load_state_dict(self, state):
        """Loads this process's part of the ``state`` of the whole network."""
        self.net.load_state_dict(state)


class Arriving(NamedTuple):
    """A mini-batch that a stage has started to receive. The tensors are filled when the ``works`` are done."""

    works: list
    request: torch.Tensor
    labels: list  # packed, one tensor for each label
    packed: torch.Tensor  # the representation
    ensemble_sum: torch.Tensor | None


def as_list(labels):
    """The tensors of a mini-batch's ``labels``, which are a single tensor or a tuple of several."""
    return [labels] if isinstance(labels, torch.Tensor) else list(labels)


def batch_norms(net):
    """The batch norms in ``net`` that have running statistics."""
    kind = nn.modules.batchnorm._BatchNorm  # also of three dimensions, and those over several replicas
    return [layer for layer in net.modules() if isinstance(layer, kind) and layer.track_running_stats]


class Heads(nn.Module):
    """The heads of the ``modules`` of a stage, for decoupled.networks.evaluation.evaluate: representation (B, …) → list
    of logits (B, classes), followed by the ensembles up to each head if ``ensembles`` is "probabilities" or "logits".

    A forward pass sends the representation, and with ``ensembles`` the ensemble sum, to the stage above.
    """

    def __init__(self, stage, modules, ensembles=None):
        super().__init__()
        self.stage = stage
        self.modules_here = nn.ModuleList(modules)
        self.ensembles = ensembles

    def forward(self, representation):
        all_logits = []
        for module in self.modules_here:
            representation = module.body(representation)
            all_logits.append(module.auxiliary(representation))
        if self.ensembles is None:
            self.stage.send(representation, self.stage.labels)
            return all_logits

        all_logits = [logits.float() for logits in all_logits]
        outputs = all_logits
        if self.ensembles == "probabilities":
            outputs = [logits.softmax(1) for logits in all_logits]
        sums = weighted_sums(outputs, self.stage.first_module, self.stage.ensemble_sum)
        self.stage.send(representation, self.stage.labels, sums[-1])
        return all_logits + normalize_sums(sums, self.stage.first_module)


class Inputs:
    """The inputs of ``stage`` for the images of ``batches``: see Stage.inputs. As with Batches, iterating begins an
    epoch, and ``rest`` iterates over the rest of the current one.
    """

    def __init__(self, stage, batches, with_ensemble_sum):
        self.stage = stage
        self.batches = batches
        self.with_ensemble_sum = with_ensemble_sum

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.batches.begin()
        return self.rest()

    def rest(self):
        if self.batches.example is not None:
            _, labels = self.batches.example
            self.stage.label_formats = [TensorFormat(one) for one in as_list(labels)]
        if self.stage.lowest:
            return self.stage.read_images(self)
        return self.stage.receive_representations(self)

    @property
    def weight(self):
        """See decoupled.data.batches.Outline."""
        return self.batches.weight

    @property
    def common(self):
        """The number of mini-batches of which every replica has a share."""
        if self.stage.mesh.replicas == 1:
            return len(self)
        return self.batches.common
