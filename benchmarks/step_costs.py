"""Compares the training steps of all methods on one network with one batch size:
time, FLOPs, and memory on one device and on each of K devices.

    python benchmarks/step_costs.py
    python benchmarks/step_costs.py --network resnet152 --count --budget 16

Rows, for each K of --splits. Each is the step of that method's script, with SGD
with momentum. K = all is the largest number of modules: one per layer, or per
residual block.
  back-propagation  K = 1
  pipeline          back-propagation in K stages, each on its own device with one
                    mini-batch in flight, as the lowest stage of 1F1B has with K
                    micro-batches. On one device it is back-propagation
  checkpointing     only the representations between K parts are kept; the parts
                    are computed again
  DGL               modules with MLP-SR auxiliaries
  sequential        the modules learn one after the other: a step of each. It
                    cannot use several devices
  DDG               delayed gradients, K - 1 mini-batches in flight
  DNI               K - 1 interfaces, with the synthesizer of the DNI paper's
                    CNN: three 5x5 convolutions with the representation's
                    channels, at its size. Gradients are freed before the forward
                    pass, which adds to them, not after it as in other methods
Columns:
  ms/step, images/s  median over the rounds, on one device, where the modules
                     take turns. Each row is measured in its own process, because
                     networks in one process slow each other down
  GFLOP/image        of a step; a multiply-add is 2 (decoupled.analysis.costs)
  fixed MiB          parameters, buffers, gradients and momentum, including those
                     of auxiliaries and synthesizers
  peak MiB           the peak memory of a step after K others: all tensors,
                     network and images included
  fullest MiB        the same for the fullest of K devices, each with a module,
                     its input, and the gradient from the module above
  largest, more      with --budget: the largest batch whose peak is within it,
                     and how many % more images than back-propagation's
  CUDA ...           the same, measured by CUDA's allocator, which includes
                     kernels' workspaces but not the driver's own memory. CUDA
                     largest is a batch that really ran
Peaks and FLOPs are counted with FakeTensors, which have shapes but no values: they
are the same on every machine. With --count, or if a step needs more memory than
the machine has, nothing else is reported. Below the table: the peak of each
device, and how much memory each method saves compared with back-propagation.
"""

import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from decoupled import InputError
from decoupled.analysis.costs import LiveStorages, step_seconds
from decoupled.networks.flops import count_flops
from decoupled.training import flags
from decoupled.training.device import pick_device
from decoupled.training.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
import method_steps
from benchmark_output import check_output, publish
from method_networks import NETWORKS, SMALL, chained_network, decoupled_network, interfaced_network, most_modules
from method_steps import InFlight, ScaledOptimizer, autocast_on, sgd

MIN_SECONDS = 0.1  # how long a row is repeated in each round, at least
MIB = 2**20
GIB = 2**30


# Methods. make_step(args, net, images, labels) returns the step of all modules on one device, and
# make_device_step(args, net, k, inputs, labels) that of module k, from 0, on its own device. Steps are callables.


def autocast_of(args):
    return autocast_on(pick_device(args.device), args.half)


def scaled_sgd(args, module):
    return ScaledOptimizer(sgd(module), args.half)


def backprop(args, net, images, labels, checkpointing=False):
    optimizer = scaled_sgd(args, net)
    autocast = autocast_of(args)
    return lambda: method_steps.backprop_step(net, optimizer, images, labels, autocast, checkpointing)


def dgl(args, net, images, labels):
    optimizers = [scaled_sgd(args, module) for module in net]
    autocast = autocast_of(args)
    return lambda: method_steps.dgl_step(net, optimizers, images, labels, autocast)


def dgl_device(args, net, k, inputs, labels):
    return dgl(args, net[k : k + 1], inputs, labels)


def sequential(args, net, images, labels):
    optimizers = [scaled_sgd(args, module) for module in net]
    autocast = autocast_of(args)
    return lambda: method_steps.sequential_step(net, optimizers, images, labels, autocast)


def ddg(args, net, images, labels):
    optimizers = [scaled_sgd(args, module) for module in net]
    queues = [InFlight(module, len(net), k) for k, module in enumerate(net)]
    autocast = autocast_of(args)
    return lambda: method_steps.ddg_step(queues, optimizers, images, labels, autocast)


