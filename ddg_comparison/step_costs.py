"""Time and peak memory of a training step of DGL, sequential greedy learning,
DDG, back-propagation and back-propagation with checkpointing, against the
number of modules K.

    python ddg_comparison/step_costs.py
    python ddg_comparison/step_costs.py --depth 20 --splits 2 4 --half

Each row is the very step of that method's script, with random images, on one
device: its modules take turns, so the times show what a method computes, not
what it gains on K devices. Memory is that of the whole network.

Columns:
  ms/step       median over the rounds; each round measures every row, so that a
                drift of the machine hits all alike
  images/s      from that
  GFLOP/image   counted in a step; a multiply-add is 2 (decoupled.costs)
  peak MiB      made by K+1 steps from the start on, so with momentum and all
                that is in flight, on top of network and images (peak_memory)
The peaks beside back-propagation's follow.
"""

import math
import tempfile
from typing import NamedTuple

import cifar_backprop
import cifar_ddg
import cifar_dgl
import pandas as pd
import torch
from cifar_resnet import chained_resnet, decoupled_resnet
from torch.nn import functional as F
from torch.optim import SGD

from decoupled import flags, provenance
from decoupled.costs import count_flops, peak_memory, step_seconds
from decoupled.runs import Run

CLASSES = 10
SECONDS = 0.1  # a row is repeated within a round for at least as long


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="of the ResNet, 6n+2")
    parser.add_argument(
        "--splits",
        type=flags.integer(2),
        nargs="+",
        default=[2, 4],
        metavar="K",
        help="numbers of modules (default: 2 4)",
    )
    parser.add_argument("--batch-size", type=flags.integer(2), default=128, help="images a step")
    parser.add_argument("--repeats", type=flags.integer(1), default=10, help="rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.set_defaults(compile=False, epochs=1, seed=1, name="", resume=None, save_every=10.0)  # what a Run asks for
    return parser.parse_args()


class Row(NamedTuple):
    """A line of the table: ``step()`` is a training step of ``method`` with K modules."""

    method: str
    splits: int
    step: callable


# The rows. One function a method: it makes its own run and network.


def begin(args, net, learners):
    """(run, optimizers), one for each of ``learners``."""
    run = Run(args)
    run.prepare(net).train()
    optimizers = [
        SGD(learner.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True) for learner in learners
    ]
    return run, optimizers


def backprop(args, images, labels, splits=1):
    net = chained_resnet(args.depth, splits, CLASSES)
    run, (optimizer,) = begin(args, net, [net])
    name = "checkpointing" if splits > 1 else "back-propagation"
    return Row(name, splits, lambda: cifar_backprop.step(run, net, optimizer, images, labels, splits > 1))


def ddg(args, images, labels, splits):
    net = chained_resnet(args.depth, splits, CLASSES)
    run, optimizers = begin(args, net, net)
    in_flight = [cifar_ddg.InFlight(run, net, k) for k in range(splits)]
    return Row("DDG", splits, lambda: cifar_ddg.step(run, net, optimizers, in_flight, images, labels))


def dgl(args, images, labels, splits):
    net = decoupled_resnet(args.depth, splits, CLASSES)
    run, optimizers = begin(args, net, net)
    return Row("DGL", splits, lambda: cifar_dgl.step(run, net, optimizers, images, labels))


def sequential(args, images, labels, splits):
    net = decoupled_resnet(args.depth, splits, CLASSES)
    run, optimizers = begin(args, net, net)

    def step():
        for n, (module, optimizer) in enumerate(zip(net, optimizers, strict=True)):
            net.eval()
            module.train()
            representation = images
            with run.autocast():
                with torch.no_grad():
                    for below in net[:n]:
                        representation = below.body(representation)
                _, logits = module(representation)
            run.step(F.cross_entropy(logits.float(), labels), optimizer)

    return Row("sequential", splits, step)


# Measuring


def measure(rows, batch_size, repeats, device):
    """The table: a frame indexed by method and K."""
    lines, calls = [], []
    for row in rows:
        memory = peak_memory(lambda row=row: [row.step() for _ in range(row.splits + 1)], device)
        lines.append({"GFLOP/image": count_flops(row.step) / batch_size / 1e9, "peak MiB": memory / 2**20})
        calls.append(math.ceil(SECONDS / step_seconds(row.step, 1, device)))
    rounds = [
        [step_seconds(row.step, count, device) for row, count in zip(rows, calls, strict=True)] for _ in range(repeats)
    ]
    frame = pd.DataFrame(lines, index=pd.MultiIndex.from_tuples([row[:2] for row in rows], names=("method", "K")))
    typical = pd.DataFrame(rounds).median().to_numpy()
    frame.insert(0, "ms/step", 1000 * typical)
    frame.insert(1, "images/s", batch_size / typical)
    return frame


def savings(memory):
    """For each method, what its peak is beside back-propagation's, the first of ``memory``: lines."""
    for (method, splits), peak in memory.iloc[1:].items():
        more = 100 * (peak / memory.iloc[0] - 1)
        yield f"{method}, K = {splits}: {f'{more:.0f} % more' if more >= 0 else f'saves {-more:.0f} %'}"


def main():
    args = parse_args()
    device = flags.pick_device(args.device)
    torch.manual_seed(args.seed)
    images = torch.randn(args.batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (args.batch_size,)).to(device)
    with tempfile.TemporaryDirectory() as args.log_dir:
        rows = [backprop(args, images, labels)]
        rows += [
            method(args, images, labels, splits)
            for method in (backprop, ddg, dgl, sequential)
            for splits in args.splits
        ]
        print("\n".join(provenance.environment(device, args.half)))
        print(f"# ResNet-{args.depth}, batch {args.batch_size}, {args.repeats} rounds\n")
        frame = measure(rows, args.batch_size, args.repeats, device)
    print(frame.to_string(float_format="{:,.2f}".format, sparsify=False))
    print("\n" + "\n".join(savings(frame["peak MiB"])))


if __name__ == "__main__":
    flags.start(main)
