"""What modules in parallel give on paper: VGG-19 and ResNet-152 at 224×224 on
several GPUs, over NVLink, 100 and 10 Gb/s Ethernet. Nothing here is measured on
a GPU: FLOPs, bytes and memory are counted from the networks themselves, fp32,
and a GPU is taken to compute --tflops of its FLOPs a second, whatever they are.

    python benchmarks/module_parallel_paper.py --output FILE

The first table has images/s, that of back-propagation on one GPU being 1. With
G GPUs, mini-batches of b images, FLOPs f of a training image over rate R in a
module's seconds t = b f / R, r bytes of a representation between two modules of
an image, W bytes/s of a link in each direction, P bytes of gradients, a
mini-batch takes
  DGL            max over modules of t, and over links of b r / W: sending goes
                 on while the next is computed; auxiliaries count
  1F1B m         (m + G - 1) / m × max over stages of t and over links of
                 b r / W: bubbles are (G - 1) / (m + G - 1) of the time of m
                 micro-batches, GPipe's or 1F1B's; nothing else is lost
  data-parallel  T / 3 + max(2 T / 3, 2 (G - 1) / G × P / W), T = sum of t / G:
                 a ring's all-reduce, wholly beside the backward pass
Modules are torchvision's network cut in G of about equal FLOPs
(decoupled.decouple); pipelines have their bodies. Back-propagation of a body
counts as three forward passes.

The second table has the memory of the fullest GPU in GiB: weights, gradients,
momentum and the peak of a step (decoupled.analysis.costs); 1F1B keeps at most G
micro-batches of the lowest stage; DGL's queue of two on both sides counts.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from benchmark_output import check_output, publish
from torch import nn
from torch.nn import functional as F

from decoupled.analysis.costs import LiveStorages, costs, peak_memory, training_step
from decoupled.training import environment as provenance
from decoupled.training import flags

sys.path.append(str(Path(__file__).resolve().parents[1] / "imagenet"))  # for what its scripts import beside them
from greedy_torchvision import greedy_torchvision

LINKS = {"NVLink": 300e9, "100 Gb/s": 12.5e9, "10 Gb/s": 1.25e9}  # bytes/s in each direction
NETWORKS = {"VGG-19": "vgg19_bn", "ResNet-152": "resnet152"}
MICRO = 8, 32  # micro-batches of a pipeline


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS.values()), help="of torchvision, with commas between")
    parser.add_argument("--gpus", type=flags.integers, default=[2, 4, 8], metavar="G,G,…", help="numbers of GPUs")
    parser.add_argument("--batch-size", type=flags.integer(2), default=256, help="images a mini-batch, of all GPUs")
    parser.add_argument("--image-size", type=flags.integer(32), default=224, help="side of an image")
    parser.add_argument("--queue", type=flags.integer(1), default=2, help="mini-batches that wait between two modules")
    parser.add_argument("--tflops", type=flags.number(above=0), default=60.0, help="10^12 FLOPs a second of a GPU")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="write the tables there too")
    return parser.parse_args()


def parameters(module):
    """Bytes of its parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def backprop_memory(net, images):
    """Bytes that back-propagation of the bodies of ``net`` with its last head takes, weights included."""
    whole = nn.Sequential(*(module.body for module in net), net[-1].auxiliary)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    step = training_step(lambda: (F.cross_entropy(whole(images), labels),), whole)
    memory = peak_memory(lambda: (step(), step()), images.device)
    whole.zero_grad()
    return memory + parameters(whole)


def kept(module, below):
    """Bytes that the graph of a forward pass keeps, output included."""
    with LiveStorages() as storages:
        output = module(below.detach().requires_grad_())
        return storages.live, output.detach()


