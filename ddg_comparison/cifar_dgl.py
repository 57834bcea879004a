"""Decoupled Greedy Learning of a ResNet on CIFAR-10, the third row of the
paper's Table 2.

    python ddg_comparison/cifar_dgl.py
    torchrun --nproc-per-node 2 ddg_comparison/cifar_dgl.py

Every module takes its step on each mini-batch, on the detached representation
from the module below (Algorithm 1). All except the last have an MLP-SR
auxiliary. With torchrun, each process trains one or more of the modules, all at
the same time, with the same results. The paper reports 93.5 ± 0.1 % for
ResNet-110 in 2 modules after 300 epochs. With one module, this is
back-propagation. A training image costs 1.51 GFLOP, an epoch 76 TFLOP.
"""

from cifar_resnet import decoupled_resnet
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=300, batch_size=128, lr=0.01, distributed=True)
    group = parser.add_argument_group("network")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="depth of the ResNet, 6n+2")
    group.add_argument("--channels", type=flags.WIDTH, default=16, help="channels of the first third of the blocks")
    group.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="number of modules")
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
    return parser.parse_args()


def build(args, classes):
    """Builds the network that the flags describe."""
    return decoupled_resnet(args.depth, args.splits, classes, width=args.channels)


def main():
    args = parse_args()
    run = Run(args, distributed=True)
    train, test, classes = run.data()
    stage = run.distribute(build(args, classes))  # the modules that this process trains
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
        for module in stage.modules_here
    ]
    milestones = [epoch - 1 for epoch in args.milestones]  # schedules count finished epochs
    schedules = [MultiStepLR(optimizer, milestones, gamma=0.1) for optimizer in optimizers]
    meters = [Meter() for _ in stage.modules_here]

    for epoch in run.epochs(
        net=stage, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters
    ):
        stage.train()
        for representation, labels in run.progress(stage.inputs(train)):  # images, or what the stage below sends
            for module, optimizer, meter in zip(stage.modules_here, optimizers, meters, strict=True):
                with run.autocast():
                    representation, logits = module(representation)  # (B, C, s, s), (B, classes)
                loss = F.cross_entropy(logits.float(), labels)
                run.step(loss, optimizer)  # zero_grad, backward, step: frees the module's graph before the next forward
                representation = representation.detach()  # the module above sends no gradient back
                meter.update(loss, logits, labels)
            stage.send(representation, labels)  # to the module above, if another process trains it
        with run.autocast():
            scores = evaluate(stage.heads, run.evaluation(stage.inputs(test)))
        for n, (meter, score) in enumerate(zip(*stage.gather(meters, scores), strict=True), start=1):
            run.log(n, epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
