"""Computes what to expect of modules in parallel: VGG-19 and ResNet-152 at 224×224
on several GPUs, over NVLink, 100 and 10 Gb/s Ethernet. Nothing is measured on a
GPU: FLOPs, bytes and memory are counted from the networks themselves, in fp32, and
every GPU is assumed to reach --tflops.

    python benchmarks/module_parallel_paper.py --output FILE

The first table has images/s relative to back-propagation on one GPU. The symbols:
  G  number of GPUs
  P  bytes of gradients
  W  bytes/s of a link in each direction
  t  seconds that a module computes for one mini-batch: FLOPs / --tflops
  s  seconds that a link takes for the representations of one mini-batch
One mini-batch takes
  DGL            max(t of any module, s of any link): a module sends while it
                 computes the next mini-batch. t includes the auxiliaries
  1F1B m         (m + G - 1) / m × max(t of any stage, s of any link): with m
                 micro-batches, in 1F1B as in GPipe, bubbles take (G - 1) /
                 (m + G - 1) of the time; nothing else is lost
  data-parallel  T / 3 + max(2 T / 3, 2 (G - 1) / G × P / W), with T = (sum of
                 t) / G: a ring all-reduce that overlaps the backward pass
The modules are G parts of torchvision's network with about equal FLOPs
(decoupled.decouple); the stages of pipelines are their bodies. Back-propagation
through a body counts as three forward passes.

The second table has the memory of the fullest GPU in GiB: weights, gradients,
momentum and the peak of a step (decoupled.analysis.costs). The lowest stage of 1F1B
keeps at most G micro-batches. DGL has a queue of --queue mini-batches on both sides.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.analysis.costs import LiveStorages, costs, peak_memory, training_step
from decoupled.training import flags
from decoupled.training.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_output import check_output, publish

sys.path.append(str(Path(__file__).resolve().parents[1] / "imagenet"))
from greedy_torchvision import greedy_torchvision

LINKS = {"NVLink": 300e9, "100 Gb/s": 12.5e9, "10 Gb/s": 1.25e9}  # bytes/s in each direction
NETWORKS = {"VGG-19": "vgg19_bn", "ResNet-152": "resnet152"}
MICRO_BATCHES = (8, 32)  # of a pipeline


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--networks", default=",".join(NETWORKS.values()), help="torchvision networks, separated by commas"
    )
    parser.add_argument("--gpus", type=flags.integers, default=[2, 4, 8], metavar="G,G,…", help="numbers of GPUs")
    parser.add_argument("--batch-size", type=flags.integer(2), default=256, help="images per mini-batch, over all GPUs")
    parser.add_argument(
        "--image-size", type=flags.integer(32), default=224, help="height and width of the images, in pixels"
    )
    parser.add_argument(
        "--queue", type=flags.integer(1), default=2, help="max mini-batches in flight between two modules"
    )
    parser.add_argument("--tflops", type=flags.number(above=0), default=60.0, help="TFLOP/s of a GPU")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="also write the tables to this file")
    return parser.parse_args()


# Memory


def meta_images(count, side):
    """(count, 3, side, side), without values."""
    return torch.empty(count, 3, side, side, device="meta")


def parameter_bytes(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def whole_network(net):
    """The network for back-propagation: the bodies of ``net`` with its last head."""
    return nn.Sequential(*(module.body for module in net), net[-1].auxiliary)


def backprop_memory(net, images):
    """The peak bytes of a back-propagation step of whole_network(net), including weights."""
    whole = whole_network(net)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def forward():
        return (F.cross_entropy(whole(images), labels),)

    step = training_step(forward, whole)
    memory = peak_memory(lambda: (step(), step()), images.device)
    whole.zero_grad()
    return memory + parameter_bytes(whole)


def run_forward(module, inputs):
    """(bytes that the graph of a forward pass keeps, including the output; the output, detached)."""
    with LiveStorages() as memory:
        output = module(inputs.detach().requires_grad_())
        return memory.live, output.detach()


def pipeline_memory(net, inputs, micro_batches):
    """Bytes of the fullest stage in 1F1B, where stage k of G, from 0, keeps at most G - k micro-batches. ``inputs``:
    one micro-batch of images.
    """
    needed = []
    for k, module in enumerate(net):
        in_flight = min(micro_batches, len(net) - k)
        is_last = k == len(net) - 1
        stage = nn.Sequential(module.body, module.auxiliary) if is_last else module.body
        graph_bytes, inputs = run_forward(stage, inputs)
        needed.append(3 * parameter_bytes(stage) + in_flight * graph_bytes)  # weights, gradients, momentum; graphs
    return max(needed)


def representation_bytes(net, images):
    """Bytes of the images and of each module's output: a list."""
    sizes = [images.nbytes]
    representation = images
    for module in net:
        with torch.no_grad():
            representation = module.body(representation)
        sizes.append(representation.nbytes)
    return sizes


def dgl_memory(net, module_costs, sizes, queue):
    """Bytes of the fullest GPU in DGL with one module on each: weights, the peak of a step, and ``queue`` mini-batches
    waiting on both sides. ``sizes`` come from representation_bytes.
    """
    gpus = len(net)
    needed = []
    for n, module in enumerate(net, start=1):
        arriving = sizes[n - 1] if n > 1 else 0
        leaving = sizes[n] if n < gpus else 0
        step = module_costs["memory"]["module"][n]
        needed.append(step + parameter_bytes(module) + queue * (arriving + leaving))
    return max(needed)