def ddg_device(args, net, k, inputs, labels):
    optimizer = scaled_sgd(args, net[k])
    in_flight = InFlight(net[k], len(net), k)
    autocast = autocast_of(args)

    def step():
        output = method_steps.ddg_module_step(in_flight, optimizer, inputs, labels, autocast)
        if in_flight.delay > 0:
            in_flight.gradient = torch.empty_like(output)  # stands in for the gradient from above

    return step


def dni(args, net, images, labels):
    optimizer = sgd(net)
    autocast = autocast_of(args)
    return lambda: method_steps.dni_step(net, optimizer, images, labels, autocast)


def device_step_of(part_step):
    """The make_device_step of a method whose step is dni_part_step or pipeline_stage_step."""

    def make(args, net, k, inputs, labels):
        optimizer = sgd(net[k])
        autocast = autocast_of(args)
        is_first = k == 0
        is_last = k == len(net) - 1
        return lambda: part_step(net[k], optimizer, inputs, labels, autocast, is_first, is_last)

    return make


class Method(NamedTuple):
    build: Callable  # (args, splits) → modules
    make_step: Callable | None = None  # None for a method that is back-propagation on one device
    make_device_step: Callable | None = None  # None for a method whose modules cannot learn at the same time
    delayed: bool = False  # whether mini-batches stay in flight between steps


METHODS = {
    "back-propagation": Method(chained_network, backprop),
    "pipeline": Method(chained_network, make_device_step=device_step_of(method_steps.pipeline_stage_step)),
    "checkpointing": Method(chained_network, functools.partial(backprop, checkpointing=True)),
    "DGL": Method(decoupled_network, dgl, dgl_device),
    "sequential": Method(decoupled_network, sequential),
    "DDG": Method(chained_network, ddg, ddg_device, delayed=True),
    "DNI": Method(interfaced_network, dni, device_step_of(method_steps.dni_part_step)),
}
OTHERS = [name for name in METHODS if name != "back-propagation"]


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="cifar_resnet",
        metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: cifar_resnet)",
    )
    parser.add_argument("--depth", type=flags.integer(1, 2000), help="layers of cifar_resnet, 6n+2 (default: 110)")
    parser.add_argument(
        "--image-size",
        type=flags.integer(32),
        help="height and width of the images, for ImageNet networks (default: 224)",
    )
    parser.add_argument(
        "--batch-size", type=flags.integer(2), help="images per step (default: 128; ImageNet networks: 32)"
    )
    parser.add_argument(
        "--splits",
        type=number_of_modules,
        nargs="+",
        default=[2, 4, "all"],
        metavar="K",
        help="numbers of modules K, or all for the largest possible one (default: 2 4 all)",
    )
    parser.add_argument(
        "--methods",
        choices=OTHERS,
        nargs="+",
        default=OTHERS,
        help="methods to compare with back-propagation (default: all)",
    )
    parser.add_argument(
        "--count", action="store_true", help="only count memory and FLOPs, without running or timing anything"
    )
    parser.add_argument(
        "--budget",
        type=flags.number(above=0),
        metavar="GIB",
        help="find the largest batch that fits into this much memory",
    )
    parser.add_argument("--repeats", type=flags.integer(1), default=10, help="rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument(
        "--row",
        nargs=3,
        metavar=("METHOD", "K", "BATCH"),
        help="measure only this row and print JSON; the search for the largest batch starts at BATCH",
    )
    args = parser.parse_args()
    small = args.network in SMALL
    if args.depth and args.network != "cifar_resnet":
        parser.error(f"--depth is for cifar_resnet: leave it out with {args.network}")
    if args.row and args.row[0] not in METHODS:
        parser.error(f"--row {' '.join(args.row)}: the method is one of {', '.join(METHODS)}")
    if args.image_size and small:
        parser.error(f"{args.network} has 32×32 images: leave --image-size out")
    args.depth = args.depth or 110
    args.image_size = args.image_size or (32 if small else 224)
    args.batch_size = args.batch_size or (128 if small else 32)
    args.classes = 10 if small else 1000
    numbers = [most_modules(args) if splits == "all" else splits for splits in args.splits]
    args.splits = list(dict.fromkeys(numbers))
    return args


