"""Decoupled Greedy Learning of a 6-module CNN on CIFAR-10 with three kinds of
auxiliary network: the paper's Sec. 5.2, Table 1.

    python aux_nets/cifar_dgl.py --type_aux mlp-sr
    python aux_nets/cifar_dgl.py --type_aux mlp
    python aux_nets/cifar_dgl.py --type_aux cnn
    torchrun --nproc-per-node 2 aux_nets/cifar_dgl.py --type_aux cnn

Every module takes its step on each mini-batch, on the detached representation
from the module below (Algorithm 1). With torchrun, each process trains one or
more of the modules, all at the same time, with the same results. With
--block_size 6, the whole network is one module: back-propagation.

With CNN, MLP and MLP-SR auxiliaries, the paper's test top-1 of the last head is
92.2, 90.6 and 91.2 %. A training image costs 11.5, 2.7 and 2.8 GFLOP, an epoch
577, 134 and 138 TFLOP.
"""

from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from decoupled.networks.auxiliary import AUXILIARIES
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=50, batch_size=128, distributed=True)
    group = parser.add_argument_group("network")
    group.add_argument(
        "--type_aux", choices=AUXILIARIES, default="mlp-sr", help="auxiliary network of all modules except the last"
    )
    group.add_argument(
        "--block_size", type=flags.integer(1), default=1, help="layers per module; the last module has the remainder"
    )
    group.add_argument(
        "--channels",
        type=flags.WIDTH,
        default=128,
        help="channels of the first layer; layers 2 and 4 double the number",
    )
    group.add_argument("--depth", type=flags.integer(1, 1000), default=6, help="number of layers")
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--lr-step", type=flags.integer(1), default=15, help="the learning rate drops 5× every this many epochs"
    )
    return parser.parse_args()


def build(args, classes):
    """Builds the network that the flags describe."""
    return layerwise_cnn(
        channels=args.channels,
        depth=args.depth,
        downsample=(1, 3),
        auxiliary=args.type_aux,
        classes=classes,
        block_size=args.block_size,
    )


def main():
    args = parse_args()
    run = Run(args, distributed=True)
    train, test, classes = run.data()
    stage = run.distribute(build(args, classes))  # the modules that this process trains
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        for module in stage.modules_here
    ]
    # By default in epochs 16, 31, 46, …
    schedules = [StepLR(optimizer, step_size=args.lr_step, gamma=0.2) for optimizer in optimizers]
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
