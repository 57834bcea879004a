"""Decoupled Greedy Learning of VGG and ResNet on ImageNet: the paper's Sec.
5.5, Table 3.

    python imagenet/imagenet_dgl.py DIR --arch vgg13 --block_size 1 --half \\
        --dynamic-loss-scale -j 16
    python imagenet/imagenet_dgl.py DIR --arch resnet152 --half \\
        --dynamic-loss-scale -j 16
    torchrun --nproc-per-node 4 imagenet/imagenet_dgl.py DIR --arch vgg19 \\
        --block_size 8 --half --dynamic-loss-scale -j 8 --stages 2

DIR holds train/ and val/. Every module takes its step on each mini-batch, on
the detached representation from the module below (Algorithm 1); all but the
last learn from an MLP-SR auxiliary. Processes share each mini-batch of -b
images; with --stages K they hold different modules, which learn at the same
time, and those with the same modules share the mini-batch.
The paper's top-1 / top-5 (%) of the last head after 50 epochs:

    vgg13 --block_size 1     10 modules   64.4 / 85.8
    vgg13 --block_size 3      4 modules   67.8 / 88.0
    vgg19 --block_size 4      4 modules   69.2 / 89.0
    vgg19 --block_size 8      2 modules   70.8 / 90.2
    resnet152 (--splits 2)    2 modules   74.5 / 92.0

Any other classifier of torchvision is cut in --splits modules of about equal
FLOPs (decoupled.decouple).
"""

from itertools import zip_longest
from math import nan

import imagenet_flags
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_torchvision import CLASSIFIERS, greedy_torchvision
from greedy_vgg import STAGES, greedy_vgg
from imagenet_flags import TOPK, reported, sgd
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from decoupled import logs
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.flags import integer


def parse_args():
    published = (*STAGES, *BLOCKS)
    others = (name for name in CLASSIFIERS if name not in published)
    parser = imagenet_flags.parser(__doc__, (*published, *others), default="resnet152", distributed=True)
    group = parser.add_argument_group("modules and auxiliaries")
    group.add_argument("--block_size", type=integer(1), metavar="B", help="VGG: convolutions a module (default: 1)")
    group.add_argument("--splits", type=integer(1), metavar="K", help="others: modules (default: 2, the published cut)")
    group.add_argument("--nlin", type=flags.LAYERS, default=3, metavar="N", help="1×1 convolutions of an auxiliary")
    group.add_argument("--mlp", type=flags.LAYERS, default=3, metavar="N", help="hidden layers of an auxiliary")
    ensemble = "1: evaluate the ensembles of heads"
    group.add_argument("--ensemble", type=int, choices=(0, 1), default=1, help=ensemble)
    cut = "the network is --arch, cut by --block_size (VGG) or --splits (ResNet)"
    parser.dropped("--ncnn", "--feature_size", "--ds-type", why=cut)
    place = "--resume goes on where its checkpoint was saved"
    parser.dropped("--start_epoch", "--resume_epoch", "--resume_feat", why=place)
    args = imagenet_flags.parsed(parser)
    vgg = args.arch in STAGES
    if vgg and args.splits:
        parser.error(f"--splits cuts other networks: choose how {args.arch} is cut by --block_size")
    if not vgg and args.block_size:
        parser.error(f"--block_size groups VGG's convolutions: choose how {args.arch} is cut by --splits")
    args.block_size, args.splits = (args.block_size or 1, None) if vgg else (None, args.splits or 2)
    return args


def build(args, classes):
    """The network that the flags name."""
    settings = {"classes": classes, "image_size": args.image_size, "convs": args.nlin, "hidden_layers": args.mlp}
    if args.arch in STAGES:
        return greedy_vgg(args.arch, args.block_size, **settings)
    return (greedy_resnet if args.arch in BLOCKS else greedy_torchvision)(args.arch, args.splits, **settings)


def step(run, modules, optimizers, representation, labels):
    """Algorithm 1 on one mini-batch: images, or the representation below, (b, C, s, s) and labels (b,) → the
    representation on top, detached, and each head's (loss, logits (b, classes)).
    """
    heads = []
    for module, optimizer in zip(modules, optimizers, strict=True):
        with run.autocast():
            representation, logits = module(representation)  # (b, C, s', s'), (b, classes)
        loss = F.cross_entropy(logits.float(), labels)
        # zero_grad, backward (with other replicas: and their gradients), step: this frees the module's graph.
        run.step(loss, optimizer)
        representation = representation.detach()  # no gradient crosses to the module below
        heads.append((loss.detach(), logits.detach()))
    return representation, heads


def main():
    args = parse_args()
    run, train, val, stage, modules = imagenet_flags.begin(args, build)
    optimizers = [sgd(args, module) for module in stage.modules_here]
    schedules = [StepLR(optimizer, args.epochdecay, gamma=0.1) for optimizer in optimizers]
    meters = [Meter(TOPK) for _ in stage.modules_here]

    state = {"optimizers": optimizers, "schedules": schedules, "train": train, "test": val, "meters": meters}
    for epoch in run.epochs(net=stage, **state):
        stage.train()
        for representation, labels in reported(run, run.progress(stage.inputs(train)), len(train)):
            representation, heads = step(run, modules, optimizers, representation, labels)
            for meter, (loss, logits) in zip(meters, heads, strict=True):
                meter.update(loss, logits, labels)
            stage.send(representation, labels)  # to the stage above, where there is one
        run.mesh.same_buffers(stage.modules_here)
        heads = stage.ensembles() if args.ensemble else stage.heads
        with run.autocast():
            scores = evaluate(heads, run.evaluation(stage.inputs(val, totals=args.ensemble)), topk=TOPK)
        count = len(stage.modules_here)
        every = stage.gather(meters, scores[:count], scores[count:])  # in process 0, of all stages and replicas
        for n, (meter, score, ensemble) in enumerate(zip_longest(*every), start=1):
            together = (ensemble.top1, ensemble.top5) if ensemble else (nan, nan)
            line = logs.imagenet_line(n, epoch, (meter.top1, meter.top5), (score.top1, score.top5), together)
            run.report(line, logs.loss_line(n, epoch, meter.loss))
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
