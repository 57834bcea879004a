"""Compares the costs of auxiliary networks with those of their modules: the FLOPs
of the paper's Table 1 (Sec. 5.2), and also memory and time.

    python benchmarks/auxiliary_costs.py
    python benchmarks/auxiliary_costs.py --output results/aux_nets

It prints three tables for the network of aux_nets/cifar_dgl.py:
1. What each module's auxiliary network adds, in % of the module alone: forward
   FLOPs, parameters, peak memory and time of a training step.
2. What "relative FLOPs" can mean, compared with the 200 % (CNN), 0.7 % (MLP) and
   4.0 % (MLP-SR) of the paper.
3. The number of modules: K modules of equal depth, down to K = 1, which is
   back-propagation.

No definition in table 2 gives all three numbers of the paper. Relative to the
largest module (256 → 256 channels at 16×16), CNN is exact: two convolutions like
the module's own, 200.0 %. MLP as described (three hidden layers of width 4C) is
2.1 %; with one hidden layer it is 0.70 %, the paper's number: a Linear 4C → 4C
has 1/144 of that convolution's FLOPs. MLP-SR is 4.17 % of the module, or 4.01 %
of module and auxiliary together.

FLOPs, parameters and memory are exact and the same on every machine: a
multiply-add is 2 FLOPs, memory is in fp32 without kernels' workspaces
(decoupled.analysis.costs). Time is measured: the median over rounds, each of
which runs all steps. A round at full size takes 4 TFLOP.
"""

import contextlib
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F

from decoupled.analysis.costs import Ones, costs, peak_memory, step_seconds, training_step
from decoupled.errors import writing
from decoupled.networks.auxiliary import AUXILIARIES
from decoupled.networks.flops import count_flops
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import flags
from decoupled.training.device import pick_device
from decoupled.training.environment import environment

sys.path.append(str(Path(__file__).resolve().parent))
from method_steps import ScaledOptimizer, autocast_on, dgl_step, sgd

# Used like names of auxiliary networks:
ALONE = ""  # a module without its auxiliary
HEAD = "head"  # the auxiliary of the last module, the same for all types
FIX = "name a writable folder"
PAPER = {"mlp": 0.7, "mlp-sr": 4.0, "cnn": 200.0}  # Table 1: FLOPs of the auxiliary in % of the module's


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--type_aux", choices=AUXILIARIES, default="mlp-sr", help="type of the auxiliary networks in table 3"
    )
    parser.add_argument("--channels", type=flags.WIDTH, default=128, help="channels of the first layer")
    parser.add_argument("--depth", type=flags.integer(2, 1000), default=6, help="number of layers")
    parser.add_argument("--batch-size", type=flags.integer(2), default=128, help="images per step")
    parser.add_argument(
        "--repeats", type=flags.integer(1), default=5, help="number of rounds in which time is measured"
    )
    parser.add_argument("--device", default="auto", help="device for measuring time: auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--half", action="store_true", help="measure time in mixed precision: fp16 on CUDA, bf16 elsewhere"
    )
    parser.add_argument(
        "--output",
        type=flags.path,
        metavar="DIR",
        help="also write auxiliary_costs.csv and decoupling_costs.csv to this folder",
    )
    return parser.parse_args()


def network(type_aux, channels=128, depth=6, block_size=1, **options):
    """The network of aux_nets/cifar_dgl.py for 10 classes."""
    return layerwise_cnn(
        channels=channels, depth=depth, downsample=(1, 3), auxiliary=type_aux, block_size=block_size, **options
    )


def batch(batch_size, device="meta"):
    """Random images (B, 3, 32, 32) and labels (B,)."""
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(batch_size, dtype=torch.int64, device=device)


def network_costs(type_aux, batch_size=2, **settings):
    """The frame of decoupled.analysis.costs.costs for ``network(type_aux, **settings)``, counted on the meta device."""
    with torch.device("meta"):
        net = network(type_aux, **settings)
    images, _ = batch(batch_size)
    return costs(net, images)


def largest(frame):
    """n of the module with the most FLOPs (the first, if several are equal) in a frame of auxiliary_costs. The last
    module, which has the head, is left out.
    """
    return frame["module_mflop"]["mlp"].idxmax()


# Table 1


def auxiliary_costs(channels=128, depth=6, batch_size=128):
    """A pandas frame with a row for each (type_aux, n). The last module has the type "head". Columns:

    module_mflop     forward FLOPs of the module alone, in millions per image
    auxiliary_mflop  forward FLOPs of its auxiliary network, in millions per image
    flops            the auxiliary's forward FLOPs in % of the module's
    parameters       number of parameters of the auxiliary
    parameters_share the same in % of the module's
    memory           what the auxiliary adds to the peak of a training step, in % of the module alone
    """
    rows = {}
    for type_aux in AUXILIARIES:
        frame = network_costs(type_aux, batch_size, channels=channels, depth=depth)
        for n in range(1, depth):
            rows[type_aux, n] = compare_with_body(frame.loc[n])
    rows[HEAD, depth] = compare_with_body(frame.loc[depth])  # the same for all types
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(rows, names=("type_aux", "n"))
    return frame


