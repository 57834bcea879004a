"""Measures throughput and memory of training steps, and how close they come to the
speed of a large matrix product, for two networks. Needs no data set: the images
are random.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --half --network dni

learning_curves compares DGL with sequential greedy learning and back-propagation.
It shows how close each step comes to the machine's ceiling, that DGL's step needs
less memory than back-propagation's, that everything except the step (data, meters,
log) is a small part of an epoch, and how much longer it takes to evaluate all heads
than only the last one. dni compares back-propagation, DGL, DNI and cDNI. It shows
that the FLOPs of DGL's step are exactly those of its modules, how close DGL comes to
the ceiling compared with back-propagation, and that synthesizers run no more often
than the method needs.

Columns:
  images/s      median over the rounds
  % of DGL      time per image, in % of that of DGL's step
  GFLOP/image   counted in that very step; a multiply-add is 2 (decoupled.analysis.costs)
  GFLOP/s       the product of both
  % of ceiling  GFLOP/s in % of those of the fastest large square matrix product in
                the same precision, measured before and after each round
  MB/image      read and written by the step's operations (Traffic)
  % of limit    the shortest time in which the machine could run the step, in % of
                the measured time. The shortest time of an operation is that of its
                FLOPs at the ceiling or that of its bytes at the memory bandwidth,
                whichever is longer. Small tensors stay in caches, which are
                faster: there it can be above 100
  peak MiB      peak of the first two steps, momentum included, without network
                and images (decoupled.analysis.costs.peak_memory)
Rows, in a table for each network, are training steps on one batch that is already
on the device. "stage n" trains module n on the frozen ones below; the mean over
stages stands for sequential training as a whole (its peak is the largest).
Evaluation includes its data and meters. Rows called "an epoch's" happen once per
50,000 images. Each round measures every row, so that changes in the machine's speed
affect all rows alike.
"""

import atexit
import contextlib
import copy
import gc
import io
import itertools
import math
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoupled.analysis.costs import costs, peak_memory, step_seconds
from decoupled.data.batches import Batches
from decoupled.data.datasets import CIFAR10_MEAN, CIFAR10_STD
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.flops import count_flops, operator_flops
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import flags
from decoupled.training.device import pick_device
from decoupled.training.environment import environment
from decoupled.training.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from method_steps import ScaledOptimizer, autocast_on, dgl_step, dni_step, sequential_module_step, sgd

sys.path.append(str(Path(__file__).resolve().parents[1] / "dni"))  # its scripts import modules from their folder
from dni import cifar_cnn_dni, cifar_dgl

CLASSES = 10  # CIFAR-10's
BATCH_SIZE = {"learning_curves": 128, "dni": 256}  # the experiments'
DEPTH = 4  # of the learning_curves network
CHANNELS = 128  # of the dni network


class Sizes(NamedTuple):
    """How much to measure."""

    train: int  # images
    test: int  # images
    test_batch: int  # images
    min_seconds: float  # how long a row is repeated in each round, at least
    matrix: dict  # {device type: side of the matrices whose product gives the ceiling}
    stream: dict  # {device type: elements of the arrays that give the bandwidth, many times the caches}


FULL = Sizes(
    train=50_000,
    test=10_000,
    test_batch=1000,
    min_seconds=0.1,
    matrix={"cpu": 2048, "mps": 4096, "cuda": 8192},
    stream={"cpu": 2**25, "mps": 2**25, "cuda": 2**27},
)
SMOKE = Sizes(
    train=64,
    test=16,
    test_batch=8,
    min_seconds=1e-9,
    matrix={"cpu": 64, "mps": 64, "cuda": 64},
    stream={"cpu": 64, "mps": 64, "cuda": 64},
)


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--network", choices=("all", *BATCH_SIZE), default="all", help="which network")
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=flags.integer(1), help="CPU threads of PyTorch (default: PyTorch's)")
    parser.add_argument(
        "--batch-size",
        type=flags.integer(2),
        help="images per step (default: the experiment's, 128 or, for dni, 256)",
    )
    parser.add_argument("--repeats", type=flags.integer(1), default=10, help="rounds")
    parser.add_argument(
        "--plain-malloc",
        action="store_true",
        help="let the C library return freed memory to the system after each step, instead of keeping it for the next",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes, only to check that everything runs; the numbers are meaningless",
    )
    return parser.parse_args()


