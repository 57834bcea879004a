"""Shared by cifar_buffer.py (the simulation) and cifar_buffer_distributed.py: flags, network, buffer options."""

import torch
from asynchronous_cnn import DOWNSAMPLING, asynchronous_cnn, module_list
from replay_buffer import BITS, SAMPLING

from decoupled.training import flags
from decoupled.training.flags import integer


def parser(doc):
    """A parser for a script with the docstring ``doc``: the flags that both scripts have, except those for buffers."""
    parser = flags.parser(doc, epochs=50, batch_size=128)
    add_name(
        parser,
        "--epochs",
        "--nepochs",
        help="epochs that each module learns, after which it only passes representations on",
    )
    add_name(parser, "--batch-size", "--batch_size", help="images per step; a last, smaller mini-batch is dropped")
    group = parser.add_argument_group("learning")
    group.add_argument(
        "--epochdecay",
        type=integer(1),
        default=15,
        metavar="N",
        help="a module's learning rate drops 5× every this many of its epochs",
    )
    group.add_argument(
        "--ensemble", type=int, choices=(0, 1), default=1, help="1: also evaluate ensembles of heads; 0: do not"
    )
    group = parser.add_argument_group("network")
    group.add_argument("--ncnn", type=integer(2, 1000), default=6, metavar="N", help="number of modules")
    group.add_argument(
        "--feature_size", type=flags.WIDTH, default=128, metavar="C", help="channels of the first module"
    )
    group.add_argument(
        "--down",
        type=module_list,
        default=(1, 3),
        help="modules, from 0, after which height and width are halved (default: [1,3])",
    )
    group.add_argument("--ds-type", choices=DOWNSAMPLING, default="maxpool", help="how height and width are halved")
    group.add_argument(
        "--mlp",
        type=flags.LAYERS,
        default=3,
        metavar="N",
        help="hidden layers of each head; 0: one Linear after a batch norm",
    )
    group.add_argument(
        "--nlin",
        type=flags.LAYERS,
        default=0,
        metavar="N",
        help="3x3 convolutions of each head, at full height and width",
    )
    group.add_argument(
        "--width_aux",
        type=flags.WIDTH,
        metavar="C",
        help="channels of the first head's convolutions, doubled at each down-sampling (default: 256)",
    )
    group.add_argument(
        "--avg_size",
        type=integer(1),
        default=16,
        metavar="S",
        help="window of the first head's average pooling, halved at each down-sampling (default: 16, for 2x2)",
    )
    group.add_argument("--bn", type=int, choices=(0, 1), default=1, help="0: no batch norm in bodies and heads")
    return parser


def add_name(parser, flag, name, help):
    """Gives ``flag`` a second ``name``, its name in the released script, and another help text."""
    action = parser._option_string_actions[flag]
    action.option_strings.append(name)
    action.help = help
    parser._option_string_actions[name] = action


def add_buffers(group):
    """Adds the flags for storing and reading buffers."""
    group.add_argument(
        "--buffer-sampling",
        choices=SAMPLING,
        default=SAMPLING[0],
        help="among the least-read mini-batches, read the newest (priority_lifo) or the oldest (fifo)",
    )
    group.add_argument(
        "--max-buffer-reuse",
        type=integer(1),
        metavar="R",
        help="read each mini-batch at most R times (default: no limit)",
    )
    group.add_argument(
        "--buffer-device",
        choices=("same", "cpu"),
        default="same",
        help="store buffers on the training device or in main memory",
    )
    group.add_argument(
        "--compress",
        type=int,
        choices=BITS,
        metavar="BITS",
        help="store representations in 8 or 4 bits per value: affine quantization per channel",
    )


def check_network(parser, args):
    """Raises an error for a flag that would have no effect: the log would claim something that the run did not do."""
    if args.width_aux and not args.nlin:
        parser.error("--width_aux has no effect without --nlin")
    if args.nlin and args.width_aux is None:
        args.width_aux = 256


def build(args, classes):
    """Builds the network that the flags describe."""
    heads = {
        "pool": args.avg_size,
        "hidden_layers": args.mlp,
        "convs": args.nlin,
        "batch_norm": bool(args.bn),
    }
    if args.nlin:
        heads["conv_channels"] = args.width_aux
    return asynchronous_cnn(args.feature_size, args.ncnn, args.down, args.ds_type, classes, **heads)


def buffer_options(args, device):
    """The options for make_buffers that the flags describe, for a run on ``device``."""
    dtype = torch.float32
    if args.half:  # autocast's dtype, which representations have
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return {
        "device": device,
        "storage_device": device if args.buffer_device == "same" else torch.device("cpu"),
        "dtype": dtype,
        "bits": args.compress,
        "max_reuse": args.max_buffer_reuse,
        "sampling": args.buffer_sampling,
    }
