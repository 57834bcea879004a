"""Back-propagation of a ResNet on CIFAR-10, the first row of the paper's Table
2.

    python ddg_comparison/cifar_backprop.py
    python ddg_comparison/cifar_backprop.py --checkpointing --splits 8

The paper has 93.53 % for ResNet-110 after 300 epochs. With --checkpointing
(Chen et al. 2016, arXiv 1604.06174, by torch.utils.checkpoint) only the
representations between K parts are kept, and the backward pass recomputes each
part below the last: the same steps for less memory and up to a third more
computing, which is what one would weigh DGL against. A training image costs
1.52 GFLOP, an epoch 76 TFLOP.
"""

from contextlib import nullcontext

from cifar_resnet import chained_resnet, frozen_statistics
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.checkpoint import checkpoint

from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=300, batch_size=128, lr=0.01)
    group = parser.add_argument_group("network and recipe")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="of the ResNet, 6n+2")
    group.add_argument(
        "--checkpointing", action="store_true", help="keep the representations between parts only, recompute the others"
    )
    group.add_argument("--splits", type=flags.integer(1), metavar="K", help="parts for --checkpointing (default: 2)")
    group.add_argument(
        "--milestones",
        type=flags.integer(1),
        nargs="+",
        default=[150, 225],
        metavar="EPOCH",
        help="first epochs at a tenth of the rate before (default: 150 225)",
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum, as DDG's authors use")
    args = parser.parse_args()
    args.splits = args.splits or 1 + args.checkpointing
    if args.splits > 1 and not args.checkpointing:
        parser.error(f"--splits {args.splits} changes nothing in back-propagation: add --checkpointing or leave it out")
    if args.splits == 1 and args.checkpointing:
        parser.error("--checkpointing keeps what is between parts: choose at least 2 --splits")
    if args.compile and args.checkpointing:
        parser.error("--checkpointing does not work with --compile: leave one out")
    return args


def recomputed(part, below):
    """part(below), whose activations are dropped now and computed again in the backward pass; batch norm counts the
    batch once.
    """
    contexts = nullcontext(), frozen_statistics(part)
    return checkpoint(part, below, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


def step(run, net, optimizer, images, labels, checkpointing=False):
    """One mini-batch: images (B, 3, 32, 32), labels (B,) → loss, logits (B, classes)."""
    *lower, last = net
    representation = images
    with run.autocast():
        for part in lower:
            representation = recomputed(part, representation) if checkpointing else part(representation)  # (B, C, s, s)
        logits = last(representation)  # its backward pass comes next, so recomputing it would save nothing
    loss = F.cross_entropy(logits.float(), labels)
    run.step(loss, optimizer)  # zero_grad, backward, step
    return loss.detach(), logits.detach()


def build(args, classes):
    """The network that the flags name."""
    return chained_resnet(args.depth, args.splits, classes)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes))
    optimizer = SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
    falls = [epoch - 1 for epoch in args.milestones]  # in epochs done, which is what schedules count
    schedule = MultiStepLR(optimizer, falls, gamma=0.1)
    meter = Meter()

    for epoch in run.epochs(net=net, optimizers=optimizer, schedules=schedule, train=train, test=test, meters=meter):
        net.train()
        for images, labels in run.progress(train):
            loss, logits = step(run, net, optimizer, images, labels, args.checkpointing)
            meter.update(loss, logits, labels)
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test))
        run.log(len(net), epoch, meter, score)
        schedule.step()


if __name__ == "__main__":
    flags.start(main)
