"""Throughput and memory of training steps beside the matrix-product ceiling,
for two networks. Needs no data set: the images are random.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --half --network dni

learning_curves: DGL beside sequential greedy learning and back-propagation. It
shows how near the machine's ceiling each step runs; that DGL's needs less
memory than back-propagation's; that what is not the step (data, meters, log) is
a small part of an epoch; what evaluating every head costs beside the last
alone. dni: back-propagation, DGL, DNI and cDNI. It shows that DGL's step costs
its modules' FLOPs and no more, at which share of the ceiling beside
back-propagation's, and that synthesizers run no more often than the method
needs.

Columns:
  images/s      median over the rounds
  % of DGL      time an image takes, DGL's step being 100
  GFLOP/image   counted in that very step; a multiply-add is 2 (decoupled.analysis.costs)
  GFLOP/s       the product of both
  % of ceiling  GFLOP/s beside the best large square matrix product of the same
                precision, measured before and after each round
  MB/image      read and written by the step's operations (Traffic)
  % of limit    of the least time in which the machine could run the step: for
                each operation in turn, its FLOPs at the ceiling or its bytes at
                the memory bandwidth, whichever takes longer. Small tensors stay
                in caches, which are faster: there it can be above 100
  peak MiB      made by two steps from the start on, momentum included, on top
                of network and images (decoupled.analysis.costs.peak_memory)
Rows, a table for each network: training steps on one batch, already on the
device; "stage n" learns module n on the frozen ones below, their mean is that
of sequential training as a whole (and its largest peak). Evaluation includes
its data and meters. "an epoch's" rows are done once for 50,000 images. Each
round measures every row, so that a drift of the machine hits all alike.
"""

import contextlib
import copy
import gc
import io
import itertools
import math
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from decoupled.analysis.costs import costs, peak_memory, step_seconds
from decoupled.data.batches import Batches
from decoupled.data.datasets import CIFAR10_MEAN, CIFAR10_STD
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.flops import count_flops
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training import environment as provenance
from decoupled.training import flags
from decoupled.training.run import Run
from dni import synthesizer_context

sys.path.append(str(Path(__file__).resolve().parents[1] / "dni"))  # for what its scripts import beside them
from dni import cifar_cnn_dni, cifar_dgl

TRAIN, TEST, CLASSES = 50_000, 10_000, 10  # CIFAR-10's
TEST_BATCH = 1000
BATCH = {"learning_curves": 128, "dni": 256}  # the experiments'
DEPTH = 4  # of the learning-curves network
CHANNELS = 128  # of the dni network
SECONDS = 0.1  # a row is repeated within a round for at least as long
# Of the matrix product that is the ceiling: large enough to reach it, small enough to repeat
SIDE = {
    "cpu": 2048,
    "mps": 4096,
    "cuda": 8192,
}

# Elements of each array that is streamed from memory: many times the caches
STREAM = {"cpu": 2**25, "mps": 2**25, "cuda": 2**27}


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--network", choices=("all", *BATCH), default="all", help="networks")
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=flags.integer(1), help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument(
        "--batch-size",
        type=flags.integer(2),
        help="images a step (default: the experiment's, 128 or, for dni, 256)",
    )
    parser.add_argument("--repeats", type=flags.integer(1), default=10, help="rounds")
    parser.add_argument(
        "--plain-malloc", action="store_true", help="without decoupled.training.precision.keep_freed_memory"
    )
    parser.set_defaults(compile=False, epochs=1, seed=1, name="", resume=None, save_every=10.0)  # what a Run asks for
    return parser.parse_args()


class Row(NamedTuple):
    """A line of the table: ``step()`` deals with ``images`` images; ``net`` where what it costs is looked at more
    closely.
    """

    name: str
    images: int
    step: callable
    net: nn.Module = None