class Counted:
    """What a network in G modules needs, on the meta device: FLOPs of a training image of each module, with its
    auxiliary (``dgl``) and of its body with back-propagation (``bodies``); bytes.
    """

    def __init__(self, arch, gpus, args):
        batch, side = args.batch_size, args.image_size
        self.gpus, self.batch = gpus, batch
        net = greedy_torchvision(arch, gpus, image_size=side).to("meta")

        def images(count):
            return torch.empty(count, 3, side, side, device="meta")

        modules = costs(net, images(batch)).unstack("part")
        self.dgl = modules["training_flops"]["module"].tolist()
        self.bodies = (3 * modules["flops"]["body"]).tolist()
        self.bodies[-1] += 3 * modules["flops"]["auxiliary"].iloc[-1]
        self.links, below, fullest = [], images(batch), []
        for n, module in enumerate(net, start=1):
            with torch.no_grad():
                above = module.body(below)
            waiting = args.queue * (below.nbytes * (n > 1) + above.nbytes * (n < gpus))
            fullest.append(modules["memory"]["module"][n] + parameters(module) + waiting)
            self.links += [above.nbytes / batch] if n < gpus else []
            below = above
        whole = nn.Sequential(*(module.body for module in net), net[-1].auxiliary)
        self.gradients = {"b.-p.": parameters(whole), "DGL": parameters(net)}
        share = images(-(-batch // gpus))
        replica = costs(net, share).unstack("part")["memory"]["module"].max()
        self.memory = {
            "one GPU, b.-p.": backprop_memory(net, images(batch)),
            "DGL": max(fullest),
            **{f"1F1B {parts}": self.pipeline_memory(net, images(-(-batch // parts)), parts) for parts in MICRO},
            "data-parallel b.-p.": backprop_memory(net, share),
            "data-parallel DGL": replica + 3 * parameters(net),
        }

    def pipeline_memory(self, net, below, parts):
        stages = []
        for n, module in enumerate(net):
            body = module.body if n < self.gpus - 1 else nn.Sequential(module.body, module.auxiliary)
            graph, below = kept(body, below)
            stages.append(3 * parameters(body) + min(parts, self.gpus - n) * graph)
        return max(stages)

    def speeds(self, rate, link):
        """{method: images/s, of back-propagation on one GPU as 1} over a link of so many bytes/s."""
        scale, gpus = self.batch / rate, self.gpus
        wire = self.batch * max(self.links) / link
        alone = scale * sum(self.bodies)

        def parallel(total, gradients):
            ring = 2 * (gpus - 1) / gpus * gradients / link
            return total / gpus / 3 + max(2 / 3 * total / gpus, ring)

        seconds = {
            "DGL": max(scale * max(self.dgl), wire),
            **{f"1F1B {parts}": (parts + gpus - 1) / parts * max(scale * max(self.bodies), wire) for parts in MICRO},
            "data-parallel b.-p.": parallel(alone, self.gradients["b.-p."]),
            "data-parallel DGL": parallel(scale * sum(self.dgl), self.gradients["DGL"]),
        }
        return {"one GPU, DGL": alone / (scale * sum(self.dgl))} | {
            name: alone / time for name, time in seconds.items()
        }


def main():
    args = parse_args()
    check_output(args.output)
    names = {arch: name for name, arch in NETWORKS.items()}
    speeds, memory = {}, {}
    for arch in args.networks.split(","):
        for gpus in args.gpus:
            counted = Counted(arch, gpus, args)
            name = names.get(arch, arch)
            memory[name, gpus] = {method: count / 2**30 for method, count in counted.memory.items()}
            for link, speed in LINKS.items():
                speeds[name, gpus, link] = counted.speeds(1e12 * args.tflops, speed)
    first = pd.DataFrame.from_dict(speeds, orient="index").rename_axis(["network", "GPUs", "link"])
    second = pd.DataFrame.from_dict(memory, orient="index").rename_axis(["network", "GPUs"])
    lines = [
        *provenance.environment(torch.device("cpu"), False),
        f"# batch {args.batch_size}, {args.tflops:g} TFLOP/s a GPU, fp32",
        "\nimages/s, back-propagation on one GPU = 1\n",
        first.to_string(float_format="{:.2f}".format),
        "\nmemory of the fullest GPU, GiB\n",
        second.to_string(float_format="{:.2f}".format),
    ]
    publish("\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    flags.start(main)
