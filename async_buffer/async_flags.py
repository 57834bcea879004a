"""What cifar_buffer.py, the simulation, and cifar_buffer_distributed.py share: flags and network."""

import argparse

from asynchronous_cnn import DOWNSAMPLING, asynchronous_cnn, layer_list
from replay_buffer import BITS, SAMPLING

from decoupled.training import flags
from decoupled.training.flags import integer


def parser(doc):
    """The parser with the groups that both scripts have, up to the network's."""
    parser = flags.parser(doc, epochs=50, batch_size=128)
    positive, switch = integer(1), {"type": int, "choices": (0, 1), "default": 1}
    group = parser.add_argument_group("learning")
    alias = {"type": positive, "metavar": "N", "default": argparse.SUPPRESS}
    epochs = "the paper's name for --epochs: each module's own, after which it only forwards"
    group.add_argument("--nepochs", dest="epochs", help=epochs, **alias)
    batch_size = "the paper's name for --batch-size; a last short batch is dropped"
    group.add_argument("--batch_size", dest="batch_size", help=batch_size, **alias)
    decay = "own epochs of a module until its rate falls to a fifth"
    group.add_argument("--epochdecay", type=positive, default=15, metavar="N", help=decay)
    group.add_argument("--ensemble", **switch, help="1: evaluate the ensembles of heads")
    group = parser.add_argument_group("network")
    group.add_argument("--ncnn", type=integer(2, 1000), default=6, metavar="N", help="modules, a layer each")
    group.add_argument(
        "--feature_size", type=flags.WIDTH, default=128, metavar="C", help="channels of the first module"
    )
    down = "modules, from 0, after which the size is halved (default: [1,3])"
    group.add_argument("--down", type=layer_list, default=(1, 3), help=down)
    group.add_argument("--ds-type", choices=DOWNSAMPLING, default="maxpool", help="how it is halved")
    mlp = "hidden layers of each head; 0: one Linear after a batch norm"
    group.add_argument("--mlp", type=flags.LAYERS, default=3, metavar="N", help=mlp)
    nlin = "3x3 convolutions of each head, at full size"
    group.add_argument("--nlin", type=flags.LAYERS, default=0, metavar="N", help=nlin)
    width = "their channels in the first head, doubled at each down-sampling (default: 256)"
    group.add_argument("--width_aux", type=flags.WIDTH, metavar="C", help=width)
    window = "window of the first head's average pooling, halved at each down-sampling (default: 16, to 2x2)"
    group.add_argument("--avg_size", type=positive, default=16, metavar="S", help=window)
    group.add_argument("--bn", **switch, help="0: no batch norm, in bodies or heads")
    return parser


def add_reading(group):
    """The flags of how buffers are read and kept."""
    sampling = "which of the least used is read"
    group.add_argument("--buffer-sampling", choices=SAMPLING, default=SAMPLING[0], help=sampling)
    reuse = "a mini-batch is read at most R times (default: no limit)"
    group.add_argument("--max-buffer-reuse", type=integer(1), metavar="R", help=reuse)
    group.add_argument("--buffer-device", choices=("same", "cpu"), default="same", help="where they are kept")
    bits = "keep representations in 8 or 4 bits a value: plain affine quantization by channel"
    group.add_argument("--compress", type=int, choices=BITS, metavar="BITS", help=bits)


def check_network(parser, args):
    """Refuses a flag that would have no effect: the log would claim what the run did not do."""
    if args.width_aux and not args.nlin:
        parser.error("--width_aux has no effect without --nlin")
    args.width_aux = (args.width_aux or 256) if args.nlin else None


def build(args, classes):
    """The network that the flags name."""
    heads = {"pool": args.avg_size, "hidden_layers": args.mlp, "convs": args.nlin, "batch_norm": bool(args.bn)}
    heads |= {"conv_channels": args.width_aux} if args.nlin else {}
    return asynchronous_cnn(args.feature_size, args.ncnn, args.down, args.ds_type, classes, **heads)