def greedy_step(run, net, optimizers, images, labels):
    """A callable: Algorithm 1 on one mini-batch, as in the scripts, without meters."""

    def step():
        representation = images
        for module, optimizer in zip(net, optimizers, strict=True):
            with run.autocast():
                representation, logits = module(representation)
            loss = F.cross_entropy(logits.float(), labels)
            run.step(loss, optimizer)
            representation = representation.detach()

    return step


# The rows of learning_curves. One function a method: it makes its own run and networks, and returns a list of rows.


def learning_curves(args, train, test):
    batch = next(iter(train))
    return [
        *dgl(args, *batch),
        *sequential(args, *batch),
        *dgl(args, *batch, block_size=DEPTH, name="back-propagation step"),
        *evaluation(args, train, test),
        *housekeeping(args, *batch, train, test),
    ]


def sgd(module):
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def begin(args, block_size=1):
    """(run, network, optimizers)."""
    run = Run(args)
    net = run.prepare(
        layerwise_cnn(
            channels=64, depth=DEPTH, downsample=(1, 3), auxiliary="mlp-sr", classes=CLASSES, block_size=block_size
        )
    )
    optimizers = [sgd(module) for module in net]
    return run, net, optimizers


def dgl(args, images, labels, block_size=1, name="DGL step"):
    """The step of learning_curves/cifar_dgl.py without meters. With all layers in one block it is back-propagation."""
    run, net, optimizers = begin(args, block_size)

    return [Row(name, len(labels), greedy_step(run, net, optimizers, images, labels))]


def sequential(args, images, labels):
    """The steps of learning_curves/cifar_sequential_greedy.py, one stage after the other, without meters."""
    return [sequential_stage(args, images, labels, n) for n in range(1, DEPTH + 1)]


def sequential_stage(args, images, labels, n):
    run, net, optimizers = begin(args)
    *frozen, module = net[:n]
    net.eval()
    module.train()

    def step():
        representation = images
        with run.autocast():
            with torch.no_grad():
                for below in frozen:
                    representation = below.body(representation)
            _, logits = module(representation)
        loss = F.cross_entropy(logits.float(), labels)
        run.step(loss, optimizers[n - 1])

    return Row(f"sequential step, stage {n}", len(labels), step)


def evaluation(args, train, test):
    run, net, _ = begin(args)

    def step(heads=None):
        with run.autocast():
            evaluate(net, test, heads)

    return [
        Row(f"evaluation, all {DEPTH} heads", TEST_BATCH, step),
        Row("evaluation, last head", TEST_BATCH, lambda: step([DEPTH - 1])),
    ]