def number_of_modules(text):
    if text == "all":
        return text
    return flags.integer(2)(text)


# Counting and measuring


class Measured(NamedTuple):
    """A row: ``columns`` of the main table, {name: value}, and ``devices``, the peak MiB of each device."""

    columns: dict
    devices: list


def random_batch(args, size, device):
    """Random images (B, 3, s, s) and labels (B,)."""
    images = torch.randn(size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(args.classes, (size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def prepare(net, device):
    """Moves ``net`` to ``device`` in channels-last memory, in train mode, and returns it."""
    if not isinstance(next(net.parameters()), FakeTensor):
        return net.to(device, memory_format=torch.channels_last).train()
    # Module.to does not change FakeTensors. A gradient whose memory format differs from its weight's would be copied
    for module in net.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 4:
                setattr(module, name, nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last)))
    return net.train()


def steps_to_settle(method, splits, k=0):
    """The number of steps after which module ``k`` has all its persistent memory: momentum, and mini-batches in
    flight.
    """
    if method.delayed:
        return splits - k
    return 1


def peak_bytes(make_step, existing, earlier_steps, device):
    """(peak memory in bytes of a step after ``earlier_steps`` others, that step). The tensors ``existing`` count as
    well. On CUDA the allocator counts everything, so there must be no other tensors.
    """
    if device.type == "cuda":
        step = make_step()
        for _ in range(earlier_steps):
            step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device), step
    with LiveStorages() as memory:
        for tensor in existing:
            storage = tensor.untyped_storage()
            memory.remember(storage, storage.nbytes())
        step = make_step()
        for _ in range(earlier_steps):
            step()
        memory.peak = memory.live
        step()
    return memory.peak, step


def one_device_peak(args, method, net, size):
    """(peak memory in bytes of a step with ``size`` images on one device, that step)."""
    device = pick_device(args.device)
    images, labels = random_batch(args, size, device)
    make_step = functools.partial(method.make_step, args, net, images, labels)
    existing = [*net.parameters(), *net.buffers(), images, labels]
    return peak_bytes(make_step, existing, steps_to_settle(method, len(net)), device)


def device_peaks(args, method, splits):
    """The peak MiB of each of ``splits`` devices, with one module on each."""
    device = pick_device(args.device)
    autocast = autocast_of(args)
    net = method.build(args, splits)
    inputs, labels = random_batch(args, args.batch_size, device)
    peaks = []
    for k in range(splits):
        module = prepare(net[k], device)
        make_step = functools.partial(method.make_device_step, args, net, k, inputs, labels)
        existing = [inputs, *module.parameters(), *module.buffers()]
        needs_labels = k == splits - 1 or hasattr(module, "auxiliary")
        if needs_labels:
            existing.append(labels)
        peak, _ = peak_bytes(make_step, existing, steps_to_settle(method, splits, k), device)
        peaks.append(peak / MIB)
        body = getattr(module, "body", module)
        with torch.no_grad(), autocast():
            inputs = body(inputs)
        net[k] = nn.Identity()  # frees the module's memory
        del module, body, make_step, existing
    return peaks


def count(args, method, splits):
    """The Measured row, counted with FakeTensors and without computing."""
    args = Namespace(**(vars(args) | {"device": "cpu"}))
    columns = {}
    devices = []
    with FakeTensorMode():
        if method.make_step:
            net = prepare(method.build(args, splits), torch.device("cpu"))
            peak, step = one_device_peak(args, method, net, args.batch_size)
            weights = sum(parameter.nbytes for parameter in net.parameters())
            buffers = sum(buffer.nbytes for buffer in net.buffers())
            columns["GFLOP/image"] = count_flops(step) / args.batch_size / 1e9
            columns["fixed MiB"] = (3 * weights + buffers) / MIB  # gradients and momentum are as large as the weights
            columns["peak MiB"] = peak / MIB
            del step
            if splits == 1:
                devices = [peak / MIB]
            if args.budget:
                columns["largest"] = counted_largest(args, method, net, peak)
        if method.make_device_step:
            devices = device_peaks(args, method, splits)
    if devices:
        columns["fullest MiB"] = max(devices)
    return Measured(columns, devices)


