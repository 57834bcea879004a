"""What the ImageNet scripts share: their flags, SGD, and the lines they print on the way."""

import time

import imagenet_folders
from torch.optim import SGD

from decoupled import InputError
from decoupled.parallel.batch_norm import globalize
from decoupled.parallel.processes import launched
from decoupled.training import flags
from decoupled.training.flags import integer, number
from decoupled.training.run import Run

TOPK = (1, 5)
DEBUG_BATCHES = 50  # an epoch with --debug 1
APEX = "https://github.com/NVIDIA/apex"


def parser(doc, archs, default, distributed=False):
    """The parser of an ImageNet script whose docstring is ``doc``, with the released scripts' flags that both have, and
    ours; with ``distributed``, those of a script whose modules learn in several processes too.
    """
    parser, positive = flags.Parser(doc), integer(1)
    parser.add_argument(
        "data", type=flags.path, metavar="DIR", help="folder with train/ and val/, of one folder a class"
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "-a", "--arch", choices=archs, default=default, metavar="ARCH", help=f"network: {', '.join(archs)}"
    )
    epochs = "passes over the images"
    group.add_argument("--nepochs", "--epochs", dest="epochs", type=positive, default=50, metavar="N", help=epochs)
    group.add_argument(
        "--epochdecay", type=positive, default=10, metavar="N", help="epochs until the rate falls to a tenth"
    )
    size = "images a step, of all processes together"
    group.add_argument("-b", "--batch-size", type=positive, default=256, metavar="B", help=size)
    rate, least = number(above=0), number(least=0)
    group.add_argument("--lr", "--learning-rate", type=rate, default=0.1, help="learning rate at first")
    group.add_argument("--momentum", type=number(least=0, below=1), default=0.9, help="of SGD")
    group.add_argument("--wd", "--weight-decay", type=least, default=1e-4, help="weight decay")
    fused = "torch: PyTorch's own fused step; apex: NVIDIA's apex; none: a plain step"
    group.add_argument("--fused-sgd", choices=("torch", "apex", "none"), default="torch", help=fused)
    flags.add_seed(group, 1)
    group = parser.add_argument_group("data")
    workers = "processes that read images, for each that trains"
    group.add_argument("-j", "--workers", type=integer(0, 1024), default=4, metavar="N", help=workers)
    group.add_argument("--image-size", type=integer(1, 4096), metavar="S", help="side of the crops (default: 224)")
    small = "0: crops of 112 pixels, as in the released scripts"
    group.add_argument("--large_size_images", type=int, choices=(0, 1), help=small)
    train = "only N training images, evenly spaced, for quick looks"
    group.add_argument("--train-samples", type=positive, metavar="N", help=train)
    group.add_argument("--val-samples", type=positive, metavar="N", help="only N images of val/, likewise")
    group = flags.add_device(parser)
    group.add_argument(
        "--static-loss-scale", type=number(least=1, below=2**32), metavar="S", help="of fp16, constant (default: 1)"
    )
    dynamic = "of fp16: as large as gradients allow, whatever the static one"
    group.add_argument("--dynamic-loss-scale", action="store_true", help=dynamic)
    group = flags.add_processes(parser, "several processes: torchrun --nproc-per-node N")
    local = "normalize each replica's share by itself: faster, and another method for each number of them"
    group.add_argument("--local-batch-norm", action="store_true", help=local)
    if distributed:
        share = "share the modules out to K stages of N/K processes, which share each mini-batch"
        group.add_argument("--stages", type=positive, default=1, metavar="K", help=share)
        flags.add_stages(group)
    group = flags.add_log(parser, "--save_folder")
    group.add_argument(
        "-p", "--print-freq", type=positive, default=10, metavar="N", help="batches between printed lines"
    )
    debug = f"1: {DEBUG_BATCHES} batches an epoch, a log but no checkpoint"
    group.add_argument("--debug", type=int, choices=(0, 1), default=0, help=debug)
    return parser


