"""What a training step costs by each method: time, FLOPs, and memory on one
device and on each of K, at one network and batch.

    python benchmarks/step_costs.py
    python benchmarks/step_costs.py --network resnet152 --count --budget 16

Rows, for each K of --splits; each is the step of that method's script, SGD with
momentum. "all" is the most modules: each layer, or each residual block.
  back-propagation  K = 1
  pipeline          back-propagation in K stages, a device each, which hold a
                    mini-batch in flight: 1F1B's lowest with K micro-batches.
                    On one device it is back-propagation
  checkpointing     only what is between K parts is kept, they are recomputed
  DGL               modules with MLP-SR auxiliaries
  sequential        one module after the other learns: a step of each in turn.
                    It has no use for several devices
  DDG               delayed gradients, K - 1 mini-batches in flight
  DNI               K - 1 interfaces, with the synthesizer of the DNI paper's
                    CNN: three 5x5 convolutions of the representation's channels
                    at its size. Gradients go before the forward pass, which adds
                    to them, and not after it as elsewhere
Columns:
  ms/step, images/s  median over the rounds, on one device, where modules take
                     turns; a row has a process of its own, for networks that
                     share one slow each other
  GFLOP/image        of a step; a multiply-add is 2 (decoupled.analysis.costs)
  fixed MiB          parameters and buffers, gradients, momentum: of auxiliaries
                     and synthesizers too
  peak MiB           all tensors alive at the worst moment of a step, network
                     and images included, after K steps before it
  fullest MiB        the same of the fullest of K devices, each with a module,
                     its input, and what comes down to it
  largest, more      with --budget: largest batch whose peak is within it, and %
                     more than back-propagation's
  CUDA ...           the same by the allocator of CUDA, in which kernels'
                     workspaces count; CUDA largest: that really ran. Neither
                     has what the driver takes for itself
Peaks and FLOPs are counted by FakeTensors, which have sizes and no values, the
same on every machine. Without computing, by --count, or where a step needs more
than the machine has, there is nothing else. Beneath: each device's peak, and
what methods save beside back-propagation.
"""

import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from decoupled import InputError
from decoupled.analysis.costs import LiveStorages, step_seconds
from decoupled.networks.flops import count_flops
from decoupled.training import environment as provenance
from decoupled.training import flags
from decoupled.training.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_output import check_output, publish
from method_steps import METHODS, NETWORKS, SMALL, most_modules, network

SECONDS = 0.1  # a row is repeated within a round for at least as long
MIB, GIB = 2**20, 2**30


def parse_args():
    parser = flags.Parser(__doc__)
    names = f"one of {', '.join(NETWORKS)}"
    parser.add_argument("--network", choices=NETWORKS, default="cifar_resnet", metavar="NAME", help=names)
    parser.add_argument("--depth", type=flags.integer(1, 2000), help="of cifar_resnet, 6n+2 (default: 110)")
    size = "side of ImageNet's images (default: 224)"
    parser.add_argument("--image-size", type=flags.integer(32), help=size)
    batch = "images a step (default: 128, or 32 of ImageNet's)"
    parser.add_argument("--batch-size", type=flags.integer(2), help=batch)
    splits = "numbers of modules, or all (default: 2 4 all)"
    parser.add_argument("--splits", type=number_of_modules, nargs="+", default=[2, 4, "all"], metavar="K", help=splits)
    methods = "rows beside back-propagation (default: every method's)"
    parser.add_argument("--methods", choices=[*METHODS][1:], nargs="+", default=[*METHODS][1:], help=methods)
    parser.add_argument("--count", action="store_true", help="measure nothing, compute nothing")
    parser.add_argument("--budget", type=flags.number(above=0), metavar="GIB", help="find the largest batch in it")
    parser.add_argument("--repeats", type=flags.integer(1), default=10, help="rounds")
    parser.add_argument("--device", default="auto", help=flags.DEVICE)
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere, as large")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="write the tables there too")
    row = "measure this row alone, and print JSON: method, K, and the batch to begin with in search of the largest"
    parser.add_argument("--row", nargs=3, metavar=("METHOD", "K", "BATCH"), help=row)
    parser.set_defaults(compile=False, epochs=1, seed=1, name="", resume=None, save_every=10.0)  # what a Run asks for
    args = parser.parse_args()
    if args.depth and args.network != "cifar_resnet":
        parser.error(f"--depth is of cifar_resnet: leave it out with {args.network}")
    if args.row and args.row[0] not in METHODS:
        parser.error(f"--row {' '.join(args.row)}: the method is one of {', '.join(METHODS)}")
    if args.image_size and args.network in SMALL:
        parser.error(f"{args.network} has 32×32 images: leave --image-size out")
    args.depth = args.depth or 110
    args.image_size = args.image_size or (32 if args.network in SMALL else 224)
    args.batch_size = args.batch_size or (128 if args.network in SMALL else 32)
    args.classes = 10 if args.network in SMALL else 1000
    args.splits = [*dict.fromkeys(most_modules(args) if splits == "all" else splits for splits in args.splits)]
    return args


def number_of_modules(text):
    return text if text == "all" else flags.integer(2)(text)


