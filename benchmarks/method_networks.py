"""The networks that step_costs.py measures, split into modules for each method. ``args`` are the flags of that
script.
"""

import math
import sys
from pathlib import Path

from torch import nn

from decoupled import InputError
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import output_shape
from dni import BackwardInterface
from dni.dni_backbone import ConvSynthesizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "imagenet"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "ddg_comparison"))
from cifar_resnet import decoupled_resnet, pieces
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg

SMALL = ("learning_curves", "cifar_resnet")  # 32×32, 10 classes
NETWORKS = (*SMALL, *BLOCKS, *STAGES)
LAYERS = 4  # of the learning_curves network


def most_modules(args):
    """The largest number of modules that the network can be split into."""
    if args.network in BLOCKS:
        return 1 + sum(BLOCKS[args.network])  # the stem and the blocks
    if args.network == "cifar_resnet":  # a ReLU has no weights, and the pool is one module with the classifier
        return len(pieces(args.depth)) - 2
    if args.network in STAGES:
        return sum(STAGES[args.network])
    return LAYERS


def decoupled_network(args, splits):
    """A DecoupledNetwork of ``splits`` modules, all with weights. Raises InputError if that is impossible."""
    if args.network in BLOCKS:
        net = greedy_resnet(args.network, splits, args.classes, args.image_size)
    elif args.network == "cifar_resnet":
        net = decoupled_resnet(args.depth, splits, args.classes)
    elif args.network in STAGES:
        block_size = math.ceil(sum(STAGES[args.network]) / splits)
        net = greedy_vgg(args.network, block_size, args.classes, args.image_size)
    else:
        net = layerwise_cnn(depth=LAYERS, block_size=math.ceil(LAYERS / splits), classes=args.classes)
    if len(net) != splits:
        raise InputError(
            f"{args.network} cannot be split into {splits} modules of the same length: choose other --splits"
        )
    for module in net[:-1]:
        if not list(module.body.parameters()):
            raise InputError(
                f"--splits {splits} leaves a module without weights, which has nothing to learn: choose fewer"
            )
    return net


def chained_parts(net):
    """The parts of a network without auxiliaries, as a ModuleList: the bodies of the DecoupledNetwork ``net``; the last
    part includes the head.
    """
    *lower, last = net
    parts = nn.ModuleList(module.body for module in lower)
    parts.append(nn.Sequential(last.body, last.auxiliary))
    return parts


def interfaced_parts(net, image_size, make_synthesizer=ConvSynthesizer):
    """chained_parts for DNI: every part except the last ends with an interface."""
    parts = chained_parts(net)
    shape = (3, image_size, image_size)
    for n, part in enumerate(parts[:-1]):
        shape = output_shape(part, shape)
        parts[n] = nn.Sequential(part, BackwardInterface(make_synthesizer(shape[0])))
    return parts


def chained_network(args, splits):
    """The network for back-propagation and DDG: see chained_parts."""
    return chained_parts(decoupled_network(args, splits))


def interfaced_network(args, splits):
    """The network for DNI: see interfaced_parts."""
    return interfaced_parts(decoupled_network(args, splits), args.image_size)