def counted_largest(args, method, net, known_peak):
    """The largest batch within the budget, found around a linear guess. ``known_peak``: that of --batch-size."""
    budget = args.budget * GIB

    @functools.cache
    def peak(size):
        return one_device_peak(args, method, net, size)[0]

    def fits(size):
        return peak(max(size, 2)) <= budget  # batch norm needs two

    size = args.batch_size
    slope = (peak(2 * size) - known_peak) / size
    return largest(fits, guess=int(size + (budget - known_peak) / slope))


def largest(fits, guess):
    """The largest integer ≥ 0 for which ``fits`` is true, searched around ``guess``. All smaller ones must fit, too."""
    low = 0
    high = None
    stride = 1
    candidate = max(guess, 1)
    while high is None or high - low > 1:
        if fits(candidate):
            low = candidate
        else:
            high = candidate
        if high == 1:
            return 0
        if high is None:
            candidate = low + stride
            stride *= 2
        elif low == 0:
            candidate = max(high - stride, 1)
            stride *= 2
        else:
            candidate = (low + high) // 2
    return low


def measure(args, method, splits, guess):
    """The Measured row according to the clock and CUDA's allocator. It must run in its own process."""
    device = pick_device(args.device)
    on_cuda = device.type == "cuda"
    columns = {}
    devices = []
    torch.manual_seed(1)
    if method.make_step:
        net = prepare(method.build(args, splits), device)
        peak, step = one_device_peak(args, method, net, args.batch_size)
        calls = math.ceil(MIN_SECONDS / step_seconds(step, 1, device))
        seconds = statistics.median(step_seconds(step, calls, device) for _ in range(args.repeats))
        columns = {"ms/step": 1000 * seconds, "images/s": args.batch_size / seconds}
        del step
        if on_cuda:
            columns["CUDA peak MiB"] = peak / MIB
            if splits == 1:
                devices = [peak / MIB]
            if args.budget:
                columns["CUDA largest"] = largest_that_runs(args, method, net, guess)
        del net
        gc.collect()
    if on_cuda and method.make_device_step:
        devices = device_peaks(args, method, splits)
    if devices:
        columns["CUDA fullest MiB"] = max(devices)
    return Measured(columns, devices)


def largest_that_runs(args, method, net, guess):
    """The largest batch whose steps run if PyTorch may allocate no more than the budget."""
    device = pick_device(args.device)

    def fits(size):
        gc.collect()
        torch.cuda.empty_cache()
        try:
            one_device_peak(args, method, net, max(size, 2))  # batch norm needs two
        except torch.cuda.OutOfMemoryError:
            return False
        return True

    share = args.budget * GIB / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    limit = largest(fits, guess)
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    return limit