# Counting and measuring


def batch(args, size, device):
    """Random images (B, 3, s, s) and labels (B,)."""
    images = torch.randn(size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(args.classes, (size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def prepared(run, net):
    """``net`` where it learns, in channels-last memory."""
    if not isinstance(next(net.parameters()), FakeTensor):
        return run.prepare(net).train()
    for module in net.modules():  # Module.to cannot; of another format than its weights, a gradient would be copied
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 4:
                setattr(module, name, nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last)))
    return net.train()


def steps_before(method, splits, k=0):
    """Steps of module ``k`` after which all that lasts is there: its momentum, and what DDG has in flight."""
    return splits - k if method == "DDG" else 1


def peak_bytes(run, make, held, before):
    """(the most bytes that a step takes after ``before`` others, with ``held``, which was there before ``make()`` made
    the step; that step). On CUDA nothing else may be there.
    """

    def one():
        run.steps.watched.clear()  # a loss a step
        step()

    cuda = run.device.type == "cuda"
    with nullcontext() if cuda else LiveStorages() as live:
        for tensor in () if cuda else held:
            live.know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        step = make()
        for _ in range(before):
            one()
        if cuda:
            torch.cuda.reset_peak_memory_stats(run.device)
        else:
            live.peak = live.live
        one()
    return torch.cuda.max_memory_allocated(run.device) if cuda else live.peak, one


def whole_peak(args, method, net, size):
    """(peak bytes of a step of batch ``size`` on one device, that step)."""
    run = Run(args)
    images, labels = batch(args, size, run.device)
    make = functools.partial(METHODS[method].whole, run, net, images, labels)
    held = [*net.parameters(), *net.buffers(), images, labels]
    return peak_bytes(run, make, held, steps_before(method, len(net)))


def device_peaks(args, method, splits):
    """[peak bytes of each of ``splits`` devices]."""
    net, peaks = METHODS[method].build(args, splits), []
    below, labels = batch(args, args.batch_size, flags.pick_device(args.device))
    for k in range(splits):
        run = Run(args)
        part = prepared(run, net[k])
        make = functools.partial(METHODS[method].alone, run, net, k, below, labels)
        held = [below, *part.parameters(), *part.buffers()]
        held += [labels] if method == "DGL" or k == splits - 1 else []  # others need none
        peaks.append(peak_bytes(run, make, held, steps_before(method, splits, k))[0])
        with torch.no_grad(), run.autocast():
            below = getattr(part, "body", part)(below)
        net[k] = nn.Identity()
        del part, make, held
    return peaks


def count(args, method, splits):
    """(columns, [peak MiB of each device]) of a row, without computing."""
    args = Namespace(**{**vars(args), "device": "cpu"})
    row, devices = {}, []
    with FakeTensorMode():
        if METHODS[method].whole:
            net = prepared(Run(args), METHODS[method].build(args, splits))
            peak, step = whole_peak(args, method, net, args.batch_size)
            row["GFLOP/image"] = count_flops(step) / args.batch_size / 1e9
            weights, buffers = (sum(tensor.nbytes for tensor in of()) for of in (net.parameters, net.buffers))
            row |= {"fixed MiB": (3 * weights + buffers) / MIB, "peak MiB": peak / MIB}
            devices = [peak / MIB] if splits == 1 else []
            if args.budget:
                step, sizes = None, {args.batch_size: peak}
                row["largest"] = counted_largest(args, method, net, sizes)
        if METHODS[method].alone:
            devices = [peak / MIB for peak in device_peaks(args, method, splits)]
    return row | ({"fullest MiB": max(devices)} if devices else {}), devices


def counted_largest(args, method, net, sizes):
    """The largest batch within the budget; ``sizes``: peaks that are known. A straight line through two is a guess."""

    def peak(size):
        if size not in sizes:
            sizes[size] = whole_peak(args, method, net, size)[0]
        return sizes[size]

    size, budget = args.batch_size, args.budget * GIB
    slope = (peak(2 * size) - peak(size)) / size
    return largest(lambda size: peak(max(size, 2)) <= budget, int(size + (budget - peak(size)) / slope))


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


def measure(args, method, splits, guess):
    """(columns, [peak MiB of each device]) of a row by the clock and CUDA's allocator: for a process of its own."""
    device, row, devices = flags.pick_device(args.device), {}, []
    torch.manual_seed(args.seed)
    if METHODS[method].whole:
        net = prepared(Run(args), METHODS[method].build(args, splits))
        peak, step = whole_peak(args, method, net, args.batch_size)
        calls = math.ceil(SECONDS / step_seconds(step, 1, device))
        seconds = statistics.median(step_seconds(step, calls, device) for _ in range(args.repeats))
        row = {"ms/step": 1000 * seconds, "images/s": args.batch_size / seconds}
        if device.type == "cuda":
            row["CUDA peak MiB"], step = peak / MIB, None
            if args.budget:
                row["CUDA largest"] = run_largest(args, method, net, guess)
        del net, step
        gc.collect()
    if device.type == "cuda":
        devices = [peak / MIB for peak in device_peaks(args, method, splits)] if METHODS[method].alone else []
        devices = [row["CUDA peak MiB"]] if splits == 1 else devices
        row |= {"CUDA fullest MiB": max(devices)} if devices else {}
    return row, devices


def run_largest(args, method, net, guess):
    """The largest batch whose steps run when PyTorch may take no more than the budget."""

    def fits(size):
        gc.collect()
        torch.cuda.empty_cache()
        try:
            whole_peak(args, method, net, max(size, 2))  # batch norm needs two
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    device = flags.pick_device(args.device)
    share = args.budget * GIB / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    limit = largest(fits, guess)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    return limit


def measured_alone(args, method, splits, row):
    """The row's (columns, devices) that its own process measures; none where that cannot be."""
    device = flags.pick_device(args.device)
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = row.get("peak MiB", 0) * MIB
    if needed > memory or (not METHODS[method].whole and device.type != "cuda"):
        return {}, []
    words = [method, splits, int(row.get("largest", 0))]
    command = [sys.executable, __file__, *sys.argv[1:], "--row", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(
            f"{method}, K = {splits}: its own process ended with {done.returncode}; its step needs "
            f"{needed / GIB:.1f} GiB: choose other --splits or --methods, or --count"
        )
    return json.loads(done.stdout)


# The tables


def words(peak, base):
    """What ``peak`` is beside ``base``."""
    more = 100 * (peak / base - 1)
    if math.isnan(more):
        return ""
    if more < 0.5:
        return f"saves {-more:.0f} %" if more <= -0.5 else "saves nothing"
    return f"saves nothing: {more:.0f} % more"


def savings(frame):
    """For each row what it saves: a frame of words. ``frame`` is the main table."""
    base, fullest = frame["peak MiB"].iloc[0], frame["fullest MiB"]
    stages = [fullest.get(("pipeline", splits), math.nan) for _, splits in frame.index]
    columns = {
        "one device": [words(peak, base) for peak in frame["peak MiB"]],
        "fullest of K": [words(peak, base) for peak in fullest],
        "fullest, beside the pipeline's": [words(*peaks) for peaks in zip(fullest, stages, strict=True)],
    }
    return pd.DataFrame(columns, index=frame.index).iloc[1:]


def tables(args):
    """(main frame, {(method, K, by what): [MiB of each device]}), of which the progress is told on stderr."""
    rows, devices = {}, {}
    asked = (method for method in METHODS if method in args.methods)
    todo = [("back-propagation", 1), *((method, splits) for method in asked for splits in args.splits)]
    for method, splits in todo:
        row, devices[method, splits, "counted"] = count(args, method, splits)
        if not args.count:
            more, devices[method, splits, "CUDA"] = measured_alone(args, method, splits, row)
            row |= more
        rows[method, splits] = row
        print(f"# {method}, K = {splits}: done", file=sys.stderr, flush=True)
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=("method", "K"))
    for name in ("largest", "CUDA largest"):
        if name in frame:
            frame[name.replace("largest", "more")] = 100 * (frame[name] / max(frame[name].iloc[0], 1) - 1)
    order = ["ms/step", "images/s", "GFLOP/image", "fixed MiB", "peak MiB", "fullest MiB", "largest", "more"]
    order += ["CUDA peak MiB", "CUDA fullest MiB", "CUDA largest", "CUDA more"]
    return frame[[name for name in order if name in frame]], devices


def report(args, frame, devices):
    """The text to print."""
    device = flags.pick_device(args.device)
    about = provenance.environment(device, args.half)
    if args.count:
        about[-1] = f"# device: none, counted, {about[-1].rsplit(', ')[-1]}"
    name = f"ResNet-{args.depth}" if args.network == "cifar_resnet" else args.network
    size = f"{args.image_size}×{args.image_size}"
    about.append(f"# {name}, {size}, batch {args.batch_size}" + f", {args.repeats} rounds" * (not args.count))
    if args.budget:
        about.append(f"# largest: the largest batch in {args.budget:g} GiB; more: in % than back-propagation's")
    whole = {name: "{:.0f}".format for name in frame if "largest" in name or "more" in name}
    main = frame.to_string(float_format="{:,.2f}".format, formatters=whole, na_rep="", sparsify=False)
    saved = savings(frame).to_string(sparsify=False)
    lines = [
        textwrap.fill(
            f"{method}, {splits}{' by CUDA' * (by == 'CUDA')}: {' '.join(f'{mib:.1f}' for mib in peaks)}", 120
        )
        for (method, splits, by), peaks in devices.items()
        if len(peaks) > 1
    ]
    parts = ["\n".join(about), main, "MiB of each device, from the image up", "\n".join(lines)]
    return "\n\n".join([*parts, "What a method saves of back-propagation's memory", saved]) + "\n"


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as args.log_dir:
        if args.row:
            method, splits, guess = args.row
            print(json.dumps(measure(args, method, int(splits), int(guess))))
            return
        flags.pick_device(args.device)
        check_output(args.output)
        with FakeTensorMode():
            for splits in args.splits:
                network(args, splits)  # fails here where it does at all
        publish(report(args, *tables(args)), args.output)


if __name__ == "__main__":
    flags.start(main)