def compare_with_body(parts):
    """The row of auxiliary_costs for a module with the costs ``parts``, a frame by part."""
    body = parts.loc["body"]
    auxiliary = parts.loc["auxiliary"]
    return {
        "module_mflop": body["flops"] / 1e6,
        "auxiliary_mflop": auxiliary["flops"] / 1e6,
        "flops": 100 * auxiliary["flops"] / body["flops"],
        "parameters": int(auxiliary["parameters"]),
        "parameters_share": 100 * auxiliary["parameters"] / body["parameters"],
        "memory": 100 * (parts.loc["module", "memory"] / body["memory"] - 1),
    }


def step_alone(body, inputs, autocast):
    """A training step of a module without its auxiliary, as a callable."""

    def forward():
        with autocast():
            representation = body(inputs)
        return representation, Ones.apply(representation)

    return training_step(forward, body)


def step_with_auxiliary(module, inputs, labels, autocast):
    """A training step of a module with its auxiliary, as a callable."""

    def forward():
        with autocast():
            representation, logits = module(inputs)
        return representation, logits, F.cross_entropy(logits.float(), labels)

    return training_step(forward, module)


def module_steps(device, autocast, channels=128, depth=6, batch_size=128):
    """Training steps, {(type_aux, n): callable}: of each module with its auxiliary network, and of each module alone
    under the type ALONE.
    """
    images, labels = batch(batch_size, device)
    steps = {}
    for type_aux in AUXILIARIES:
        net = network(type_aux, channels, depth).to(device, memory_format=torch.channels_last)
        inputs = images
        for n, module in enumerate(net, start=1):
            name = type_aux if n < depth else HEAD
            if (ALONE, n) not in steps:
                steps[ALONE, n] = step_alone(module.body, inputs, autocast)
            steps[name, n] = step_with_auxiliary(module, inputs, labels, autocast)
            with torch.no_grad(), autocast():
                inputs = module.body(inputs)
    return steps


def measure_seconds(steps, repeats, device):
    """A Series by name: the seconds that each of ``steps``, {name: callable}, takes: the median over ``repeats`` rounds
    of all steps, after a warm-up round.
    """
    rounds = []
    for _ in range(1 + repeats):
        rounds.append([step_seconds(step, device=device) for step in steps.values()])
    medians = pd.DataFrame(rounds[1:]).median()
    medians.index = pd.Index(list(steps))
    return medians


def added_time(times):
    """The time that the auxiliary network adds to a training step, in % of the module alone. ``times`` is a Series by
    (type_aux, n) that includes the type ALONE; the result does not.
    """
    alone = times[ALONE]
    rows = {}
    for (type_aux, n), value in times.items():
        if type_aux != ALONE:
            rows[type_aux, n] = 100 * (value / alone[n] - 1)
    return pd.Series(rows, name="time").rename_axis(index=("type_aux", "n"))


# Table 2


def auxiliary_flops(type_aux, n, channels=128, depth=6, **options):
    """Forward FLOPs per image of module ``n``'s auxiliary network, built with ``options``."""
    with torch.device("meta"), torch.no_grad():
        net = network(type_aux, channels, depth, **options).eval()
        representation, _ = batch(1)
        for module in net[:n]:
            representation = module.body(representation)
        return count_flops(lambda: net[n - 1].auxiliary(representation))


def definitions(frame, channels=128, depth=6):
    """A pandas frame of possible meanings of "FLOPs of the auxiliary relative to the module", in %: a row for the
    paper's numbers and one for each definition, and a column for each type.

    ``frame`` comes from auxiliary_costs with the same channels and depth.
    """
    n = largest(frame)
    columns = {}
    for type_aux, published in PAPER.items():
        modules = frame["module_mflop"][type_aux]
        auxiliaries = frame["auxiliary_mflop"][type_aux]
        largest_module = modules[n]
        column = {
            "the paper's Table 1": published,
            f"module {n}, the largest": 100 * auxiliaries[n] / largest_module,
            f"module {n}, of module and auxiliary together": 100 * auxiliaries[n] / (largest_module + auxiliaries[n]),
            f"module {n}, with one hidden layer": float("nan"),
            f"modules 1 to {depth - 1}, sum": 100 * auxiliaries.sum() / modules.sum(),
            f"modules 1 to {depth - 1}, mean": 100 * (auxiliaries / modules).mean(),
        }
        if type_aux in ("mlp", "mlp-sr"):  # CNN auxiliaries have no hidden layers
            shallow = auxiliary_flops(type_aux, n, channels, depth, hidden_layers=1) / 1e6
            column[f"module {n}, with one hidden layer"] = 100 * shallow / largest_module
        columns[type_aux] = column
    return pd.DataFrame(columns)


