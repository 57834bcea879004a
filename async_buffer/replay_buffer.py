"""The replay buffer between two modules that learn asynchronously (Sec. 5.6, Algorithm 2), its compression, and the
memory it takes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from decoupled import InputError

SAMPLING = ("priority_lifo", "fifo")
BITS = (8, 4)


class Sample(NamedTuple):
    """A mini-batch as a module reads it."""

    representation: torch.Tensor  # (B, C, h, w), channels-last, detached
    labels: torch.Tensor  # (B,)
    uses: int  # how often it had been read before
    step: int  # number of steps that the module that wrote it had taken


class PlainStorage:
    """Memory for ``capacity`` representations (B, C, h, w), channels-last and with their own ``dtype``. Reading from
    the same ``device`` copies nothing.

    ``pinned``: in page-locked main memory, which a GPU reads and writes asynchronously, in order with its other work.
    """

    def __init__(self, capacity, batch_size, shape, *, dtype, device, pinned):
        channels, height, width = shape
        self.pinned = pinned
        size = (capacity, batch_size, height, width, channels)
        self.values = torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

    def tensors(self):
        """{name: tensor} of everything that is stored; the first dimension counts slots."""
        return {"values": self.values}

    def write(self, slot, representation):
        self.values[slot].copy_(representation.permute(0, 2, 3, 1), non_blocking=self.pinned)

    def read(self, slot, device):
        return self.values[slot].to(device, non_blocking=self.pinned).permute(0, 3, 1, 2)


class QuantizedStorage:
    """Like PlainStorage, with ``bits`` (8 or 4) bits per value: affine quantization over the range of the value's
    channel in its mini-batch. This is not the online vector quantization of the authors' later paper (arXiv
    2106.06401).

    The error of a value is at most half a step, a step being 1 / (2^bits − 1) of that range. The smallest value of a
    channel, which after a ReLU is mostly 0, is exact.
    """

    def __init__(self, capacity, batch_size, shape, *, dtype, device, pinned, bits):
        channels, height, width = shape
        self.bits = bits
        self.dtype = dtype
        self.pinned = pinned
        self.shape = (batch_size, height, width, channels)
        self.count = batch_size * height * width * channels
        values_per_byte = 8 // bits
        num_bytes = -(-self.count // values_per_byte)  # rounded up
        self.values = torch.zeros(capacity, num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.least = torch.zeros(capacity, channels, device=device, pin_memory=pinned)
        self.scale = torch.zeros(capacity, channels, device=device, pin_memory=pinned)

    def tensors(self):
        """{name: tensor} of everything that is stored; the first dimension counts slots."""
        return {"values": self.values, "least": self.least, "scale": self.scale}

    def write(self, slot, representation):
        values = representation.permute(0, 2, 3, 1).float()
        least = values.amin((0, 1, 2))
        most = values.amax((0, 1, 2))
        scale = (most - least) / (2**self.bits - 1)
        nonzero_scale = scale.clamp(min=torch.finfo().tiny)  # a constant channel becomes all 0
        codes = ((values - least) / nonzero_scale).round_().to(torch.uint8).flatten()
        if self.bits == 4:
            low, high = F.pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(1)
            codes = low | high << 4
        self.values[slot].copy_(codes, non_blocking=self.pinned)
        self.least[slot].copy_(least, non_blocking=self.pinned)
        self.scale[slot].copy_(scale, non_blocking=self.pinned)

    def read(self, slot, device):
        codes = self.values[slot].to(device, non_blocking=self.pinned)
        least = self.least[slot].to(device, non_blocking=self.pinned)
        scale = self.scale[slot].to(device, non_blocking=self.pinned)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).flatten()[: self.count]
        values = codes.view(self.shape).to(scale.dtype).mul_(scale).add_(least)
        return values.to(self.dtype).permute(0, 3, 1, 2)


@dataclass
class Slot:
    """The bookkeeping of one slot: what was written there last."""

    index: int
    uses: int = 0  # number of reads since it was written
    step: int = 0  # number of steps that the writer had taken
    written: int = -1  # number of the write, from 0; -1: never


class ReplayBuffer:
    """Up to ``capacity`` mini-batches of representations (B, C, h, w) = (``batch_size``, *``shape``) with their labels;
    a write overwrites the oldest.

    A read takes, among the slots with the fewest uses, the newest (``sampling`` "priority_lifo", as in the paper) or
    the oldest ("fifo"), and counts as one use. A slot that was used ``max_reuse`` times is not read again until it is
    overwritten.

    Memory for values of ``dtype``, or of ``bits`` bits each, is allocated once, on ``storage_device``; reads return
    tensors on ``device``. They are valid until the next write, because they may be views of the stored memory.
    """

    def __init__(
        self,
        capacity,
        batch_size,
        shape,
        *,
        dtype=torch.float32,
        device="cpu",
        storage_device=None,
        bits=None,
        max_reuse=None,
        sampling="priority_lifo",
    ):
        self.capacity = capacity
        self.max_reuse = max_reuse
        self.sampling = sampling
        self.device = torch.device(device)
        storage_device = torch.device(storage_device or device)
        options = {
            "dtype": dtype,
            "device": storage_device,
            "pinned": storage_device.type == "cpu" and self.device.type == "cuda",
        }
        if bits is None:
            self.storage = PlainStorage(capacity, batch_size, shape, **options)
        else:
            self.storage = QuantizedStorage(capacity, batch_size, shape, bits=bits, **options)
        label_device = storage_device if storage_device.type == "meta" else self.device
        self.labels = torch.zeros(capacity, batch_size, dtype=torch.int64, device=label_device)
        self.writes = 0
        self.slots = [Slot(index) for index in range(capacity)]

    @property
    def filled(self):
        """The slots that have been written: all of them after ``capacity`` writes."""
        return self.slots[: self.writes]

    def write(self, representation, labels, step=0):
        """Overwrites the oldest slot with a detached representation (B, C, h, w) and its labels (B,); ``step`` is the
        number of steps that the writer has taken.
        """
        slot = self.slots[self.writes % self.capacity]
        self.storage.write(slot.index, representation)
        self.labels[slot.index].copy_(labels)
        slot.uses = 0
        slot.step = step
        slot.written = self.writes
        self.writes += 1

    def read(self):
        """A Sample, or None if no slot may be read."""
        slot = self.choose()
        if slot is None:
            return None
        sample = Sample(self.storage.read(slot.index, self.device), self.labels[slot.index], slot.uses, slot.step)
        slot.uses += 1
        return sample

    def choose(self):
        """The Slot for the next read, or None if no slot may be read."""
        if self.writes == 0:
            return None
        fewest = min(slot.uses for slot in self.filled)
        if fewest == self.max_reuse:
            return None
        least_read = [slot for slot in self.filled if slot.uses == fewest]
        if self.sampling == "priority_lifo":
            return max(least_read, key=lambda slot: slot.written)
        return min(least_read, key=lambda slot: slot.written)

    def tensors(self):
        """{name: tensor} of everything that is stored; the first dimension counts slots."""
        return {**self.storage.tensors(), "labels": self.labels}

    @property
    def nbytes(self):
        """Bytes of all slots, including labels."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def state_dict(self):
        """Everything as stored, without the tensors of slots that have not been written."""
        self.wait()
        filled = len(self.filled)
        tensors = {}
        for name, tensor in self.tensors().items():
            tensors[name] = tensor if filled == self.capacity else tensor[:filled].clone()
        uses = [slot.uses if slot.written >= 0 else None for slot in self.slots]
        return {"tensors": tensors, "writes": self.writes, "steps": [slot.step for slot in self.slots], "uses": uses}

    def load_state_dict(self, state):
        self.wait()
        self.writes = state["writes"]
        for slot in self.filled:
            slot.uses = state["uses"][slot.index]
            slot.step = state["steps"][slot.index]
            slot.written = self.latest_write(slot.index)
        for name, tensor in self.tensors().items():
            tensor[: len(self.filled)].copy_(state["tensors"][name])

    def latest_write(self, index):
        """The number of the latest write, from 0, that went to slot ``index``."""
        latest = self.writes - 1  # of all slots
        writes_since = (latest - index) % self.capacity
        return latest - writes_since

    def wait(self):
        """Waits until the GPU has finished with main memory, before the CPU reads or writes it."""
        if self.storage.pinned:
            torch.cuda.synchronize(self.device)


