"""Training memory on ImageNet: DGL beside back-propagation, with and without
checkpointing, and the largest batch of each that fits a budget.

    python benchmarks/imagenet_memory.py --half --output memory.txt

The paper's claim (Sec. 5.5): on a 16 GB GPU, DGL of ResNet-152 with K = 2
trains on 38 % more samples than back-propagation.

Everywhere it counts: FakeTensors have sizes and no values, so that real sizes
are known in seconds, without computing. On CUDA it also measures, by PyTorch's
allocator, which rounds sizes up and holds workspaces of kernels, and by trying
which batch still runs when it may take no more than the budget. Neither
includes what the driver takes for itself (some 0.5 GiB a process).

Rows: one for each module of each method; "checkpointing" keeps the
representations between K parts and recomputes the parts in its backward pass.
VGG is cut into K runs of equally many convolutions, ResNet as --splits cuts it.
Columns:
  fixed          GiB of the network's parameters, gradients, momentum and batch
                 norm statistics, whatever the batch
  saved          GiB that the module's forward pass keeps for its backward pass,
                 each storage once, parameters apart (saved_tensors_hooks)
  peak           GiB at most while the module takes its step: all tensors there
                 are, the other modules' included (decoupled.costs.LiveStorages)
  CUDA peak      the same by the allocator (max_memory_allocated)
  largest        largest batch whose peak, counted, is within the budget; CUDA
                 largest: that really ran within it
  more           how much larger than back-propagation's, in %
"""

import contextlib
import functools
import gc
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from decoupled import checkpoints, flags, provenance
from decoupled.costs import LiveStorages

sys.path.append(str(Path(__file__).parent.parent / "imagenet"))
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg

GIB = 2**30
CLASSES = 1000


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--arch",
        choices=(*STAGES, *BLOCKS),
        nargs="+",
        default=["resnet152", "vgg19"],
        metavar="ARCH",
        help=f"networks, of {', '.join((*STAGES, *BLOCKS))} (default: resnet152 vgg19)",
    )
    parser.add_argument(
        "--splits",
        type=flags.integer(2),
        nargs="+",
        default=[2, 4],
        metavar="K",
        help="numbers of modules (default: 2 4)",
    )
    parser.add_argument("--batch-size", type=flags.integer(2), default=32, help="of the columns in GiB")
    parser.add_argument("--image-size", type=flags.integer(32), default=224, help="side of the images")
    parser.add_argument(
        "--budget",
        type=flags.number(above=0),
        default=16,
        metavar="GIB",
        help="memory that the largest batch may take",
    )
    parser.add_argument(
        "--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere, whose sizes are the same"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: count only")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="write the table there too")
    return parser.parse_args()


class Method(NamedTuple):
    """A network and what a step of it is: ``turns(images, labels)`` yields after each module's part, and is the whole
    step when exhausted.
    """

    name: str
    splits: int
    net: torch.nn.Module
    turns: callable


class Training:
    """What the methods share: precision, loss scales and optimizers for the modules of ``net``."""

    def __init__(self, net, half, device):
        self.half, self.device = half, device
        # Counting: FakeTensors have no fused step. With or without, SGD makes no temporary tensors as it is set here
        fused = device.type == "cuda"
        self.optimizers = [
            SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=fused, foreach=False if not fused else None)
            for module in net
        ]
        self.scalers = [torch.amp.GradScaler(device.type, enabled=half and device.type == "cuda") for _ in net]

    def autocast(self):
        return torch.autocast(
            self.device.type, torch.float16 if self.device.type == "cuda" else torch.bfloat16, enabled=self.half
        )

    def step(self, loss, n):
        """zero_grad, backward, step: as decoupled.runs.Run.step."""
        optimizer, scaler = self.optimizers[n], self.scalers[n]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def network(arch, splits, image_size):
    """A DecoupledNetwork of ``splits`` modules. Raises InputError where it cannot be cut so."""
    if arch in BLOCKS:
        return greedy_resnet(arch, splits, CLASSES, image_size)
    return greedy_vgg(arch, -(-sum(STAGES[arch]) // splits), CLASSES, image_size)


def dgl(arch, splits, image_size, half, device):
    """DGL as in imagenet_dgl.py; back-propagation with one module, which has no auxiliary."""
    net = prepared(network(arch, splits, image_size), device)
    training = Training(net, half, device)

    def turns(images, labels):
        representation = images
        for n, module in enumerate(net):
            with training.autocast():
                representation, logits = module(representation)
            loss = F.cross_entropy(logits.float(), labels)
            training.step(loss, n)
            representation = representation.detach()
            yield

    return Method("DGL" if splits > 1 else "back-propagation", splits, net, turns)


def checkpointing(arch, splits, image_size, half, device):
    """Back-propagation of the same network, each part below the last recomputed; its last backward pass comes at once,
    so that one is not.
    """
    net = network(arch, splits, image_size)
    for module in net[:-1]:
        del module.auxiliary
    net = prepared(net, device)
    training = Training([net], half, device)

    def turns(images, labels):
        representation = images
        with training.autocast():
            for module in net[:-1]:
                representation = checkpoint(module.body, representation, use_reentrant=False, preserve_rng_state=False)
            _, logits = net[-1](representation)
        training.step(F.cross_entropy(logits.float(), labels), 0)
        yield

    return Method("checkpointing", splits, net, turns)


def prepared(net, device):
    if device.type == "cuda":  # FakeTensors are where they should be, and have the same sizes in any memory format
        net.to(device, memory_format=torch.channels_last)
    return net.train()


def batch(size, image_size, device):
    images = torch.zeros(size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(size, dtype=torch.int64, device=device)


# Counting


class Saved:
    """Inside the block: ``bytes`` of the storages that autograd saves for backward passes, each once, without those of
    ``net``'s parameters.
    """

    def __init__(self, net):
        self.own = {id(parameter.untyped_storage()) for parameter in net.parameters()}
        self.storages = {}

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.own:
            self.storages[id(storage)] = storage
        return tensor

    def block(self):
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)


def storage_bytes(tensors):
    """Bytes of the tensors' storages, each once."""
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def static_bytes(method):
    """(bytes of parameters and buffers, bytes of gradients and momentum) of a method's network."""
    parameters = storage_bytes(method.net.parameters())
    return parameters + storage_bytes(method.net.buffers()), 2 * parameters


def count(method, size, image_size):
    """[peak bytes of each module's part] of a step at batch ``size`` after a first one, network and batch included."""
    images, labels = batch(size, image_size, "cpu")
    momentum = static_bytes(method)[1] // 2
    before = static_bytes(method)[0] + momentum + storage_bytes([images, labels])
    peaks = []
    with LiveStorages() as live:
        for parameter in method.net.parameters():  # of the step before: they are there until zero_grad
            live.know(parameter.grad.untyped_storage(), parameter.grad.untyped_storage().nbytes())
        live.peak = live.live
        for _ in method.turns(images, labels):
            peaks.append(before + live.peak)
            live.peak = live.live
    return peaks


def count_saved(method, size, image_size):
    """[bytes saved for the backward pass in each module's part] of a step at batch ``size``."""
    saved, kept = Saved(method.net), []
    with saved.block():
        for _ in method.turns(*batch(size, image_size, "cpu")):
            kept.append(saved.bytes)
            saved.storages.clear()
    return kept


def largest(fits, guess):
    """The largest integer ≥ 0 for which ``fits`` holds, found around ``guess``: all smaller ones fit too."""
    low, high, stride = 0, None, 1
    candidate = max(guess, 1)
    while high is None or high - low > 1:
        if fits(candidate):
            low = candidate
        else:
            high = candidate
        if high is None:
            candidate, stride = low + stride, 2 * stride
        elif low == 0:
            candidate, stride = max(high - stride, 1), 2 * stride
            if high == 1:
                return 0
        else:
            candidate = (low + high) // 2
    return low


def counted_largest(peak, size, budget):
    """The largest batch with peak(batch) ≤ ``budget`` bytes, from a straight line through two batches: peaks are nearly
    straight.
    """
    slope = (peak(2 * size) - peak(size)) / size
    return largest(lambda batch: peak(max(batch, 2)) <= budget, int(size + (budget - peak(size)) / slope))


def counted(build, arguments, args):
    """(rows of one method without CUDA's columns, its largest counted batch)."""
    with FakeTensorMode():
        method = build(*arguments, args.half, torch.device("cpu"))
        kept = count_saved(method, args.batch_size, args.image_size)  # this step leaves gradients and momentum
        peaks = functools.cache(lambda size: count(method, size, args.image_size))
        limit = counted_largest(lambda size: max(peaks(size)), args.batch_size, args.budget * GIB)
        fixed = sum(static_bytes(method))
    labels = {"network": arguments[0], "method": method.name, "K": method.splits}
    rows = [
        {**labels, "module": n, "fixed": fixed / GIB, "saved": saved / GIB, "peak": peak / GIB}
        for n, (peak, saved) in enumerate(zip(peaks(args.batch_size), kept, strict=True), start=1)
    ]
    return rows, limit


# Measuring on CUDA


def measured(build, arguments, args, guess):
    """([peak GiB of each module's part by the allocator], largest batch that runs within the budget)."""
    device = torch.device("cuda")
    with torch.device(device):
        method = build(*arguments, args.half, device)

    def run(size):
        """The peaks of the second of two steps."""
        images, labels = batch(size, args.image_size, device)
        for _ in method.turns(images, labels):
            pass
        peaks = []
        torch.cuda.reset_peak_memory_stats()
        for _ in method.turns(images, labels):
            peaks.append(torch.cuda.max_memory_allocated() / GIB)
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        return peaks

    def fits(size):
        clear()
        try:
            run(max(size, 2))  # batch norm needs two
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    peaks = run(args.batch_size)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.budget * GIB / total))
    limit = largest(fits, guess)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return peaks, limit


