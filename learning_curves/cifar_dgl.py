"""Decoupled Greedy Learning of a 4-module CNN on CIFAR-10: the parallel curves
of the paper's Sec. 5.3, Figs. 3 and 4.

    python learning_curves/cifar_dgl.py

Every module takes its step on each mini-batch, on the detached representation
from the module below (Algorithm 1). After 50 epochs the authors' published log
has test top-1 78.35 / 85.25 / 87.90 / 89.86 % for heads 1 to 4. A training
image costs 0.35 GFLOP, an epoch 17 TFLOP.
"""

from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from decoupled import flags
from decoupled.metrics import Meter, evaluate
from decoupled.network import layerwise_cnn
from decoupled.runs import Run


def parse_args():
    return flags.parser(__doc__, epochs=50, batch_size=128).parse_args()


def build(args, classes):
    """The network, which no flag changes."""
    return layerwise_cnn(channels=64, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=classes)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes))
    optimizers = [SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True) for module in net]
    schedules = [StepLR(optimizer, step_size=15, gamma=0.2) for optimizer in optimizers]  # at epochs 16, 31, 46, …
    meters = [Meter() for _ in net]

    for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters):
        net.train()
        for images, labels in run.progress(train):
            representation = images  # (B, 3, 32, 32)
            for module, optimizer, meter in zip(net, optimizers, meters, strict=True):
                with run.autocast():
                    representation, logits = module(representation)  # (B, C, s, s), (B, classes)
                loss = F.cross_entropy(logits.float(), labels)
                run.step(
                    loss, optimizer
                )  # zero_grad, backward, step: this frees the module's graph before the next one's forward
                representation = representation.detach()  # no gradient crosses to the module below
                meter.update(loss, logits, labels)
        with run.autocast():
            scores = evaluate(net, run.evaluation(test))
        for n, (meter, score) in enumerate(zip(meters, scores, strict=True), start=1):
            run.log(n, epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