def housekeeping(args, images, labels, train, test):
    """Data, meters, log and checkpoint of DGL."""
    run, net, optimizers = begin(args)
    next(run.epochs(net=net, optimizers=optimizers))  # writes its log and checkpoint
    stream = itertools.chain.from_iterable(itertools.repeat(train))
    with torch.no_grad(), run.autocast():
        every_logits = net(images)
    losses = [F.cross_entropy(logits.float(), labels) for logits in every_logits]
    train_meter, test_meter = Meter(), Meter()
    for meter, batches in ((train_meter, len(train)), (test_meter, TEST // TEST_BATCH)):
        for _ in range(batches):
            meter.update(losses[0], every_logits[0], labels)

    def meters():
        for loss, logits in zip(losses, every_logits, strict=True):
            Meter().update(loss, logits, labels)

    def log():
        with contextlib.redirect_stdout(io.StringIO()):
            for n in range(1, DEPTH + 1):
                run.log(n, 1, train_meter, test_meter)

    return [
        Row("data, training batch", len(labels), lambda: next(stream)),
        Row("data, test batch", TEST_BATCH, lambda: next(iter(test))),
        Row("meters, training batch", len(labels), meters),
        Row("data, an epoch's order", TRAIN, train.draw),
        Row("log, an epoch's", TRAIN, log),
        Row("checkpoint, an epoch's", TRAIN, run.save),
    ]


# The rows of dni


def dni(args, train, test):
    batch = next(iter(train))
    return [
        dni_adam(args, *batch, "back-propagation step"),
        dni_dgl(args, *batch),
        dni_adam(args, *batch, "DNI step", synthetic=True),
        dni_adam(args, *batch, "cDNI step", synthetic=True, context=True),
    ]


def dni_adam(args, images, labels, name, synthetic=False, context=False):
    """The step of dni/cifar_cnn_dni.py without meters."""
    run = Run(args)
    net = run.prepare(cifar_cnn_dni.Network(CHANNELS, CLASSES, synthetic, context)).train()
    optimizer = Adam(net.parameters(), lr=3e-5, fused=True)

    def step():
        given = F.one_hot(labels, CLASSES).float() if context else None
        optimizer.zero_grad()
        with run.autocast(), synthesizer_context(given):
            (logits,) = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()

    return Row(name, len(labels), step, net)


def dni_dgl(args, images, labels):
    """The step of dni/cifar_dgl.py without meters."""
    run = Run(args)
    blocks, last = cifar_dgl.backbone(CHANNELS, CLASSES)
    heads = [cifar_dgl.auxiliary(CHANNELS, CLASSES), cifar_dgl.auxiliary(CHANNELS, CLASSES), last]
    net = run.prepare(DecoupledNetwork(map(DecoupledModule, blocks, heads))).train()
    optimizers = [Adam(module.parameters(), lr=3e-5, fused=True) for module in net]

    return Row("DGL step", len(labels), greedy_step(run, net, optimizers, images, labels), net)


# Measuring


def settle(rows):
    """Takes each row's step once on CUDA, whose libraries try kernels and take lasting workspaces then: no row's peak
    is to have that memory.
    """
    for row in rows:
        row.step()


def matrix_product(half, device):
    """A callable that multiplies two large square matrices in the convolutions' precision, and the FLOPs of that."""
    dtype = torch.float32 if not half else torch.float16 if device.type == "cuda" else torch.bfloat16
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)

    def multiply():
        # CUDA's convolutions use TF32 in fp32 by default, its matrix products do not
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
        torch.mm(left, right, out=product)
        torch.backends.cuda.matmul.fp32_precision = before

    return multiply, 2 * side**3


class Traffic(TorchDispatchMode):
    """Inside the block: ``operations``, the (FLOPs, bytes) of each operation that runs, backward passes included.

    Bytes are what it reads of its tensors and writes of its results, each tensor once and as if there were no caches;
    of a result in place, both. Views and memory that is only reserved move nothing.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations come whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not func.is_view and "empty" not in func.__name__ and func._schema.name != "aten::detach":
            read, written = (
                {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
                for tree in ((args, kwargs), result)
            )
            if func._schema.is_mutable and not written:  # as of fused optimizers
                written = read
            size = sum(leaf.numel() * leaf.element_size() for leaf in (*read.values(), *written.values()))
            count = flop_registry.get(func.overloadpacket)
            self.operations.append((count(*args, **kwargs, out_val=result) if count else 0, size))
        return result


def stream(device):
    """A callable that reads two arrays and writes a third, much larger than caches, and the bytes of that."""
    elements = STREAM[device.type]
    left, right, total = (torch.ones(elements, device=device) for _ in range(3))
    return lambda: torch.add(left, right, alpha=3.0, out=total), 3 * 4 * elements


def measure(rows, args, device):
    """(frame with a line for each row: images, FLOPs an image, bytes an image, least seconds an image, peak bytes;
    seconds an image, rounds × rows; ceiling in FLOP/s; bandwidth in bytes/s).
    """
    lines, calls, traffic = [], [], []
    for row in rows:
        memory = peak_memory(lambda row=row: (row.step(), row.step()), device)
        lines.append({"images": row.images, "flops": count_flops(row.step) / row.images, "memory": memory})
        with Traffic() as counted:
            row.step()
        traffic.append(counted.operations)
        calls.append(math.ceil(SECONDS / step_seconds(row.step, 1, device)))
    multiply, flops = matrix_product(args.half, device)
    add, streamed = stream(device)
    step_seconds(add, 1, device)
    sums = []
    step_seconds(multiply, 1, device)
    products = [step_seconds(multiply, 1, device)]
    products_calls = math.ceil(SECONDS / products[0])
    rounds = []
    for _ in range(args.repeats):
        products.append(step_seconds(multiply, products_calls, device))
        rounds.append(
            [step_seconds(row.step, count, device) / row.images for row, count in zip(rows, calls, strict=True)]
        )
        products.append(step_seconds(multiply, products_calls, device))
        sums.append(step_seconds(add, 3, device))
    names = [row.name for row in rows]
    ceiling, bandwidth = flops / min(products), streamed / min(sums)
    for line, operations in zip(lines, traffic, strict=True):
        line["bytes"] = sum(size for _, size in operations) / line["images"]
        line["limit"] = sum(max(work / ceiling, size / bandwidth) for work, size in operations) / line["images"]
    return pd.DataFrame(lines, index=names), pd.DataFrame(rounds, columns=names), ceiling, bandwidth


def table(lines, times, ceiling):
    """The frame to print, from measure's first three results."""
    order = [*times.columns]
    if stages := [name for name in order if name.startswith("sequential step, stage")]:
        mean = "sequential step, mean"
        times[mean] = times[stages].mean(axis=1)
        lines.loc[mean] = {
            "images": lines["images"][stages[0]],
            "flops": lines["flops"][stages].mean(),
            "bytes": lines["bytes"][stages].mean(),
            "limit": lines["limit"][stages].mean(),
            "memory": lines["memory"][stages].max(),
        }
        order.insert(order.index(stages[-1]) + 1, mean)
    typical = times.median()
    speed = lines["flops"] / typical
    frame = pd.DataFrame(
        {
            "images/s": 1 / typical,
            "% of DGL": 100 * typical / typical["DGL step"],
            "GFLOP/image": lines["flops"] / 1e9,
            "GFLOP/s": speed / 1e9,
            "% of ceiling": 100 * speed / ceiling,
            "MB/image": lines["bytes"] / 1e6,
            "% of limit": 100 * lines["limit"] / typical,
            "peak MiB": lines["memory"] / 2**20,
        }
    )
    without = frame["GFLOP/image"] == 0
    frame.loc[without, ["GFLOP/image", "GFLOP/s", "% of ceiling", "MB/image", "% of limit"]] = np.nan
    return frame.loc[order]


def print_epoch(rows, frame, times):
    """What data, meters and log take of an epoch of DGL, and all heads' evaluation beside the last head's."""
    typical = times.median()
    parts = {
        "data": TRAIN * (typical["data, training batch"] + typical["data, an epoch's order"])
        + TEST * typical["data, test batch"],
        "meters": (TRAIN + TEST)
        * typical["meters, training batch"],  # a little too much for the test images: their batches are larger
        "log": TRAIN * typical["log, an epoch's"],
    }
    checkpoint = TRAIN * typical["checkpoint, an epoch's"]
    evaluated = f"evaluation, all {DEPTH} heads"
    training = TRAIN * (
        typical["DGL step"]
        + typical["data, training batch"]
        + typical["meters, training batch"]
        + typical["data, an epoch's order"]
    )
    epoch = training + TEST * typical[evaluated] + parts["log"] + checkpoint
    share = " + ".join(f"{name} {100 * part / epoch:.2f}" for name, part in parts.items())
    print(f"\nAn epoch of DGL ({TRAIN:,} images trained, {TEST:,} evaluated) takes {epoch:.1f} s.")
    print(
        f"data + meters + log: {100 * sum(parts.values()) / epoch:.2f} % of it ({share}); checkpoint "
        f"{100 * checkpoint / epoch:.2f} %"
    )
    ratio = (times[evaluated] / times["evaluation, last head"]).median()
    print(f"evaluation of all heads takes {ratio:.3f} times as long as of the last head")


def print_parts(rows, frame, times):
    """DGL's step beside the sum of its parts at back-propagation's share of the ceiling, and how often synthesizers
    run.
    """
    row = next(row for row in rows if row.name == "DGL step")
    parts = (
        costs(copy.deepcopy(row.net).to("meta"), torch.empty(2, 3, 32, 32, device="meta"))["training_flops"].xs(
            "module", level="part"
        )
        / 1e9
    )
    own, backprop = frame.loc["DGL step"], frame.loc["back-propagation step"]
    each = " + ".join(f"{part:.3f}" for part in parts)
    print(
        f"\nDGL's modules, each alone, cost {each} = {parts.sum():.3f} GFLOP/image; its step counts "
        f"{own['GFLOP/image']:.3f}."
    )
    ratio = ((times["back-propagation step"] / backprop["GFLOP/image"]) / (times["DGL step"] / parts.sum())).median()
    share, speed = backprop["% of ceiling"], own["images/s"]
    print(
        f"At back-propagation's share of the ceiling, {share:.1f} %, that is {speed / ratio:,.0f} "
        f"images/s; DGL runs {speed:,.0f} ({ratio:.2f} ×)."
    )
    counts = ", ".join(f"{row.name.removesuffix(' step')} {synthesizer_runs(row)}" for row in rows)
    print(
        f"Runs of synthesizers (DGL: auxiliaries) in a step: {counts}. The network has 3 interfaces, DGL 2 auxiliaries."
    )


def synthesizer_runs(row):
    """How often synthesizers run in a step."""
    ran = []
    # By name: scripts are loaded by path
    synthesizers = [module for module in row.net.modules() if type(module).__name__ == "ConvSynthesizer"]
    hooks = [synthesizer.register_forward_hook(lambda *_: ran.append(1)) for synthesizer in synthesizers]
    row.step()
    for hook in hooks:
        hook.remove()
    return len(ran)


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = flags.pick_device(args.device)
    malloc = ", plain malloc" if args.plain_malloc else ""
    with tempfile.TemporaryDirectory() as args.log_dir:
        print("\n".join(provenance.environment(device, args.half)))
        for network, rows_of, conclude in (
            ("learning_curves", learning_curves, print_epoch),
            ("dni", dni, print_parts),
        ):
            if args.network not in ("all", network):
                continue
            batch_size = args.batch_size or BATCH[network]
            torch.manual_seed(args.seed)
            pixels, labels = torch.randint(256, (TRAIN, 32, 32, 3), dtype=torch.uint8), torch.randint(CLASSES, (TRAIN,))
            common = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
            train = Batches(pixels.to(device), labels.to(device), batch_size, augment=True, **common)
            test = Batches(pixels[:TEST_BATCH].to(device), labels[:TEST_BATCH].to(device), TEST_BATCH, **common)
            if device.type == "cuda":
                settle(rows_of(args, train, test))
                gc.collect()
            rows = rows_of(args, train, test)
            lines, times, ceiling, bandwidth = measure(rows, args, device)
            frame = table(lines, times, ceiling)
            print(
                f"\n# {network}, batch {batch_size}, {args.repeats} rounds{malloc}; ceiling "
                f"{ceiling / 1e9:,.0f} GFLOP/s, memory {bandwidth / 1e9:,.1f} GB/s\n"
            )
            formats = {
                column: (
                    "{:,.0f}"
                    if column == "images/s"
                    else "{:.3f}"
                    if column in ("GFLOP/image", "MB/image")
                    else "{:,.1f}"
                ).format
                for column in frame
            }
            print(frame.to_string(formatters=formats, na_rep=""), flush=True)
            conclude(rows, frame, times)


if __name__ == "__main__":
    flags.start(main, keep_memory="--plain-malloc" not in sys.argv)