class Demands(NamedTuple):
    """What training a network of G modules demands of GPUs and links: see count_demands."""

    batch_size: int
    dgl_flops: list  # of each module, per training image, with its auxiliary
    body_flops: list  # of each module's body in back-propagation, per training image; the last has the head
    link_bytes: list  # of the representation between two neighboring modules, per image
    backprop_gradients: int  # bytes
    dgl_gradients: int  # bytes


def count_demands(net, module_costs, sizes, batch_size):
    """The Demands of ``net``, whose costs per module are ``module_costs``."""
    body_flops = (3 * module_costs["flops"]["body"]).tolist()
    body_flops[-1] += 3 * module_costs["flops"]["auxiliary"].iloc[-1]
    return Demands(
        batch_size=batch_size,
        dgl_flops=module_costs["training_flops"]["module"].tolist(),
        body_flops=body_flops,
        link_bytes=[size / batch_size for size in sizes[1:-1]],
        backprop_gradients=parameter_bytes(whole_network(net)),
        dgl_gradients=parameter_bytes(net),
    )


def relative_speeds(demands, flops_per_second, bytes_per_second):
    """{method: images/s, relative to back-propagation on one GPU}."""
    gpus = len(demands.dgl_flops)
    scale = demands.batch_size / flops_per_second
    sending = demands.batch_size * max(demands.link_bytes) / bytes_per_second
    backprop = scale * sum(demands.body_flops)
    dgl = scale * sum(demands.dgl_flops)

    def data_parallel(total, gradients):
        all_reduce = 2 * (gpus - 1) / gpus * gradients / bytes_per_second
        return total / gpus / 3 + max(2 / 3 * total / gpus, all_reduce)

    seconds = {"one GPU, DGL": dgl, "DGL": max(scale * max(demands.dgl_flops), sending)}
    for micro_batches in MICRO_BATCHES:
        with_bubbles = (micro_batches + gpus - 1) / micro_batches
        seconds[f"1F1B {micro_batches}"] = with_bubbles * max(scale * max(demands.body_flops), sending)
    seconds["data-parallel b.-p."] = data_parallel(backprop, demands.backprop_gradients)
    seconds["data-parallel DGL"] = data_parallel(dgl, demands.dgl_gradients)
    return {method: backprop / time for method, time in seconds.items()}


def fullest_memory(net, module_costs, sizes, args):
    """{method: bytes of the fullest GPU}."""
    gpus = len(net)
    side = args.image_size
    images_of_replica = meta_images(math.ceil(args.batch_size / gpus), side)
    replica_peak = costs(net, images_of_replica)["memory"].xs("module", level="part").max()
    memory = {
        "one GPU, b.-p.": backprop_memory(net, meta_images(args.batch_size, side)),
        "DGL": dgl_memory(net, module_costs, sizes, args.queue),
    }
    for micro_batches in MICRO_BATCHES:
        micro_batch = meta_images(math.ceil(args.batch_size / micro_batches), side)
        memory[f"1F1B {micro_batches}"] = pipeline_memory(net, micro_batch, micro_batches)
    memory["data-parallel b.-p."] = backprop_memory(net, images_of_replica)
    memory["data-parallel DGL"] = replica_peak + 3 * parameter_bytes(net)
    return memory


def make_tables(args):
    """(frame of relative speeds, frame of the fullest GPU's memory in GiB)."""
    names = {arch: name for name, arch in NETWORKS.items()}
    speeds = {}
    memory = {}
    for arch in args.networks.split(","):
        name = names.get(arch, arch)
        for gpus in args.gpus:
            net = greedy_torchvision(arch, gpus, image_size=args.image_size).to("meta")
            images = meta_images(args.batch_size, args.image_size)
            module_costs = costs(net, images).unstack("part")
            sizes = representation_bytes(net, images)
            demands = count_demands(net, module_costs, sizes, args.batch_size)
            for link, bytes_per_second in LINKS.items():
                speeds[name, gpus, link] = relative_speeds(demands, 1e12 * args.tflops, bytes_per_second)
            fullest = fullest_memory(net, module_costs, sizes, args)
            memory[name, gpus] = {method: size / 2**30 for method, size in fullest.items()}
    return (
        pd.DataFrame.from_dict(speeds, orient="index").rename_axis(["network", "GPUs", "link"]),
        pd.DataFrame.from_dict(memory, orient="index").rename_axis(["network", "GPUs"]),
    )


def main():
    args = parse_args()
    check_output(args.output)
    speeds, memory = make_tables(args)
    lines = [
        *environment(torch.device("cpu"), False),
        f"# batch {args.batch_size}, {args.tflops:g} TFLOP/s a GPU, fp32",
        "\nimages/s, back-propagation on one GPU = 1\n",
        speeds.to_string(float_format="{:.2f}".format),
        "\nmemory of the fullest GPU, GiB\n",
        memory.to_string(float_format="{:.2f}".format),
    ]
    publish("\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    flags.start(main)