class Setting(NamedTuple):
    """What all rows of a network are measured with."""

    device: torch.device
    half: bool
    train: Batches
    test: Batches
    images: torch.Tensor  # (B, 3, 32, 32), a training batch
    labels: torch.Tensor  # (B,)

    @property
    def autocast(self):
        return autocast_on(self.device, self.half)

    def place(self, net):
        """Moves ``net`` to the device, in channels-last memory and train mode, and returns it."""
        return net.to(self.device, memory_format=torch.channels_last).train()


class Row(NamedTuple):
    """A row of the table: ``step()`` processes ``images`` images. ``net`` is given if describe_parts needs it."""

    name: str
    images: int
    step: Callable
    net: nn.Module | None = None


# The rows of learning_curves, each with its own network.


def learning_curves_rows(setting, sizes):
    return [
        greedy_row(setting, "DGL step"),
        *sequential_rows(setting),
        greedy_row(setting, "back-propagation step", block_size=DEPTH),  # DGL with a single module
        *evaluation_rows(setting, sizes),
        *housekeeping_rows(setting, sizes),
    ]


def learning_curves_network(setting, block_size=1):
    """The network of learning_curves and the optimizers of its modules."""
    net = layerwise_cnn(
        channels=64, depth=DEPTH, downsample=(1, 3), auxiliary="mlp-sr", classes=CLASSES, block_size=block_size
    )
    setting.place(net)
    optimizers = [ScaledOptimizer(sgd(module, lr=0.1, weight_decay=5e-4), setting.half) for module in net]
    return net, optimizers


def greedy_row(setting, name, block_size=1):
    net, optimizers = learning_curves_network(setting, block_size)

    def step():
        dgl_step(net, optimizers, setting.images, setting.labels, setting.autocast)

    return Row(name, len(setting.labels), step)


def sequential_rows(setting):
    return [sequential_row(setting, module_index) for module_index in range(DEPTH)]


def sequential_row(setting, module_index):
    net, optimizers = learning_curves_network(setting)
    optimizer = optimizers[module_index]

    def step():
        sequential_module_step(net, module_index, optimizer, setting.images, setting.labels, setting.autocast)

    return Row(f"sequential step, stage {module_index + 1}", len(setting.labels), step)


def evaluation_rows(setting, sizes):
    net, _ = learning_curves_network(setting)

    def all_heads():
        with setting.autocast():
            evaluate(net, setting.test)

    def last_head():
        with setting.autocast():
            evaluate(net, setting.test, [DEPTH - 1])

    return [
        Row(f"evaluation, all {DEPTH} heads", sizes.test_batch, all_heads),
        Row("evaluation, last head", sizes.test_batch, last_head),
    ]


