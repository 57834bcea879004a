"""Decoupled neural interfaces (DNI) and back-propagation on CIFAR-10, the
methods that DGL is compared with in the paper's Sec. 5.1, Fig. 2.

    python dni/cifar_cnn_dni.py                    back-propagation
    python dni/cifar_cnn_dni.py --dni              DNI
    python dni/cifar_cnn_dni.py --dni --context    cDNI

In DNI, each block learns from synthetic gradients; in cDNI, the synthesizers
also see the labels. The CNN and the synthesizers are those of the DNI paper
(Jaderberg et al. 2017, App. C.1).

After 2,000 epochs the authors' published logs have test top-1 84.47, 64.74 and
80.86 % (the last after 1,990), after 10 epochs 60.91, 35.52 and 49.05 %. A
training image costs 0.31 GFLOP, an epoch 15 TFLOP, with --dni 1.03 and 51.

--half is not available on CUDA: synthesizers learn the scale of the gradients,
which changes with fp16's loss scale.
"""

from dni_backbone import ConvSynthesizer, backbone
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

import dni
from decoupled import InputError
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.run import Run

N = 3  # the head's number in the log, as in the authors' logs


def parse_args():
    parser = flags.parser(__doc__, epochs=2000, batch_size=256, lr=None, test_batch_size=256)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--dni",
        action="store_true",
        help="learn from synthetic gradients instead of back-propagating through the whole network",
    )
    group.add_argument("--context", action="store_true", help="with --dni: synthesizers also see the labels (cDNI)")
    group.add_argument(
        "--sgd", action="store_true", help="SGD (lr 0.01, momentum 0.9, weight decay 1e-5) instead of Adam (lr 3e-5)"
    )
    group = parser.add_argument_group("network and printed losses")
    group.add_argument(
        "--channels", type=flags.WIDTH, default=128, help="channels of all blocks and of the synthesizers' convolutions"
    )
    group.add_argument("--log-interval", type=flags.integer(1), default=10, help="mini-batches between printed losses")
    args = parser.parse_args()
    if args.context and not args.dni:
        parser.error("--context is for synthesizers: add --dni")
    if args.lr is None:
        args.lr = 0.01 if args.sgd else 3e-5
    return args


class Network(nn.Sequential):
    """Three blocks and the head: (B, 3, 32, 32) → logits (B, classes). With ``synthetic``, a BackwardInterface follows
    each block; with ``context``, its synthesizer sees the labels.
    """

    def __init__(self, channels, classes, synthetic=False, context=False):
        blocks, head = backbone(channels, classes)
        layers = []
        for block in blocks:
            layers.append(block)
            if synthetic:
                synthesizer = ConvSynthesizer(channels, context_dim=classes if context else None)
                layers.append(dni.BackwardInterface(synthesizer))
        super().__init__(*layers, head)


def build(args, classes):
    """Builds the network that the flags describe."""
    return Network(args.channels, classes, synthetic=args.dni, context=args.context)


def main():
    args = parse_args()
    run = Run(args)
    if args.half and run.device.type == "cuda":
        raise InputError("--half means fp16 on CUDA, and synthesizers cannot follow its loss scale: leave it out")
    train, test, classes = run.data()
    net = run.prepare(build(args, classes), cuda_graphs=False)  # all blocks run forward before one backward pass
    if args.sgd:
        optimizer = SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-5, fused=True)
    else:
        optimizer = Adam(net.parameters(), lr=args.lr, fused=True)
    meter = Meter()

    for epoch in run.epochs(net=net, optimizers=optimizer, train=train, test=test, meters=meter):
        net.train()
        for images, labels in run.progress(train):
            context = F.one_hot(labels, classes).float() if args.context else None
            optimizer.zero_grad()  # first: the forward pass already adds gradients
            with run.autocast(), dni.synthesizer_context(context):
                # (B, classes); with --dni, each interface back-propagates a synthetic gradient into the block below
                logits = net(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()  # with --dni, through the head, and in each interface into its synthesizer
            optimizer.step()
            run.watch(loss, N)
            meter.update(loss, logits, labels)
            if run.batch % args.log_interval == 0:
                latest_loss = run.latest_losses()[0]
                run.console.write(f"epoch {epoch}, batch {run.batch} of {len(train)}, loss: {latest_loss:.5f}")
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test))
        run.log(N, epoch, meter, score)


if __name__ == "__main__":
    flags.start(main)
