"""Decoupled Greedy Learning of a 4-module CNN on CIFAR-10: the parallel curves
of the paper's Sec. 5.3, Figs. 3 and 4.

    python learning_curves/cifar_dgl.py
    torchrun --nproc-per-node 2 learning_curves/cifar_dgl.py

Every module takes its step on each mini-batch, on the detached representation
from the module below (Algorithm 1). With torchrun, each process trains one or
more of the modules, all at the same time, with the same results.
After 50 epochs the authors' published log has test top-1 78.35 / 85.25 / 87.90
/ 89.86 % for heads 1 to 4. A training image costs 0.35 GFLOP, an epoch 17
TFLOP.
"""

from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=50, batch_size=128, distributed=True)
    group = parser.add_argument_group("network")
    group.add_argument("--channels", type=flags.WIDTH, default=64, help="channels of each module")
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--precise-statistics",
        action="store_true",
        help="recompute batch norm statistics on all training images before each evaluation; for runs with few "
        "mini-batches per epoch",
    )
    return parser.parse_args()


def build(args, classes):
    return layerwise_cnn(channels=args.channels, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=classes)


def main():
    args = parse_args()
    run = Run(args, distributed=True)
    train, test, classes = run.data()
    stage = run.distribute(build(args, classes))  # the modules that this process trains
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        for module in stage.modules_here
    ]
    schedules = [StepLR(optimizer, step_size=15, gamma=0.2) for optimizer in optimizers]  # from epochs 16, 31, 46, … on
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
                run.step(loss, optimizer)  # zero_grad, backward, which frees the graph, step
                representation = representation.detach()  # the module above sends no gradient back
                meter.update(loss, logits, labels)
            stage.send(representation, labels)  # to the module above, if another process trains it
        if args.precise_statistics:
            with run.autocast():
                stage.recompute_statistics(train.without_augmentation())
        with run.autocast():
            scores = evaluate(stage.heads, run.evaluation(stage.inputs(test)))
        for n, (meter, score) in enumerate(zip(*stage.gather(meters, scores), strict=True), start=1):
            run.log(n, epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