def clear():
    gc.collect()
    torch.cuda.empty_cache()


def table(args, cuda):
    rows = []
    for arch in args.arch:
        methods = [(dgl, 1), *((method, splits) for method in (checkpointing, dgl) for splits in args.splits)]
        first = {}
        for build, splits in methods:
            arguments = (arch, splits, args.image_size)
            lines, limits = counted(build, arguments, args)
            limits = {"largest": limits}
            if cuda:
                peaks, limits["CUDA largest"] = measured(build, arguments, args, limits["largest"])
                clear()
                for line, peak in zip(lines, peaks, strict=True):
                    line["CUDA peak"] = peak
            first = first or limits
            for name, limit in limits.items():
                lines[0] |= {name: limit, name.replace("largest", "more"): 100 * (limit / max(first[name], 1) - 1)}
            rows += lines
            print(f"# {arch}, {lines[0]['method']}, K = {splits}: largest batch {limits}", file=sys.stderr, flush=True)
    columns = [
        "network",
        "method",
        "K",
        "module",
        "fixed",
        "saved",
        "peak",
        "CUDA peak",
        "largest",
        "more",
        "CUDA largest",
        "CUDA more",
    ]
    frame = pd.DataFrame(rows)
    return frame[[column for column in columns if column in frame]]


def main():
    args = parse_args()
    device = flags.pick_device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    if args.output:
        with checkpoints.writing(args.output):
            Path(args.output).open("a").close()  # before the work
    where = torch.cuda.get_device_name(device) if cuda else f"none, counted on {platform.machine()}"
    precision = {True: "fp16 mixed" if cuda else "bf16 mixed (as large as fp16)", False: "fp32"}[args.half]
    lines = [
        f"# command: python benchmarks/imagenet_memory.py {' '.join(sys.argv[1:])}".rstrip(),
        f"# torch {torch.__version__}, commit {provenance.commit()}, GPU: {where}, {precision}, "
        f"{args.image_size}x{args.image_size}",
        f"# GiB at batch {args.batch_size}; largest: the largest batch in {args.budget:g} GiB; more: "
        "in % than back-propagation's",
    ]
    frame = table(args, cuda)
    whole = {name: "{:.0f}".format for name in frame if "largest" in name or "more" in name}
    text = (
        "\n".join([*lines, frame.to_string(index=False, na_rep="", float_format="{:.3f}".format, formatters=whole)])
        + "\n"
    )
    print(text, end="")
    if args.output:
        with checkpoints.writing(args.output):
            Path(args.output).write_text(text)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        flags.start(main)
