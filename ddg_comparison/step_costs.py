"""Time and peak memory of a training step of DGL, sequential greedy learning,
DDG, back-propagation and back-propagation with checkpointing, against the
number of modules K.

    python ddg_comparison/step_costs.py
    python ddg_comparison/step_costs.py --depth 20 --splits 2 4 --half

Each row is the very step of that method's script, with random images, on one
device: its modules take turns, so the times show what a method computes, not
what it gains on K devices. Memory is that of the whole network. A row has a
process of its own: networks that share one slow each other by up to a fifth.

Columns:
  ms/step       median over the rounds
  images/s      from that
  GFLOP/image   counted in a step; a multiply-add is 2 (decoupled.costs)
  peak MiB      made by K+1 steps from the start on, so with momentum and all
                that is in flight, on top of network and images (peak_memory)
The peaks beside back-propagation's follow.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile

import cifar_backprop
import cifar_ddg
import cifar_dgl
import pandas as pd
import torch
from cifar_resnet import chained_resnet, decoupled_resnet
from torch.nn import functional as F
from torch.optim import SGD

from decoupled import InputError, flags, provenance
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
    row = "this row alone, as JSON: back-propagation, DDG, DGL or sequential, and K"
    parser.add_argument("--row", nargs=2, metavar=("METHOD", "K"), help=row)
    parser.set_defaults(compile=False, epochs=1, seed=1, name="", resume=None, save_every=10.0)  # what a Run asks for
    return parser.parse_args()


# The rows. One function a method: it makes its own run and network, and gives a training step.


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
    return lambda: cifar_backprop.step(run, net, optimizer, images, labels, splits > 1)


def ddg(args, images, labels, splits):
    net = chained_resnet(args.depth, splits, CLASSES)
    run, optimizers = begin(args, net, net)
    in_flight = [cifar_ddg.InFlight(run, net, k) for k in range(splits)]
    return lambda: cifar_ddg.step(run, net, optimizers, in_flight, images, labels)


def dgl(args, images, labels, splits):
    net = decoupled_resnet(args.depth, splits, CLASSES)
    run, optimizers = begin(args, net, net)
    return lambda: cifar_dgl.step(run, net, optimizers, images, labels)


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

    return step


METHODS = {"back-propagation": backprop, "checkpointing": backprop, "DDG": ddg, "DGL": dgl, "sequential": sequential}

# Measuring


def measure(args, method, splits):
    """What a row holds, measured in this process."""
    device = flags.pick_device(args.device)
    torch.manual_seed(args.seed)
    images = torch.randn(args.batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (args.batch_size,)).to(device)
    with tempfile.TemporaryDirectory() as args.log_dir:
        step = METHODS[method](args, images, labels, splits)
        memory = peak_memory(lambda: [step() for _ in range(splits + 1)], device)
        flops = count_flops(step) / args.batch_size
        calls = math.ceil(SECONDS / step_seconds(step, 1, device))
        seconds = statistics.median(step_seconds(step, calls, device) for _ in range(args.repeats))
    speed = {"ms/step": 1000 * seconds, "images/s": args.batch_size / seconds}
    return speed | {"GFLOP/image": flops / 1e9, "peak MiB": memory / 2**20}


def alone(method, splits):
    """What a row holds, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", method, str(splits)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{method}, K = {splits}: exit code {done.returncode}: see its own words")
    return json.loads(done.stdout)


def savings(memory):
    """For each method, what its peak is beside back-propagation's, the first of ``memory``: lines."""
    for (method, splits), peak in memory.iloc[1:].items():
        more = 100 * (peak / memory.iloc[0] - 1)
        yield f"{method}, K = {splits}: {f'{more:.0f} % more' if more >= 0 else f'saves {-more:.0f} %'}"


def main():
    args = parse_args()
    if args.row:
        print(json.dumps(measure(args, args.row[0], int(args.row[1]))))
        return
    decoupled_resnet(args.depth, max(args.splits), CLASSES)  # fails here where it does at all
    rows = [("back-propagation", 1)]
    rows += [(method, splits) for method in ("checkpointing", "DDG", "DGL", "sequential") for splits in args.splits]
    print("\n".join(provenance.environment(flags.pick_device(args.device), args.half)))
    print(f"# ResNet-{args.depth}, batch {args.batch_size}, {args.repeats} rounds\n", flush=True)
    index = pd.MultiIndex.from_tuples(rows, names=("method", "K"))
    frame = pd.DataFrame([alone(*row) for row in rows], index=index)
    print(frame.to_string(float_format="{:,.2f}".format, sparsify=False))
    print("\n" + "\n".join(savings(frame["peak MiB"])))


if __name__ == "__main__":
    flags.start(main)
