"""Shared by the ImageNet scripts: flags, the setup of a run, SGD, and progress lines."""

import time
from typing import NamedTuple

import imagenet_folders
from torch import nn
from torch.optim import SGD

from decoupled import InputError
from decoupled.parallel.batch_norm import globalize
from decoupled.parallel.processes import launched
from decoupled.parallel.stages import Stage
from decoupled.training import flags
from decoupled.training.flags import integer, number
from decoupled.training.run import Run

TOPK = (1, 5)
DEBUG_BATCHES = 50  # mini-batches per epoch with --debug 1
APEX = "https://github.com/NVIDIA/apex"


def parser(doc, archs, default, distributed=False):
    """A parser for an ImageNet script with the docstring ``doc`` and the networks ``archs``: the flags of the released
    scripts and ours. With ``distributed``, also the flags for scripts that spread modules over several processes.
    """
    parser = flags.Parser(doc)
    parser.add_argument(
        "data", type=flags.path, metavar="DIR", help="folder with train/ and val/, each with one folder per class"
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "-a", "--arch", choices=archs, default=default, metavar="ARCH", help=f"network: {', '.join(archs)}"
    )
    group.add_argument(
        "--nepochs",
        "--epochs",
        dest="epochs",
        type=integer(1),
        default=50,
        metavar="N",
        help="passes over the training images",
    )
    group.add_argument(
        "--epochdecay", type=integer(1), default=10, metavar="N", help="epochs after which the learning rate drops 10×"
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=integer(1),
        default=256,
        metavar="B",
        help="images per mini-batch, over all processes",
    )
    group.add_argument("--lr", "--learning-rate", type=number(above=0), default=0.1, help="initial learning rate")
    group.add_argument("--momentum", type=number(least=0, below=1), default=0.9, help="momentum of SGD")
    group.add_argument("--wd", "--weight-decay", type=number(least=0), default=1e-4, help="weight decay")
    group.add_argument(
        "--fused-sgd",
        choices=("torch", "apex", "none"),
        default="torch",
        help="implementation of SGD: PyTorch's fused step, NVIDIA's apex, or no fused step",
    )
    flags.add_seed(group, 1)

    group = parser.add_argument_group("data")
    group.add_argument(
        "-j",
        "--workers",
        type=integer(0, 1024),
        default=4,
        metavar="N",
        help="processes that read images, per training process",
    )
    group.add_argument(
        "--image-size",
        type=integer(1, 4096),
        metavar="S",
        help="height and width of the crops, in pixels (default: 224)",
    )
    group.add_argument(
        "--large_size_images",
        type=int,
        choices=(0, 1),
        help="0: crops of 112×112 pixels; 1: 224×224 (a flag of the released scripts)",
    )
    group.add_argument(
        "--train-samples",
        type=integer(1),
        metavar="N",
        help="use only N training images, evenly spaced, for a quick look",
    )
    group.add_argument(
        "--val-samples", type=integer(1), metavar="N", help="use only N images of val/, evenly spaced, for a quick look"
    )

    group = flags.add_device(parser)
    group.add_argument(
        "--static-loss-scale",
        type=number(least=1, below=2**32),
        metavar="S",
        help="constant loss scale for fp16 (default: 1)",
    )
    group.add_argument(
        "--dynamic-loss-scale", action="store_true", help="dynamic loss scaling for fp16; overrides the static scale"
    )

    group = flags.add_processes(parser, "several processes: torchrun --nproc-per-node N")
    group.add_argument(
        "--local-batch-norm",
        action="store_true",
        help="batch norm over each replica's share only: faster, but results then depend on the world size",
    )
    if distributed:
        group.add_argument(
            "--stages",
            type=integer(1),
            default=1,
            metavar="K",
            help="spread the modules over K stages of N/K processes each, which share every mini-batch",
        )
        flags.add_stages(group)
    else:
        parser.set_defaults(stages=1, modules_per_stage=None)

    group = flags.add_log(parser, "--save_folder")
    group.add_argument(
        "-p", "--print-freq", type=integer(1), default=10, metavar="N", help="mini-batches between progress lines"
    )
    group.add_argument(
        "--debug",
        type=int,
        choices=(0, 1),
        default=0,
        help=f"1: {DEBUG_BATCHES} mini-batches per epoch, a log but no checkpoint",
    )
    return parser


