"""Sequential greedy learning of the 4-module CNN on CIFAR-10: the sequential
curves of the paper's Sec. 5.3, Figs. 3 and 4.

    python learning_curves/cifar_sequential_greedy.py

Modules are trained one after the other, each for all epochs and with its own
learning rate schedule. Finished modules are frozen, including their batch norm
statistics: they only run forward, without their heads. After 50 epochs per
module, the authors' published log has test top-1 78.55 / 85.77 / 88.28 /
89.13 % for heads 1 to 4. An epoch costs 0.7, 4.4, 10 and 10 TFLOP for modules
1 to 4.
"""

import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=50, batch_size=128)
    group = parser.add_argument_group("network")
    group.add_argument("--channels", type=flags.WIDTH, default=64, help="channels of each module")
    return parser.parse_args()


def build(args, classes):
    return layerwise_cnn(channels=args.channels, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=classes)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes))
    optimizers = [SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True) for module in net]
    # From each module's epochs 16, 31, 46, … on
    schedules = [StepLR(optimizer, step_size=15, gamma=0.2) for optimizer in optimizers]
    meter = Meter()

    for module_index, epoch in run.epochs(
        net=net,
        optimizers=optimizers,
        schedules=schedules,
        train=train,
        test=test,
        meters=meter,
        num_modules=len(net),
    ):
        frozen = net[:module_index]
        module = net[module_index]
        net.eval()  # frozen modules normalize with their final statistics and do not update them
        module.train()
        for images, labels in run.progress(train):
            representation = images  # (B, 3, 32, 32)
            with run.autocast():
                with torch.no_grad():
                    for below in frozen:
                        representation = below.body(representation)  # (B, C, s, s)
                _, logits = module(representation)  # (B, classes)
            loss = F.cross_entropy(logits.float(), labels)
            run.step(loss, optimizers[module_index])  # zero_grad, backward, step
            meter.update(loss, logits, labels)
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test), heads=[module_index])
        run.log(module_index + 1, epoch, meter, score)
        schedules[module_index].step()


if __name__ == "__main__":
    flags.start(main)
