"""Back-propagation of a ResNet on CIFAR-10, the first row of the paper's Table
2.

    python ddg_comparison/cifar_backprop.py
    python ddg_comparison/cifar_backprop.py --checkpointing --splits 8

The paper reports 93.53 % for ResNet-110 after 300 epochs. With --checkpointing
(Chen et al. 2016, arXiv 1604.06174; torch.utils.checkpoint), only the
representations between K parts are kept, and the backward pass recomputes all
parts except the last: the same steps with less memory and up to a third more
computation. For saving memory, this is the alternative to DGL. A training image
costs 1.52 GFLOP, an epoch 76 TFLOP.
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
    group = parser.add_argument_group("network")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="depth of the ResNet, 6n+2")
    group.add_argument("--channels", type=flags.WIDTH, default=16, help="channels of the first third of the blocks")
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep only the representations between parts, and recompute the other activations in the backward pass",
    )
    group.add_argument(
        "--splits", type=flags.integer(1), metavar="K", help="number of parts for --checkpointing (default: 2)"
    )
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--milestones",
        type=flags.integer(1),
        nargs="+",
        default=[150, 225],
        metavar="EPOCH",
        help="epochs at which the learning rate drops 10× (default: 150 225)",
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum, which DDG's authors use")
    args = parser.parse_args()
    if args.splits is None:
        args.splits = 2 if args.checkpointing else 1
    if args.splits > 1 and not args.checkpointing:
        parser.error(f"--splits {args.splits} has no effect on back-propagation: add --checkpointing or omit --splits")
    if args.splits == 1 and args.checkpointing:
        parser.error("--checkpointing keeps the representations between parts: choose at least 2 --splits")
    if args.compile and args.checkpointing:
        parser.error("--checkpointing does not work with --compile: leave one out")
    return args


def forward_without_activations(part, representation):
    """Runs part(representation) without keeping the activations in ``part``: the backward pass recomputes them. Batch
    norm's running statistics count the mini-batch once.
    """

    def contexts():
        """Context managers for the forward pass and for its recomputation."""
        return nullcontext(), frozen_statistics(part)

    return checkpoint(part, representation, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def build(args, classes):
    """Builds the network that the flags describe: in parts with --checkpointing, otherwise in one piece."""
    return chained_resnet(args.depth, args.splits, classes, width=args.channels)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes))
    optimizer = SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
    milestones = [epoch - 1 for epoch in args.milestones]  # schedules count finished epochs
    schedule = MultiStepLR(optimizer, milestones, gamma=0.1)
    meter = Meter()

    *lower_parts, last_part = net  # without --checkpointing, there is one part
    for epoch in run.epochs(net=net, optimizers=optimizer, schedules=schedule, train=train, test=test, meters=meter):
        net.train()
        for images, labels in run.progress(train):
            representation = images
            with run.autocast():
                for part in lower_parts:
                    representation = forward_without_activations(part, representation)  # (B, C, s, s)
                logits = last_part(
                    representation
                )  # (B, classes); its backward pass comes next, so it keeps its activations
            loss = F.cross_entropy(logits.float(), labels)
            run.step(loss, optimizer)  # zero_grad, backward, step
            meter.update(loss, logits, labels)
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test))
        run.log(len(net), epoch, meter, score)
        schedule.step()


if __name__ == "__main__":
    flags.start(main)