def parse(parser):
    """Parses the arguments. Flags that would have no effect are errors. Fills in ``static_loss_scale`` (None if
    dynamic) and ``image_size``.
    """
    args = parser.parse_args()
    if args.image_size and args.large_size_images is not None:
        parser.error("--large_size_images and --image-size both set the size: leave one out")
    if args.debug and args.resume:
        parser.error("--debug 1 writes no checkpoint to --resume: leave one out")
    if not args.half and (args.dynamic_loss_scale or args.static_loss_scale is not None):
        parser.error("a loss scale is for mixed precision: add --half")
    processes = launched().size
    if processes == 1 and args.local_batch_norm:
        parser.error("--local-batch-norm is for several processes: start the script with torchrun --nproc-per-node N")
    if processes == 1 and args.backend:
        parser.error("--backend is for several processes: start the script with torchrun --nproc-per-node N")
    if args.stages == 1 and args.modules_per_stage:
        parser.error("--modules-per-stage is for several stages: add --stages K")

    if args.image_size is None:
        args.image_size = 112 if args.large_size_images == 0 else 224
    del args.large_size_images
    if args.dynamic_loss_scale:
        args.static_loss_scale = None
    elif args.static_loss_scale is None:
        args.static_loss_scale = 1.0
    return args


def sgd(args, module):
    """SGD over the parameters of ``module``, as selected by --fused-sgd. Raises InputError if NVIDIA's apex is
    requested but missing.
    """
    settings = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.wd}
    if args.fused_sgd != "apex":
        return SGD(module.parameters(), **settings, fused=args.fused_sgd == "torch")
    try:
        from apex.optimizers import FusedSGD
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(
            f"--fused-sgd apex needs NVIDIA's apex from {APEX}; the PyPI package called apex is a different one"
        ) from error
    if not next(module.parameters()).is_cuda:
        raise InputError("--fused-sgd apex needs CUDA: choose --fused-sgd torch")
    return FusedSGD(module.parameters(), **settings)


class Setup(NamedTuple):
    """What an ImageNet script starts with."""

    run: Run
    train: object  # images and labels for training, from imagenet_folders.load
    val: object  # images and labels for evaluation
    stage: Stage  # this process's modules of the network
    modules: list[nn.Module]  # stage.modules_here; with replicas, each is wrapped in DistributedDataParallel


def setup(args, build):
    """Sets up the run, the images and the network ``build(args, classes)`` of a script with the arguments ``args``."""
    run = Run(
        args,
        distributed=True,
        stages=args.stages,
        loss_scale=args.static_loss_scale,
        free_on_resume=("data", "print_freq"),
    )
    mesh = run.mesh

    def load():
        return imagenet_folders.load(
            args.data,
            image_size=args.image_size,
            batch_size=args.batch_size,
            workers=args.workers,
            seed=args.seed,
            train_samples=args.train_samples,
            val_samples=args.val_samples,
            rank=mesh.replica_index,
            processes=mesh.replicas,
            min_share=2 if args.local_batch_norm else 1,
            limit=DEBUG_BATCHES if args.debug else None,
            device=run.device,
        )

    train, val, classes = run.data(load)
    net = build(args, classes)
    if mesh.replicas > 1:
        if args.local_batch_norm:
            run.describe("batch norm: of each process")
        else:
            replicas = "all processes" if mesh.stages == 1 else "the replicas of each module"
            run.describe(f"batch norm: over {replicas}")
            net = globalize(net, run.device, mesh.group)
    stage = run.distribute(net)
    modules = mesh.data_parallel(stage.modules_here, args.local_batch_norm)
    return Setup(run, train, val, stage, modules)


def log_progress(run, batches, total):
    """Yields ``batches``, an epoch of ``total`` mini-batches. After every --print-freq of them, prints a line with the
    loss of each module here, images per second, and the share of the time spent waiting for images.
    """
    images = 0
    waited = 0.0
    line_started = time.perf_counter()
    wait_started = line_started
    for batch in batches:
        waited += time.perf_counter() - wait_started
        yield batch
        _, labels = batch
        images += len(labels) * run.mesh.replicas
        if run.batch % run.args.print_freq == 0:
            losses = " ".join(
                f"{loss:.4f}" for loss in run.latest_losses()
            )  # losses of this process's share and modules
            seconds = time.perf_counter() - line_started
            speed = f"{images / seconds:.1f} images/s, {100 * waited / seconds:.0f} % of the time waiting for images"
            run.console.write(f"epoch {run.epoch}, batch {run.batch} of {total}: loss {losses}, {speed}")
            images = 0
            waited = 0.0
            line_started = time.perf_counter()
        wait_started = time.perf_counter()