def parsed(parser):
    """The arguments, after errors for flags that would do nothing. Sets ``static_loss_scale`` and ``image_size``."""
    args = parser.parse_args()
    if args.image_size and args.large_size_images is not None:
        parser.error("--large_size_images and --image-size both set the size: leave one out")
    if args.debug and args.resume:
        parser.error("--debug 1 leaves no checkpoint to --resume: leave one out")
    args.image_size = args.image_size or (112 if args.large_size_images == 0 else 224)
    del args.large_size_images
    if not args.half and (args.dynamic_loss_scale or args.static_loss_scale is not None):
        parser.error("a loss scale is for mixed precision: add --half")
    if launched()[1] == 1 and (args.local_batch_norm or args.backend):
        flag = "--local-batch-norm" if args.local_batch_norm else "--backend"
        parser.error(f"{flag} is for several processes: start the script with torchrun --nproc-per-node N")
    if getattr(args, "stages", 1) == 1 and getattr(args, "modules_per_stage", None):
        parser.error("--modules-per-stage is for several stages: add --stages K")
    args.static_loss_scale = None if args.dynamic_loss_scale else args.static_loss_scale or 1.0
    return args


def sgd(args, module):
    """SGD over ``module``'s parameters, fused as --fused-sgd says. Raises InputError where NVIDIA's apex is asked for
    and is not there.
    """
    settings = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.wd}
    if args.fused_sgd != "apex":
        return SGD(module.parameters(), **settings, fused=args.fused_sgd == "torch")
    try:
        from apex.optimizers import FusedSGD
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(
            f"--fused-sgd apex needs NVIDIA's apex from {APEX}: the PyPI package called apex is another one"
        ) from error
    if not next(module.parameters()).is_cuda:
        raise InputError("--fused-sgd apex needs CUDA: choose --fused-sgd torch")
    return FusedSGD(module.parameters(), **settings)


def begin(args, build):
    """(run, train, val, stage, modules): a Run of an ImageNet script, its images, this process's decoupled.parallel.stages.Stage
    of the network ``build(args, classes)``, and what a step calls instead of the stage's modules.
    """
    free_on_resume, stages = ("data", "workers", "print_freq"), getattr(args, "stages", 1)
    run = Run(args, distributed=True, stages=stages, loss_scale=args.static_loss_scale, free_on_resume=free_on_resume)
    mesh = run.mesh
    names = ("train_samples", "val_samples", "image_size", "batch_size", "workers", "seed")
    share = {"rank": mesh.replica, "processes": mesh.replicas, "least": 1 + args.local_batch_norm}
    limit = DEBUG_BATCHES if args.debug else None
    options = {name: getattr(args, name) for name in names} | share | {"limit": limit, "device": run.device}
    with run.console.reading():
        train, val, classes = mesh.images(lambda: imagenet_folders.load(args.data, **options))
    net = build(args, classes)
    if mesh.replicas > 1:
        among = "all processes" if mesh.stages == 1 else "the replicas of each module"
        run.describe(f"batch norm: {'of each process' if args.local_batch_norm else f'over {among}'}")
        net = net if args.local_batch_norm else globalize(net, run.device, mesh.group)
    stage = run.distribute(net, (3, args.image_size, args.image_size))
    return run, train, val, stage, mesh.parallel(stage.modules_here, args.local_batch_norm)


def reported(run, batches, total):
    """Passes on ``batches`` and prints a line every --print-freq of them: the loss of each module, images/s, and the
    share of the time that went on waiting for images.
    """
    images, waited = 0, 0.0
    since = asked = time.perf_counter()
    for batch in batches:
        waited += time.perf_counter() - asked
        yield batch
        images += len(batch[1]) * run.mesh.replicas
        if run.batch % run.args.print_freq == 0:
            losses = " ".join(f"{loss:.4f}" for loss in run.latest_losses())  # of this process's share and modules
            seconds = time.perf_counter() - since
            speed = f"{images / seconds:.1f} images/s, {100 * waited / seconds:.0f} % of the time waiting for them"
            run.console.write(f"epoch {run.epoch}, batch {run.batch} of {total}: loss {losses}, {speed}")
            since, images, waited = time.perf_counter(), 0, 0.0
        asked = time.perf_counter()