# Table 3


def make_dgl_step(net, images, labels, autocast=contextlib.nullcontext, half=False):
    """The training step of aux_nets/cifar_dgl.py on one mini-batch, as a callable, with a learning rate of zero."""
    optimizers = [ScaledOptimizer(sgd(module, lr=0.0, weight_decay=5e-4), half) for module in net]
    return partial(dgl_step, net, optimizers, images, labels, autocast)


def block_sizes(depth):
    """{number of modules K: layers per module} for all equal splits of ``depth`` layers, from the largest K down."""
    return {depth // size: size for size in range(1, depth + 1) if depth % size == 0}


def decoupling_costs(type_aux="mlp-sr", channels=128, depth=6, batch_size=128):
    """A pandas frame with a row for each number of modules K that divides ``depth``. Columns:
    block_size      layers per module
    parameters      of the network with its auxiliary networks and head
    training_gflop  of a step, per image
    memory          bytes: the peak of two training steps, with gradients and momentum, without network and images
    """
    rows = {}
    for k, block_size in block_sizes(depth).items():
        with torch.device("meta"):
            net = network(type_aux, channels, depth, block_size)
        step = make_dgl_step(net, *batch(batch_size))
        rows[k] = {
            "block_size": block_size,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "training_gflop": count_flops(step) / batch_size / 1e9,
            "memory": peak_memory(lambda step=step: (step(), step()), "meta"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="K")


def decoupling_steps(device, autocast, half, type_aux="mlp-sr", channels=128, depth=6, batch_size=128):
    """The training steps of aux_nets/cifar_dgl.py, {number of modules K: callable}."""
    images, labels = batch(batch_size, device)
    steps = {}
    for k, block_size in block_sizes(depth).items():
        net = network(type_aux, channels, depth, block_size).to(device, memory_format=torch.channels_last)
        steps[k] = make_dgl_step(net, images, labels, autocast, half)
    return steps


def make_folder(folder):
    """Makes the folder. Raises InputError if that fails: call this before the work."""
    with writing(folder, FIX):
        Path(folder).mkdir(parents=True, exist_ok=True)


def write_tables(folder, header, tables):
    """Writes each frame of ``tables``, {name: frame}, as a CSV file that begins with ``header``."""
    folder = Path(folder)
    with writing(folder, FIX):
        for name, frame in tables.items():
            (folder / f"{name}.csv").write_text(f"{header}\n{frame.to_csv()}")


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.output:
        make_folder(args.output)
    autocast = autocast_on(device, args.half)
    size = f"# {args.channels} channels, {args.depth} layers, batch {args.batch_size}, {args.repeats} rounds"
    header = "\n".join([*environment(device, args.half), size])
    print(header)
    settings = {"channels": args.channels, "depth": args.depth, "batch_size": args.batch_size}

    auxiliaries = auxiliary_costs(**settings)
    steps = module_steps(device, autocast, **settings)
    auxiliaries["time"] = added_time(measure_seconds(steps, args.repeats, device))
    print("\nWhat the auxiliary network adds, in % of the module alone (parameters also as a number)\n")
    print(auxiliaries.to_string(formatters={"parameters": "{:,.0f}".format}, float_format="{:,.2f}".format))

    print('\n"FLOPs relative to the module", in %\n')
    print(definitions(auxiliaries, args.channels, args.depth).to_string(float_format="{:,.3f}".format, na_rep=""))

    decoupling = decoupling_costs(args.type_aux, **settings)
    steps = decoupling_steps(device, autocast, args.half, args.type_aux, **settings)
    decoupling["time"] = measure_seconds(steps, args.repeats, device)
    print(f"\nDepth of decoupling, {args.type_aux}: K modules; peak memory in MiB, time of a step in ms\n")
    shown = decoupling.assign(memory=decoupling["memory"] / 2**20, time=1000 * decoupling["time"])
    formatters = {"parameters": "{:,.0f}".format, "training_gflop": "{:,.4f}".format}
    print(shown.to_string(formatters=formatters, float_format="{:,.1f}".format))

    if args.output:
        write_tables(args.output, header, {"auxiliary_costs": auxiliaries, "decoupling_costs": decoupling})


def read(path):
    """The table that --output wrote to ``path``; None if there is none. ``frame.attrs["comments"]`` is its header."""
    if not path.exists():
        return None
    frame = pd.read_csv(path, comment="#")
    frame.attrs["comments"] = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return frame.set_index([column for column in ("type_aux", "n", "K") if column in frame])


if __name__ == "__main__":
    flags.start(main)