def memory_size(device):
    """The memory of ``device`` in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_in_process(args, name, splits, counted):
    """Runs ``measure`` in its own process and returns its result. Empty if nothing can be measured. ``counted``: the
    columns that were counted.
    """
    device = pick_device(args.device)
    needed = counted.get("peak MiB", 0) * MIB
    fits = needed <= memory_size(device)
    is_measurable = METHODS[name].make_step or device.type == "cuda"
    if not (fits and is_measurable):
        return Measured({}, [])
    guess = int(counted.get("largest", 0))
    command = [sys.executable, __file__, *sys.argv[1:], "--row", name, str(splits), str(guess)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(
            f"{name}, K = {splits}: its own process ended with {done.returncode}; its step needs "
            f"{needed / GIB:.1f} GiB: choose other --splits or --methods, or --count"
        )
    return Measured(*json.loads(done.stdout))


# The tables


def describe_saving(peak, base):
    """Describes how ``peak`` compares with ``base``."""
    if math.isnan(peak) or math.isnan(base):
        return ""
    more = 100 * (peak / base - 1)
    if more <= -0.5:
        return f"saves {-more:.0f} %"
    if more < 0.5:
        return "saves nothing"
    return f"saves nothing: {more:.0f} % more"


def savings(frame):
    """A frame of texts: what each row of ``frame``, the main table, saves."""
    base = frame["peak MiB"].iloc[0]
    rows = {}
    for (name, splits), row in frame.iloc[1:].iterrows():
        stage = frame["fullest MiB"].get(("pipeline", splits), math.nan)
        rows[name, splits] = {
            "one device": describe_saving(row["peak MiB"], base),
            "fullest of K": describe_saving(row["fullest MiB"], base),
            "fullest, beside the pipeline's": describe_saving(row["fullest MiB"], stage),
        }
    return as_frame(rows)


def as_frame(rows):
    """A frame of {(method, K): {column: value}}."""
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=("method", "K"))
    return frame


COLUMNS = [
    "ms/step",
    "images/s",
    "GFLOP/image",
    "fixed MiB",
    "peak MiB",
    "fullest MiB",
    "largest",
    "more",
    "CUDA peak MiB",
    "CUDA fullest MiB",
    "CUDA largest",
    "CUDA more",
]


def make_tables(args, measure_row=measure_in_process):
    """(main table, {(method, K, "counted" or "CUDA"): MiB of each device}). Prints progress to stderr."""
    todo = [("back-propagation", 1)]
    for name in METHODS:
        if name in args.methods:
            todo += [(name, splits) for splits in args.splits]
    rows = {}
    devices = {}
    for name, splits in todo:
        counted = count(args, METHODS[name], splits)
        rows[name, splits] = counted.columns
        devices[name, splits, "counted"] = counted.devices
        if not args.count:
            measured = measure_row(args, name, splits, counted.columns)
            rows[name, splits] = counted.columns | measured.columns
            devices[name, splits, "CUDA"] = measured.devices
        print(f"# {name}, K = {splits}: done", file=sys.stderr, flush=True)
    frame = as_frame(rows)
    for name in ("largest", "CUDA largest"):
        if name in frame:
            base = max(frame[name].iloc[0], 1)
            frame[name.replace("largest", "more")] = 100 * (frame[name] / base - 1)
    return frame[[name for name in COLUMNS if name in frame]], devices


def list_devices(devices):
    """Lines with the peak of each device, for rows with several."""
    lines = []
    for (name, splits, by), peaks in devices.items():
        if len(peaks) < 2:
            continue
        title = f"{name}, {splits}"
        if by == "CUDA":
            title += " by CUDA"
        lines.append(textwrap.fill(f"{title}: {' '.join(f'{mib:.1f}' for mib in peaks)}", 120))
    return "\n".join(lines)


def header(args):
    """The lines above the tables."""
    lines = environment(pick_device(args.device), args.half)
    name = f"ResNet-{args.depth}" if args.network == "cifar_resnet" else args.network
    about = f"# {name}, {args.image_size}×{args.image_size}, batch {args.batch_size}"
    if args.count:
        precision = lines[-1].rsplit(", ")[-1]
        lines[-1] = f"# device: none, counted, {precision}"
    else:
        about += f", {args.repeats} rounds"
    lines.append(about)
    if args.budget:
        lines.append(f"# largest: the largest batch in {args.budget:g} GiB; more: in % than back-propagation's")
    return "\n".join(lines)


def report(args, frame, devices):
    """The text of the whole output."""
    whole_numbers = {name: "{:.0f}".format for name in frame if "largest" in name or "more" in name}
    return "\n\n".join(
        [
            header(args),
            frame.to_string(float_format="{:,.2f}".format, formatters=whole_numbers, na_rep="", sparsify=False),
            "MiB of each device, from the image up",
            list_devices(devices),
            "What a method saves of back-propagation's memory",
            savings(frame).to_string(sparsify=False) + "\n",
        ]
    )


def main():
    args = parse_args()
    if args.row:
        name, splits, guess = args.row
        print(json.dumps(measure(args, METHODS[name], int(splits), int(guess))))
        return
    pick_device(args.device)
    check_output(args.output)
    with FakeTensorMode():
        for splits in args.splits:
            decoupled_network(
                args, splits
            )  # raises InputError before the work if the network cannot be split like that
    publish(report(args, *make_tables(args)), args.output)


if __name__ == "__main__":
    flags.start(main)
