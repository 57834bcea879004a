"""Decoupled Greedy Learning of VGG and ResNet on ImageNet: the paper's Sec.
5.5, Table 3.

    python imagenet/imagenet_dgl.py DIR --arch vgg13 --block_size 1 --half \\
        --dynamic-loss-scale -j 16
    python imagenet/imagenet_dgl.py DIR --arch resnet152 --half \\
        --dynamic-loss-scale -j 16
    torchrun --nproc-per-node 4 imagenet/imagenet_dgl.py DIR --arch vgg19 \\
        --block_size 8 --half --dynamic-loss-scale -j 8 --stages 2

DIR has train/ and val/. Every module takes its step on each mini-batch, on the
detached representation from the module below (Algorithm 1). All except the last
have an MLP-SR auxiliary. Processes share each mini-batch of -b images. With
--stages K, they form K groups that work at the same time: each trains some of
the modules, and its processes share the mini-batch.
The paper's top-1 / top-5 (%) of the last head after 50 epochs:

    vgg13 --block_size 1     10 modules   64.4 / 85.8
    vgg13 --block_size 3      4 modules   67.8 / 88.0
    vgg19 --block_size 4      4 modules   69.2 / 89.0
    vgg19 --block_size 8      2 modules   70.8 / 90.2
    resnet152 (--splits 2)    2 modules   74.5 / 92.0

Any other torchvision classifier is split into --splits modules of about equal
FLOPs (decoupled.decouple).
"""

import imagenet_flags
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_torchvision import CLASSIFIERS, greedy_torchvision
from greedy_vgg import STAGES, greedy_vgg
from imagenet_flags import TOPK, log_progress, sgd
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from decoupled import logs
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.flags import integer


def parse_args():
    published = (*STAGES, *BLOCKS)
    others = [name for name in CLASSIFIERS if name not in published]
    parser = imagenet_flags.parser(__doc__, (*published, *others), default="resnet152", distributed=True)
    group = parser.add_argument_group("modules and auxiliaries")
    group.add_argument("--block_size", type=integer(1), metavar="B", help="VGG: convolutions per module (default: 1)")
    group.add_argument(
        "--splits", type=integer(1), metavar="K", help="others: number of modules (default: 2, as published)"
    )
    group.add_argument(
        "--channels", type=flags.WIDTH, metavar="C", help="VGG and ResNet: channels of the first layer (default: 64)"
    )
    group.add_argument("--nlin", type=flags.LAYERS, default=3, metavar="N", help="1×1 convolutions per auxiliary")
    group.add_argument("--mlp", type=flags.LAYERS, default=3, metavar="N", help="hidden layers per auxiliary")
    group.add_argument(
        "--ensemble", type=int, choices=(0, 1), default=1, help="1: also evaluate ensembles of heads; 0: do not"
    )
    parser.add_dropped(
        "--ncnn",
        "--feature_size",
        "--ds-type",
        why="the network is --arch, split by --block_size (VGG) or --splits (ResNet)",
    )
    parser.add_dropped(
        "--start_epoch", "--resume_epoch", "--resume_feat", why="--resume continues where the checkpoint was saved"
    )
    args = imagenet_flags.parse(parser)
    if args.arch in STAGES:
        if args.splits is not None:
            parser.error(f"--splits is for other networks: choose --block_size for {args.arch}")
        if args.block_size is None:
            args.block_size = 1
    else:
        if args.block_size is not None:
            parser.error(f"--block_size is for VGG: choose --splits for {args.arch}")
        if args.splits is None:
            args.splits = 2
    if args.arch not in published and args.channels is not None:
        parser.error(f"--channels is for VGG and ResNet: leave it out for {args.arch}")
    if args.arch in published and args.channels is None:
        args.channels = 64
    return args


def build(args, classes):
    """Builds the network that the flags describe."""
    settings = {"classes": classes, "image_size": args.image_size, "convs": args.nlin, "hidden_layers": args.mlp}
    if args.arch in STAGES:
        return greedy_vgg(args.arch, args.block_size, width=args.channels, **settings)
    if args.arch in BLOCKS:
        return greedy_resnet(args.arch, args.splits, width=args.channels, **settings)
    return greedy_torchvision(args.arch, args.splits, **settings)


def main():
    args = parse_args()
    run, train, val, stage, modules = imagenet_flags.setup(args, build)
    optimizers = [sgd(args, module) for module in stage.modules_here]
    schedules = [StepLR(optimizer, args.epochdecay, gamma=0.1) for optimizer in optimizers]
    meters = [Meter(TOPK) for _ in stage.modules_here]

    for epoch in run.epochs(
        net=stage, optimizers=optimizers, schedules=schedules, train=train, test=val, meters=meters
    ):
        stage.train()
        # Images, or what the stage below sends
        for representation, labels in log_progress(run, run.progress(stage.inputs(train)), len(train)):
            for module, optimizer, meter in zip(modules, optimizers, meters, strict=True):
                with run.autocast():
                    representation, logits = module(representation)  # (b, C, s, s), (b, classes)
                loss = F.cross_entropy(logits.float(), labels)
                # zero_grad, backward (gradients are averaged over the replicas), step: frees the module's graph
                run.step(loss, optimizer)
                representation = representation.detach()  # the module above sends no gradient back
                meter.update(loss, logits, labels)
            stage.send(representation, labels)  # to the module above, if another process trains it
        run.mesh.broadcast_buffers(stage.modules_here)
        heads = stage.ensembles() if args.ensemble else stage.heads
        with run.autocast():
            scores = evaluate(heads, run.evaluation(stage.inputs(val, with_ensemble_sum=args.ensemble)), topk=TOPK)
        head_scores = scores[: len(meters)]
        ensemble_scores = scores[len(meters) :]
        if not args.ensemble:
            ensemble_scores = [Meter(TOPK) for _ in meters]  # empty: logged as nan
        gathered = stage.gather(meters, head_scores, ensemble_scores)
        for n, (meter, score, ensemble) in enumerate(zip(*gathered, strict=True), start=1):
            line = logs.imagenet_line(
                n,
                epoch,
                train=(meter.top1, meter.top5),
                test=(score.top1, score.top5),
                ensemble=(ensemble.top1, ensemble.top5),
            )
            run.report(line, logs.loss_line(n, epoch, meter.loss))
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
