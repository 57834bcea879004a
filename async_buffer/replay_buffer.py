"""The replay buffer between two modules that learn asynchronously (Sec. 5.6, Algorithm 2), its compression, and the
memory it takes.
"""

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
    step: int  # the writer's steps when it was written


class PlainSlots:
    """Room for ``capacity`` representations (B, C, h, w), kept channels-last in their own ``dtype``. Nothing is copied
    on a read from ``device``.

    ``pinned``: in main memory that a GPU reads and writes by itself, in the order of its other work; nobody waits.
    """

    def __init__(self, capacity, batch_size, shape, *, dtype, device, pinned):
        channels, height, width = shape
        self.pinned = pinned
        self.values = torch.zeros(
            capacity, batch_size, height, width, channels, dtype=dtype, device=device, pin_memory=pinned
        )

    def write(self, slot, representation):
        self.values[slot].copy_(representation.permute(0, 2, 3, 1), non_blocking=self.pinned)

    def read(self, slot, device):
        return self.values[slot].to(device, non_blocking=self.pinned).permute(0, 3, 1, 2)


class QuantizedSlots:
    """As PlainSlots, with each value in ``bits`` (8 or 4) bits: affine over the range of its channel in its mini-batch.
    Not the online vector quantization of the authors' later paper (arXiv 2106.06401).

    A value is off by at most half a step, 1 / (2^bits − 1) of that range; the least value of a channel, after a ReLU
    mostly 0, is exact.
    """

    def __init__(self, capacity, batch_size, shape, *, dtype, device, pinned, bits):
        channels, height, width = shape
        self.bits, self.dtype, self.pinned = bits, dtype, pinned
        self.shape = (batch_size, height, width, channels)
        self.count = batch_size * height * width * channels
        per_byte = 8 // bits
        where = {"device": device, "pin_memory": pinned}
        self.values = torch.zeros(capacity, -(-self.count // per_byte), dtype=torch.uint8, **where)
        self.least, self.scale = (torch.zeros(capacity, channels, **where) for _ in range(2))

    def write(self, slot, representation):
        values = representation.permute(0, 2, 3, 1).float()
        least, most = values.amin((0, 1, 2)), values.amax((0, 1, 2))
        scale = (most - least) / (2**self.bits - 1)
        # A constant channel is all 0
        codes = ((values - least) / scale.clamp(min=torch.finfo().tiny)).round_().to(torch.uint8).flatten()
        if self.bits == 4:
            low, high = F.pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(1)
            codes = low | high << 4
        for kept, given in ((self.values, codes), (self.least, least), (self.scale, scale)):
            kept[slot].copy_(given, non_blocking=self.pinned)

    def read(self, slot, device):
        kept = self.values, self.least, self.scale
        codes, least, scale = (tensor[slot].to(device, non_blocking=self.pinned) for tensor in kept)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).flatten()[: self.count]
        return codes.view(self.shape).to(scale.dtype).mul_(scale).add_(least).to(self.dtype).permute(0, 3, 1, 2)


class ReplayBuffer:
    """At most ``capacity`` mini-batches of representations (B, C, h, w) = (``batch_size``, *``shape``) with their
    labels, written in a circle.

    A read takes, among the slots used least often since they were written, the one written last (``sampling``
    "priority_lifo", the paper's) or first ("fifo"), and counts one use. A slot used ``max_reuse`` times is not read
    again until it is overwritten.

    Storage of ``dtype``, or of ``bits`` bits a value, is allocated once, on ``storage_device``; reads arrive on
    ``device``. What a read returns is valid until the next write: it may be the slot itself. Bookkeeping takes a few
    operations a read or write, on integers of ``capacity`` bits: the slots used k times are the bits of one.
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
        self.capacity, self.max_reuse, self.sampling = capacity, max_reuse, sampling
        self.device = torch.device(device)
        storage_device = torch.device(storage_device or device)
        options = {
            "dtype": dtype,
            "device": storage_device,
            "pinned": storage_device.type == "cpu" and self.device.type == "cuda",
        }
        slots = PlainSlots if bits is None else QuantizedSlots
        self.slots = slots(capacity, batch_size, shape, **options, **({} if bits is None else {"bits": bits}))
        self.labels = torch.zeros(
            capacity, batch_size, dtype=torch.int64, device="meta" if storage_device.type == "meta" else self.device
        )
        self.writes = 0
        self.steps = [0] * capacity  # the writer's, for each slot
        self.uses = [None] * capacity  # since the slot was written; None: empty
        self.used = {}  # uses → the slots used so often, as the bits of an integer
        self.least = 0  # the fewest uses of any slot

    def write(self, representation, labels, step=0):
        """Overwrites the oldest slot with a detached representation (B, C, h, w) and its labels (B,); ``step`` counts
        the writer's steps.
        """
        slot = self.writes % self.capacity
        self.slots.write(slot, representation)
        self.labels[slot].copy_(labels)
        self.steps[slot] = step
        self.writes += 1
        self.move(slot, 0)
        self.least = 0

    def read(self):
        """A Sample, or None when no slot may be read."""
        if self.writes == 0 or self.least == self.max_reuse:
            return None
        slot, uses = self.pick(self.used[self.least]), self.least
        self.move(slot, uses + 1)
        if uses not in self.used:
            self.least = uses + 1  # where this slot went: no other can have been used less
        return Sample(self.slots.read(slot, self.device), self.labels[slot], uses, self.steps[slot])

    def pick(self, candidates):
        """The newest or the oldest of the slots that are the bits of ``candidates``. Slots below the next one to be
        written are the newer ones.
        """
        following = self.writes % self.capacity
        if self.sampling == "priority_lifo":
            newer = candidates & ((1 << following) - 1)
            return (newer or candidates).bit_length() - 1  # the highest bit
        older = candidates >> following << following
        lowest = (older or candidates) & -(older or candidates)
        return lowest.bit_length() - 1

    def move(self, slot, uses):
        """Notes that ``slot`` has been used ``uses`` times."""
        before = self.uses[slot]
        if before is not None:
            self.used[before] ^= 1 << slot
            if not self.used[before]:
                del self.used[before]
        self.uses[slot] = uses
        self.used[uses] = self.used.get(uses, 0) | 1 << slot

    def tensors(self):
        return {name: value for name, value in vars(self.slots).items() if isinstance(value, torch.Tensor)} | {
            "labels": self.labels
        }

    @property
    def nbytes(self):
        """Of all slots, labels included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def state_dict(self):
        """Everything, as it is stored; slots not written yet are left out."""
        self.wait()
        filled = min(self.writes, self.capacity)
        tensors = {
            name: tensor if filled == self.capacity else tensor[:filled].clone()
            for name, tensor in self.tensors().items()
        }
        return {"tensors": tensors, "writes": self.writes, "steps": self.steps, "uses": self.uses}

    def wait(self):
        """Before main memory is read or written by anyone but the GPU: ends what that still does there."""
        if self.slots.pinned:
            torch.cuda.synchronize(self.device)

    def load_state_dict(self, state):
        self.wait()
        self.writes, self.steps, uses = state["writes"], list(state["steps"]), state["uses"]
        for name, tensor in self.tensors().items():
            tensor[: min(self.writes, self.capacity)].copy_(state["tensors"][name])
        self.uses, self.used = [None] * self.capacity, {}
        for slot, count in enumerate(uses):
            if count is not None:
                self.move(slot, count)
        self.least = min(self.used, default=0)


class HandOver:
    """What stands between two modules of synchronous DGL (``--buffer 0``): the mini-batch itself, read once right after
    it was written.
    """

    nbytes = 0

    def __init__(self, device):
        self.device, self.sample = device, None

    def write(self, representation, labels, step=0):
        self.sample = Sample(representation, labels, 0, step)

    def read(self):
        sample, self.sample = self.sample, None
        return sample

    def state_dict(self):
        return {"sample": None if self.sample is None else tuple(self.sample)}

    def load_state_dict(self, state):
        if sample := state["sample"]:
            self.sample = Sample(*(v.to(self.device) if isinstance(v, torch.Tensor) else v for v in sample))


def make_buffers(capacity, batch_size, shapes, *, storage_device, dtype, bits=None, **options):
    """A buffer for each of the representations' ``shapes`` (C, h, w), and the lines that say what memory they take.

    Raises InputError, before anything is allocated, when that is more than is free.
    """
    if capacity == 0:
        return [HandOver(options["device"]) for _ in shapes], ["buffers: none, synchronous"]

    def buffers(capacity, storage_device, bits):
        return [
            ReplayBuffer(capacity, batch_size, s, storage_device=storage_device, dtype=dtype, bits=bits, **options)
            for s in shapes
        ]

    sizes = [capacity * buffer.nbytes for buffer in buffers(1, "meta", bits)]
    plain = sum(capacity * buffer.nbytes for buffer in buffers(1, "meta", None))
    total = sum(sizes)
    kind = f"{bits} bits" if bits else str(dtype).removeprefix("torch.")
    lines = [
        f"buffer before module {n}: {capacity} mini-batches x {batch_size} x "
        f"{'x'.join(map(str, shape))} in {kind}: {readable(size)}"
        for n, (shape, size) in enumerate(zip(shapes, sizes, strict=True), start=1)
    ]
    saved = (
        f", {readable(plain - total)} ({100 * (1 - total / plain):.1f} %) less than in "
        f"{str(dtype).removeprefix('torch.')}"
        if bits
        else ""
    )
    lines.append(
        f"buffers: {readable(total)} on {storage_device.type}{saved}; as much again of main memory "
        "while a checkpoint is written or read"
    )
    check_memory(total, storage_device)
    try:
        return buffers(capacity, storage_device, bits), lines
    except RuntimeError as error:  # taken by others since, or no one piece
        raise InputError(
            f"the buffers' {readable(total)} cannot be allocated on {storage_device.type}: {WAYS_OUT}"
        ) from error


WAYS_OUT = "choose a smaller --buffer, --batch_size or --feature_size, --compress 8, or another --buffer-device"


def check_memory(total, device):
    """Raises InputError when buffers of ``total`` bytes on ``device``, and once more in main memory for checkpoints,
    are more than is free.
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
    """Bytes still free on ``device``, with what the system would give up for it and within the container's limit; None
    where nothing tells.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
            free.append(int(limit) - int((group / "memory.current").read_text()) + int(cache))
    except (OSError, KeyError, ValueError):
        pass
    return min(free, default=None)


def readable(size):
    """A number of bytes in GB or MB (10^9, 10^6)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