class HandOver:
    """The buffer between two modules of synchronous DGL (``--buffer 0``): a single mini-batch, not copied, which is
    read once right after it was written.
    """

    nbytes = 0

    def __init__(self, device):
        self.device = device
        self.sample = None

    def write(self, representation, labels, step=0):
        self.sample = Sample(representation, labels, 0, step)

    def read(self):
        sample = self.sample
        self.sample = None
        return sample

    def state_dict(self):
        return {"sample": None if self.sample is None else tuple(self.sample)}

    def load_state_dict(self, state):
        if state["sample"] is not None:
            representation, labels, uses, step = state["sample"]
            self.sample = Sample(representation.to(self.device), labels.to(self.device), uses, step)


def make_buffers(capacity, batch_size, shapes, *, storage_device, dtype, bits=None, **options):
    """Returns (a buffer for each of the representations' ``shapes`` (C, h, w), lines for the log about the memory they
    need).

    Raises InputError, before anything is allocated, if there is not enough free memory.
    """
    if capacity == 0:
        return [HandOver(options["device"]) for _ in shapes], ["buffers: none, synchronous"]

    def size(shape, bits):
        """The size in bytes of a buffer that is not allocated."""
        one_slot = ReplayBuffer(1, batch_size, shape, storage_device="meta", dtype=dtype, bits=bits, **options)
        return capacity * one_slot.nbytes

    sizes = [size(shape, bits) for shape in shapes]
    total = sum(sizes)
    plain = str(dtype).removeprefix("torch.")
    values = f"{bits} bits" if bits else plain
    lines = []
    for n, (shape, num_bytes) in enumerate(zip(shapes, sizes, strict=True), start=1):
        dimensions = "x".join(map(str, shape))
        lines.append(
            f"buffer before module {n}: {capacity} mini-batches x {batch_size} x {dimensions} in {values}: "
            f"{readable(num_bytes)}"
        )
    saved = ""
    if bits:
        uncompressed = sum(size(shape, None) for shape in shapes)
        percent = 100 * (1 - total / uncompressed)
        saved = f", {readable(uncompressed - total)} ({percent:.1f} %) less than in {plain}"
    lines.append(
        f"buffers: {readable(total)} on {storage_device.type}{saved}; as much again of main memory "
        "while a checkpoint is written or read"
    )
    check_memory(total, storage_device)
    options |= {"storage_device": storage_device, "dtype": dtype, "bits": bits}
    try:
        return [ReplayBuffer(capacity, batch_size, shape, **options) for shape in shapes], lines
    except RuntimeError as error:  # other processes have taken the memory since, or it is fragmented
        raise InputError(
            f"the buffers' {readable(total)} cannot be allocated on {storage_device.type}: {WAYS_OUT}"
        ) from error


WAYS_OUT = "choose a smaller --buffer, --batch_size or --feature_size, --compress 8, or another --buffer-device"


def check_memory(total, device):
    """Raises InputError unless there is enough free memory on ``device`` for buffers of ``total`` bytes, and as much
    again in main memory for checkpoints.
    """
    cpu = torch.device("cpu")
    needs = {device: total}
    needs[cpu] = needs.get(cpu, 0) + total
    for place, need in needs.items():
        free = free_memory(place)
        if free is not None and need > free:
            what = f"{readable(total)} and as much again for a checkpoint" if place == cpu else readable(total)
            raise InputError(f"the buffers need {what} on {place.type}, where {readable(free)} are free: {WAYS_OUT}")


def free_memory(device):
    """Free bytes on ``device``; None if that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")  # Linux
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            kilobytes, _ = value.split()
            return int(kilobytes) * 1024
    return None


def readable(size):
    """A number of bytes in GB or MB (10^9, 10^6)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
