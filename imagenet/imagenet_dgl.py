"""Decoupled Greedy Learning of VGG and ResNet on ImageNet: the paper's Sec.
5.5, Table 3.

    python imagenet/imagenet_dgl.py DIR --arch vgg13 --block_size 1 --half --dynamic-loss-scale -j 16
    python imagenet/imagenet_dgl.py DIR --arch resnet152 --half --dynamic-loss-scale -j 16
    torchrun --nproc-per-node 4 imagenet/imagenet_dgl.py DIR --arch vgg19 \\
        --block_size 8 --half --dynamic-loss-scale -j 8

DIR holds train/ and val/. Every module takes its step on each mini-batch, on
the detached representation from the module below (Algorithm 1); all but the
last learn from an MLP-SR auxiliary. -b is the batch of all processes together.
The paper's top-1 / top-5 (%) of the last head after 50 epochs:

    vgg13 --block_size 1     10 modules   64.4 / 85.8        vgg19 --block_size 4   4 modules   69.2 / 89.0
    vgg13 --block_size 3      4 modules   67.8 / 88.0        vgg19 --block_size 8   2 modules   70.8 / 90.2
    resnet152 (--splits 2)    2 modules   74.5 / 92.0
"""

import torch
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg
from imagenet_run import TOPK, ImageNetRun, parsed, parser, sgd
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from decoupled import logs, runs
from decoupled.metrics import WithEnsembles, evaluate


def parse_args():
    flags = parser(__doc__, (*STAGES, *BLOCKS), default="resnet152")
    group = flags.add_argument_group("modules and auxiliaries")
    group.add_argument(
        "--block_size", type=runs.whole_number(1), metavar="B", help="VGG: convolutions a module (default: 1)"
    )
    group.add_argument(
        "--splits", type=runs.whole_number(1), metavar="K", help="ResNet: modules (default: 2, the published cut)"
    )
    group.add_argument(
        "--nlin", type=runs.whole_number(0), default=3, help="1×1 convolutions of an auxiliary (default: %(default)s)"
    )
    group.add_argument(
        "--mlp", type=runs.whole_number(0), default=3, help="hidden layers of an auxiliary (default: %(default)s)"
    )
    group.add_argument(
        "--ensemble",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: evaluate the ensembles of heads (default: %(default)s)",
    )
    cut = "the network is --arch, cut by --block_size (VGG) or --splits (ResNet)"
    flags.dropped("--ncnn", "--feature_size", "--ds-type", why=cut)
    place = "--resume goes on where its checkpoint was saved"
    flags.dropped("--start_epoch", "--resume_epoch", "--resume_feat", why=place)
    args = parsed(flags)
    vgg = args.arch in STAGES
    if vgg and args.splits:
        flags.error(f"--splits cuts ResNets: choose how {args.arch} is cut by --block_size")
    if not vgg and args.block_size:
        flags.error(f"--block_size groups VGG's convolutions: choose how {args.arch} is cut by --splits")
    args.block_size, args.splits = (args.block_size or 1, None) if vgg else (None, args.splits or 2)
    return args


def build(args, classes):
    """The network that the flags name."""
    settings = {"classes": classes, "image_size": args.image_size, "convs": args.nlin, "hidden_layers": args.mlp}
    if args.arch in STAGES:
        return greedy_vgg(args.arch, args.block_size, **settings)
    return greedy_resnet(args.arch, args.splits, **settings)


def step(run, modules, optimizers, images, labels):
    """Algorithm 1 on one mini-batch: images (b, 3, s, s), labels (b,) → each head's (loss, logits (b, classes))."""
    representation, heads = images, []
    for module, optimizer in zip(modules, optimizers, strict=True):
        with run.autocast():
            representation, logits = module(representation)  # (b, C, s', s'), (b, classes)
        loss = F.cross_entropy(logits.float(), labels)
        run.step(
            loss, optimizer
        )  # zero_grad, backward (with other processes: and their gradients), step: this frees the module's graph
        representation = representation.detach()  # no gradient crosses to the module below
        heads.append((loss.detach(), logits.detach()))
    return heads


def main():
    args = parse_args()
    run = ImageNetRun(args)
    train, val, classes = run.data()
    net = run.prepare(build(args, classes))
    modules = run.parallel(net)
    optimizers = [sgd(args, module) for module in net]
    schedules = [StepLR(optimizer, args.epochdecay, gamma=0.1) for optimizer in optimizers]

    for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=val):
        net.train()
        meters = run.meters(len(net))
        for images, labels in run.training(train):
            for meter, (loss, logits) in zip(meters, step(run, modules, optimizers, images, labels), strict=True):
                meter.update(loss, logits, labels)
        with run.autocast():
            heads = WithEnsembles(net, probabilities=True) if args.ensemble else net
            scores = run.summed(evaluate(heads, run.evaluation(val), topk=TOPK))
        together = [(score.top1, score.top5) for score in scores[len(net) :]] or [(torch.nan, torch.nan)] * len(net)
        for n, (meter, score, ensemble) in enumerate(zip(run.summed(meters), scores, together, strict=False), start=1):
            line = logs.imagenet_line(n, epoch, (meter.top1, meter.top5), (score.top1, score.top5), ensemble)
            run.write(f"{line}\n{logs.loss_line(n, epoch, meter.loss)}\n")
            print(line, flush=True)
        for schedule in schedules:  # last: a run that is stopped while it evaluates comes here once
            schedule.step()


if __name__ == "__main__":
    runs.start(main)