def housekeeping_rows(setting, sizes):
    """Data, meters, log and checkpoint of DGL."""
    net, optimizers = learning_curves_network(setting)
    forever = itertools.chain.from_iterable(itertools.repeat(setting.train))
    with torch.no_grad(), setting.autocast():
        every_logits = net(setting.images)
    losses = [F.cross_entropy(logits.float(), setting.labels) for logits in every_logits]

    def update_meters():
        for loss, logits in zip(losses, every_logits, strict=True):
            Meter().update(loss, logits, setting.labels)

    def epoch_meter(batches):
        meter = Meter()
        for _ in range(batches):
            meter.update(losses[0], every_logits[0], setting.labels)
        return meter

    train_meter = epoch_meter(len(setting.train))
    test_meter = epoch_meter(sizes.test // sizes.test_batch)
    run = begin_run(setting, net, optimizers)

    def log():
        with contextlib.redirect_stdout(io.StringIO()):
            for n in range(1, DEPTH + 1):
                run.log(n, 1, train_meter, test_meter)

    return [
        Row("data, training batch", len(setting.labels), lambda: next(forever)),
        Row("data, test batch", sizes.test_batch, lambda: next(iter(setting.test))),
        Row("meters, training batch", len(setting.labels), update_meters),
        Row("data, an epoch's order", sizes.train, setting.train.draw),
        Row("log, an epoch's", sizes.train, log),
        Row("checkpoint, an epoch's", sizes.train, run.save),
    ]


def begin_run(setting, net, optimizers):
    """A Run in its first epoch, whose log and checkpoint are in a temporary folder."""
    folder = tempfile.mkdtemp(prefix="throughput-")
    atexit.register(shutil.rmtree, folder)
    parser = flags.parser(__doc__, epochs=1, batch_size=len(setting.labels))
    run = Run(parser.parse_args(["--device", str(setting.device), "--log-dir", folder]))
    next(run.epochs(net=net, optimizers=[optimizer.optimizer for optimizer in optimizers]))
    return run


# The rows of dni


def dni_rows(setting, sizes):
    return [
        dni_row(setting, "back-propagation step"),
        dni_greedy_row(setting),
        dni_row(setting, "DNI step", synthetic=True),
        dni_row(setting, "cDNI step", synthetic=True, context=True),
    ]


def dni_row(setting, name, synthetic=False, context=False):
    args = Namespace(channels=CHANNELS, dni=synthetic, context=context)
    net = setting.place(cifar_cnn_dni.build(args, CLASSES))
    optimizer = Adam(net.parameters(), lr=3e-5, fused=True)

    def step():
        one_hot = F.one_hot(setting.labels, CLASSES).float() if context else None
        dni_step(net, optimizer, setting.images, setting.labels, setting.autocast, one_hot)

    return Row(name, len(setting.labels), step, net)


def dni_greedy_row(setting):
    net = setting.place(cifar_dgl.build(Namespace(channels=CHANNELS), CLASSES))
    optimizers = [ScaledOptimizer(Adam(module.parameters(), lr=3e-5, fused=True), setting.half) for module in net]

    def step():
        dgl_step(net, optimizers, setting.images, setting.labels, setting.autocast)

    return Row("DGL step", len(setting.labels), step, net)


# Measuring


def settle(rows):
    """Runs each row's step once. In the first step, CUDA's libraries try kernels and allocate workspaces that they
    keep, which must not count in the peak of any row.
    """
    for row in rows:
        row.step()


def matrix_product(half, device, sizes):
    """(a callable that multiplies two large square matrices in the precision of the convolutions, its FLOPs)."""
    dtype = torch.float32
    if half:
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    side = sizes.matrix[device.type]
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty(side, side, device=device, dtype=dtype)

    def multiply():
        # By default, fp32 convolutions on CUDA use TF32, but matrix products do not
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
        torch.mm(left, right, out=product)
        torch.backends.cuda.matmul.fp32_precision = before

    return multiply, 2 * side**3


class Operation(NamedTuple):
    """The costs of one operation."""

    flops: int
    size: int  # bytes read and written


class Traffic(TorchDispatchMode):
    """Counts the operations that run inside the block, including backward passes: ``operations``, a list of Operation.

    Bytes are those of the tensors that an operation reads and of its results, each tensor once and as if there were no
    caches; a tensor changed in place counts as read and written. Views and empty tensors cost nothing.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations are not decomposed before they arrive here
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.is_view or "empty" in func.__name__ or func._schema.name == "aten::detach":
            return result
        read = distinct_tensors((args, kwargs))
        written = distinct_tensors(result)
        if func._schema.is_mutable and not written:  # it returns nothing, like fused optimizers
            written = read
        flops = operator_flops(func, args, kwargs, result)
        self.operations.append(Operation(flops, num_bytes(read) + num_bytes(written)))
        return result


def distinct_tensors(tree):
    """The tensors in nested lists, tuples and dicts, each once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
    return tensors.values()


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stream(device, sizes):
    """(a callable that reads two arrays and writes a third, each much larger than the caches, the bytes it moves)."""
    elements = sizes.stream[device.type]
    left = torch.ones(elements, device=device)
    right = torch.ones(elements, device=device)
    total = torch.ones(elements, device=device)
    return lambda: torch.add(left, right, alpha=3.0, out=total), 3 * 4 * elements


class Measurements(NamedTuple):
    """The costs of the rows of one network."""

    costs: pd.DataFrame  # by row: images, FLOPs per image, bytes per image, least seconds per image, peak memory
    times: pd.DataFrame  # seconds per image: a line per round, a column per row
    ceiling: float  # FLOP/s
    bandwidth: float  # bytes/s


def measure(rows, setting, sizes, repeats):
    """The Measurements of ``rows``."""
    device = setting.device
    memory = []
    flops = []
    traffic = []
    calls = []
    for row in rows:
        memory.append(peak_memory(lambda row=row: (row.step(), row.step()), device))
        flops.append(count_flops(row.step) / row.images)
        with Traffic() as counted:
            row.step()
        traffic.append(counted.operations)
        calls.append(math.ceil(sizes.min_seconds / step_seconds(row.step, 1, device)))

    multiply, product_flops = matrix_product(setting.half, device, sizes)
    add, streamed = stream(device, sizes)
    step_seconds(add, 1, device)  # warm up
    step_seconds(multiply, 1, device)
    products = [step_seconds(multiply, 1, device)]
    product_calls = math.ceil(sizes.min_seconds / products[0])
    sums = []
    rounds = []
    for _ in range(repeats):
        products.append(step_seconds(multiply, product_calls, device))
        times = []
        for row, row_calls in zip(rows, calls, strict=True):
            times.append(step_seconds(row.step, row_calls, device) / row.images)
        rounds.append(times)
        products.append(step_seconds(multiply, product_calls, device))
        sums.append(step_seconds(add, 3, device))
    ceiling = product_flops / min(products)
    bandwidth = streamed / min(sums)

    names = [row.name for row in rows]
    images = [row.images for row in rows]
    columns = {
        "images": images,
        "flops": flops,
        "bytes": [sum(each.size for each in operations) for operations in traffic],
        "limit": [least_seconds(operations, ceiling, bandwidth) for operations in traffic],
        "memory": memory,
    }
    frame = pd.DataFrame(columns, index=names)
    frame["bytes"] /= images
    frame["limit"] /= images
    return Measurements(frame, pd.DataFrame(rounds, columns=names), ceiling, bandwidth)


def least_seconds(operations, ceiling, bandwidth):
    """The shortest time in which the machine could run ``operations`` one after the other."""
    return sum(max(each.flops / ceiling, each.size / bandwidth) for each in operations)


def add_sequential_mean(measured):
    """``measured`` with another row below the stages of sequential learning, if there are any: their mean."""
    names = list(measured.times.columns)
    stages = [name for name in names if name.startswith("sequential step, stage")]
    if not stages:
        return measured
    mean = "sequential step, mean"
    row = measured.costs.loc[stages].mean()
    row["memory"] = measured.costs["memory"][stages].max()
    names.insert(names.index(stages[-1]) + 1, mean)
    frame = pd.concat([measured.costs, pd.DataFrame({mean: row}).T]).loc[names]
    times = measured.times.assign(**{mean: measured.times[stages].mean(axis=1)})[names]
    return measured._replace(costs=frame, times=times)


def make_table(measured):
    """The frame to print."""
    measured = add_sequential_mean(measured)
    seconds = measured.times.median()
    frame = measured.costs
    speed = frame["flops"] / seconds
    table = pd.DataFrame(
        {
            "images/s": 1 / seconds,
            "% of DGL": 100 * seconds / seconds["DGL step"],
            "GFLOP/image": frame["flops"] / 1e9,
            "GFLOP/s": speed / 1e9,
            "% of ceiling": 100 * speed / measured.ceiling,
            "MB/image": frame["bytes"] / 1e6,
            "% of limit": 100 * frame["limit"] / seconds,
            "peak MiB": frame["memory"] / 2**20,
        }
    )
    without_products = table["GFLOP/image"] == 0
    table.loc[without_products, ["GFLOP/image", "GFLOP/s", "% of ceiling", "MB/image", "% of limit"]] = np.nan
    return table


FORMATS = {"images/s": "{:,.0f}", "GFLOP/image": "{:.3f}", "MB/image": "{:.3f}"}


def format_table(table):
    formatters = {column: FORMATS.get(column, "{:,.1f}").format for column in table}
    return table.to_string(formatters=formatters, na_rep="")


def describe_epoch(rows, table, times, sizes):
    """Lines that say how much of an epoch of DGL data, meters and log take, and what evaluating all heads costs."""
    typical = times.median()
    seconds = {
        "data": sizes.train * (typical["data, training batch"] + typical["data, an epoch's order"])
        + sizes.test * typical["data, test batch"],
        # A slight overestimate for the test images, whose batches are larger
        "meters": (sizes.train + sizes.test) * typical["meters, training batch"],
        "log": sizes.train * typical["log, an epoch's"],
    }
    checkpoint = sizes.train * typical["checkpoint, an epoch's"]
    all_heads = f"evaluation, all {DEPTH} heads"
    per_training_image = ["DGL step", "data, training batch", "meters, training batch", "data, an epoch's order"]
    training = sizes.train * typical[per_training_image].sum()
    epoch = training + sizes.test * typical[all_heads] + seconds["log"] + checkpoint
    shares = " + ".join(f"{name} {100 * part / epoch:.2f}" for name, part in seconds.items())
    ratio = (times[all_heads] / times["evaluation, last head"]).median()
    return [
        f"An epoch of DGL ({sizes.train:,} images trained, {sizes.test:,} evaluated) takes {epoch:.1f} s.",
        f"data + meters + log: {100 * sum(seconds.values()) / epoch:.2f} % of it ({shares}); checkpoint "
        f"{100 * checkpoint / epoch:.2f} %",
        f"evaluation of all heads takes {ratio:.3f} times as long as of the last head",
    ]


def describe_parts(rows, table, times, sizes):
    """Lines that compare DGL's step with the sum of its modules at the GFLOP/s of back-propagation, and say how often
    synthesizers run.
    """
    (net,) = [row.net for row in rows if row.name == "DGL step"]
    frame = costs(copy.deepcopy(net).to("meta"), torch.empty(2, 3, 32, 32, device="meta"))
    parts = frame["training_flops"].xs("module", level="part") / 1e9
    dgl = table.loc["DGL step"]
    backprop = table.loc["back-propagation step"]
    backprop_pace = times["back-propagation step"] / backprop["GFLOP/image"]
    dgl_pace = times["DGL step"] / parts.sum()
    ratio = (backprop_pace / dgl_pace).median()
    each = " + ".join(f"{part:.3f}" for part in parts)
    runs = ", ".join(f"{row.name.removesuffix(' step')} {synthesizer_runs(row)}" for row in rows)
    return [
        f"DGL's modules, each alone, cost {each} = {parts.sum():.3f} GFLOP/image; its step counts "
        f"{dgl['GFLOP/image']:.3f}.",
        f"At back-propagation's share of the ceiling, {backprop['% of ceiling']:.1f} %, that is "
        f"{dgl['images/s'] / ratio:,.0f} images/s; DGL runs {dgl['images/s']:,.0f} ({ratio:.2f} ×).",
        f"Runs of synthesizers (DGL: auxiliaries) in a step: {runs}. The network has 3 interfaces, DGL 2 auxiliaries.",
    ]


def synthesizer_runs(row):
    """How many times synthesizers run in a step."""
    runs = []
    hooks = []
    for module in row.net.modules():
        if (
            type(module).__name__ == "ConvSynthesizer"
        ):  # by name, because the class of a script loaded by path is another object
            hooks.append(module.register_forward_hook(lambda *_: runs.append(1)))
    row.step()
    for hook in hooks:
        hook.remove()
    return len(runs)


NETWORKS = {
    "learning_curves": (learning_curves_rows, describe_epoch),
    "dni": (dni_rows, describe_parts),
}


def random_setting(device, half, batch_size, sizes):
    """A Setting with random images."""
    torch.manual_seed(1)
    pixels = torch.randint(256, (sizes.train, 32, 32, 3), dtype=torch.uint8).to(device)
    labels = torch.randint(CLASSES, (sizes.train,)).to(device)
    train = Batches(pixels, labels, batch_size, mean=CIFAR10_MEAN, std=CIFAR10_STD, augment=True)
    size = sizes.test_batch
    test = Batches(pixels[:size], labels[:size], size, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return Setting(device, half, train, test, *next(iter(train)))


def benchmark(network, setting, sizes, repeats):
    """(Measurements, the frame to print, lines to print below it) of a network."""
    make_rows, describe = NETWORKS[network]
    if setting.device.type == "cuda":
        settle(make_rows(setting, sizes))
        gc.collect()
    rows = make_rows(setting, sizes)
    measured = measure(rows, setting, sizes, repeats)
    table = make_table(measured)
    return measured, table, describe(rows, table, measured.times, sizes)


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    sizes = SMOKE if args.smoke else FULL
    networks = NETWORKS if args.network == "all" else [args.network]
    malloc = ", plain malloc" if args.plain_malloc else ""
    print("\n".join(environment(device, args.half)))
    for network in networks:
        batch_size = args.batch_size or BATCH_SIZE[network]
        setting = random_setting(device, args.half, batch_size, sizes)
        measured, table, conclusion = benchmark(network, setting, sizes, args.repeats)
        print(
            f"\n# {network}, batch {batch_size}, {args.repeats} rounds{malloc}; ceiling "
            f"{measured.ceiling / 1e9:,.0f} GFLOP/s, memory {measured.bandwidth / 1e9:,.1f} GB/s\n"
        )
        print(format_table(table))
        print()
        print("\n".join(conclusion), flush=True)


if __name__ == "__main__":
    flags.start(main, keep_memory="--plain-malloc" not in sys.argv)
