"""The training steps that step_costs.py measures: each network cut into modules, and each method's step, on one device
or a module on a device of its own.

The steps are those of the methods' scripts. ``args`` are step_costs.py's.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim import SGD

from decoupled import InputError
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import output_shape
from dni import BackwardInterface
from dni.dni_backbone import ConvSynthesizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "imagenet"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ddg_comparison"))  # first: others have a cifar_dgl too
import cifar_backprop
import cifar_ddg
import cifar_dgl
from cifar_resnet import decoupled_resnet, pieces
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg

SMALL = ("learning_curves", "cifar_resnet")  # 32×32, 10 classes
NETWORKS = (*SMALL, *BLOCKS, *STAGES)
LAYERS = 4  # of the learning_curves network

# Networks


def most_modules(args):
    """Into how many the network can be cut."""
    if args.network in BLOCKS:
        return 1 + sum(BLOCKS[args.network])  # with the stem
    if args.network == "cifar_resnet":  # a ReLU has no weights, and the pool is one module with the classifier
        return len(pieces(args.depth)) - 2
    return sum(STAGES.get(args.network, [LAYERS]))


def network(args, splits):
    """A DecoupledNetwork of ``splits`` modules, all with weights. Raises InputError where it cannot be cut so."""
    if args.network in BLOCKS:
        net = greedy_resnet(args.network, splits, args.classes, args.image_size)
    elif args.network == "cifar_resnet":
        net = decoupled_resnet(args.depth, splits, args.classes)
    elif args.network in STAGES:
        size = -(-sum(STAGES[args.network]) // splits)
        net = greedy_vgg(args.network, size, args.classes, args.image_size)
    else:
        net = layerwise_cnn(depth=LAYERS, block_size=-(-LAYERS // splits), classes=args.classes)
    if len(net) != splits:
        raise InputError(f"{args.network} has no {splits} modules of equally many layers: choose other --splits")
    if not all([*module.body.parameters()] for module in net[:-1]):
        raise InputError(f"--splits {splits} leaves a module without weights, which has nothing to learn: choose fewer")
    return net


def chained(args, splits):
    """The same network's parts, without auxiliaries; the last gives the logits."""
    *lower, last = network(args, splits)
    return nn.ModuleList([*(module.body for module in lower), nn.Sequential(last.body, last.auxiliary)])


def interfaced(args, splits):
    """The parts for DNI: above each but the last an interface."""
    parts, shape = chained(args, splits), (3, args.image_size, args.image_size)
    for n, part in enumerate(parts[:-1]):
        shape = output_shape(part, shape)
        parts[n] = nn.Sequential(part, BackwardInterface(ConvSynthesizer(shape[0])))
    return parts


# Steps. ``whole`` of a method gives the step of all its modules on one device, ``alone`` that of module k on one of its
# own: what comes from below is there, what comes from above is made when it arrives.


def sgd(module):
    fused = not isinstance(next(module.parameters()), FakeTensor)  # they have no such kernel
    return SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=fused, foreach=None if fused else False)


def backprop(run, net, images, labels, checkpointing=False):
    optimizer = sgd(net)
    return lambda: cifar_backprop.step(run, net, optimizer, images, labels, checkpointing)


def dgl(run, net, images, labels):
    optimizers = [sgd(module) for module in net]
    return lambda: cifar_dgl.step(run, net, optimizers, images, labels)


def dgl_alone(run, net, k, below, labels):
    return dgl(run, net[k : k + 1], below, labels)


def sequential(run, net, images, labels):
    """learning_curves/cifar_sequential_greedy.py, a step of each module in turn."""
    optimizers = [sgd(module) for module in net]

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


def ddg(run, net, images, labels):
    optimizers = [sgd(module) for module in net]
    in_flight = [cifar_ddg.InFlight(run, net, k) for k in range(len(net))]
    return lambda: cifar_ddg.step(run, net, optimizers, in_flight, images, labels)


def ddg_alone(run, net, k, below, labels):
    optimizer, own = sgd(net[k]), cifar_ddg.InFlight(run, net, k)

    def step():
        output, *_ = cifar_ddg.turn(run, net[k], optimizer, own, below, labels)
        own.gradient = torch.empty_like(output) if own.delay else None  # from above, for the next iteration

    return step


def dni(run, net, images, labels):
    """dni/cifar_cnn_dni.py: in the forward pass each interface teaches the part below it."""
    optimizer = sgd(net)

    def step():
        optimizer.zero_grad()
        representation = images
        with run.autocast():
            for part in net:
                representation = part(representation)
        F.cross_entropy(representation.float(), labels).backward()
        optimizer.step()

    return step


def stage_alone(run, net, k, below, labels, synthetic=False):
    """A stage of a pipeline or, ``synthetic``, a part of DNI: its interface has taught it when the true gradient, for
    the synthesizer, comes from above.
    """
    optimizer = sgd(net[k])

    def step():
        if synthetic:  # which adds gradients in the forward pass
            optimizer.zero_grad()
        with run.autocast():
            output = net[k](below.detach().requires_grad_(k > 0))
        if k == len(net) - 1:
            output = F.cross_entropy(output.float(), labels)
        if not synthetic:
            optimizer.zero_grad()
        output.backward(torch.empty_like(output) if output.dim() else None)
        optimizer.step()

    return step


class Method(NamedTuple):
    build: callable  # (args, splits) → modules
    whole: callable = None  # where it differs from back-propagation's
    alone: callable = None  # where its modules can learn at the same time


METHODS = {
    "back-propagation": Method(chained, backprop),
    "pipeline": Method(chained, alone=stage_alone),
    "checkpointing": Method(chained, functools.partial(backprop, checkpointing=True)),
    "DGL": Method(network, dgl, dgl_alone),
    "sequential": Method(network, sequential),
    "DDG": Method(chained, ddg, ddg_alone),
    "DNI": Method(interfaced, dni, functools.partial(stage_alone, synthetic=True)),
}
