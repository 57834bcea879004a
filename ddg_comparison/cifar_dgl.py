"""Decoupled Greedy Learning of a ResNet on CIFAR-10, the third row of the
paper's Table 2.

    python ddg_comparison/cifar_dgl.py

Every module takes its step on each mini-batch, on the detached representation
from the module below (Algorithm 1); all but the last learn from an MLP-SR
auxiliary. The paper has 93.5 ± 0.1 % for ResNet-110 in 2 modules after 300
epochs. With one module it is back-propagation. A training image costs 1.51
GFLOP, an epoch 76 TFLOP.
"""

from cifar_resnet import decoupled_resnet
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from decoupled import flags
from decoupled.metrics import Meter, evaluate
from decoupled.runs import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=300, batch_size=128, lr=0.01)
    group = parser.add_argument_group("network and recipe")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="of the ResNet, 6n+2")
    group.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="modules")
    group.add_argument(
        "--milestones",
        type=flags.integer(1),
        nargs="+",
        default=[150, 225],
        metavar="EPOCH",
        help="first epochs at a tenth of the rate before (default: 150 225)",
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum, as DDG's authors use")
    return parser.parse_args()


def step(run, net, optimizers, images, labels):
    """Algorithm 1 on one mini-batch: images (B, 3, 32, 32), labels (B,) → each head's (loss, logits (B, classes))."""
    representation, heads = images, []
    for module, optimizer in zip(net, optimizers, strict=True):
        with run.autocast():
            representation, logits = module(representation)  # (B, C, s, s), (B, classes)
        loss = F.cross_entropy(logits.float(), labels)
        run.step(
            loss, optimizer
        )  # zero_grad, backward, step: this frees the module's graph before the next one's forward
        representation = representation.detach()  # no gradient crosses to the module below
        heads.append((loss.detach(), logits.detach()))
    return heads


def build(args, classes):
    """The network that the flags name."""
    return decoupled_resnet(args.depth, args.splits, classes)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes))
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
        for module in net
    ]
    falls = [epoch - 1 for epoch in args.milestones]  # in epochs done, which is what schedules count
    schedules = [MultiStepLR(optimizer, falls, gamma=0.1) for optimizer in optimizers]
    meters = [Meter() for _ in net]

    for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters):
        net.train()
        for images, labels in run.progress(train):
            for meter, (loss, logits) in zip(meters, step(run, net, optimizers, images, labels), strict=True):
                meter.update(loss, logits, labels)
        with run.autocast():
            scores = evaluate(net, run.evaluation(test))
        for n, (meter, score) in enumerate(zip(meters, scores, strict=True), start=1):
            run.log(n, epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
