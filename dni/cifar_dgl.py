"""Decoupled Greedy Learning of the DNI paper's CNN on CIFAR-10, the curve that
DNI is compared with in Sec. 5.1, Fig. 2.

    python dni/cifar_dgl.py
    torchrun --nproc-per-node 3 dni/cifar_dgl.py

Each of the three blocks of cifar_cnn_dni.py is a module. The auxiliaries of the
first two are the network that synthesizes gradients in DNI, with a linear
classifier on top, so that the two methods cost about the same. For head 3, the
authors' published log has test top-1 85.05 % after 1,500 epochs, and 39.11 /
61.46 / 77.40 % after 1 / 10 / 100. A training image costs 1.02 GFLOP, an
epoch 51 TFLOP.
"""

from dni_backbone import ConvSynthesizer, backbone, head
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

from decoupled import logs
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=1500, batch_size=256, lr=3e-5, test_batch_size=256, distributed=True)
    group = parser.add_argument_group("network and printed losses")
    group.add_argument(
        "--channels", type=flags.WIDTH, default=128, help="channels of all blocks and of the auxiliaries' convolutions"
    )
    group.add_argument("--log-interval", type=flags.integer(1), default=10, help="mini-batches between printed losses")
    return parser.parse_args()


def auxiliary(channels, classes):
    """The DNI synthesizer at the representation's full size, global average pool, linear classifier.

    (B, C, h, w) → (B, classes)
    """
    return nn.Sequential(ConvSynthesizer(channels), nn.AdaptiveAvgPool2d(1), head(channels, classes))


def build(args, classes):
    """Builds the network that the flags describe."""
    blocks, last_head = backbone(args.channels, classes)
    heads = [auxiliary(args.channels, classes), auxiliary(args.channels, classes), last_head]
    return DecoupledNetwork(map(DecoupledModule, blocks, heads))


def main():
    args = parse_args()
    run = Run(args, distributed=True)
    train, test, classes = run.data()
    stage = run.distribute(build(args, classes))  # the modules that this process trains
    optimizers = [Adam(module.parameters(), lr=args.lr, fused=True) for module in stage.modules_here]
    meters = [Meter() for _ in stage.modules_here]

    for epoch in run.epochs(net=stage, optimizers=optimizers, train=train, test=test, meters=meters):
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
            if run.batch % args.log_interval == 0:
                losses = " ".join(f"{loss:.5f}" for loss in run.latest_losses())
                run.console.write(f"epoch {epoch}, batch {run.batch} of {len(train)}, losses: {losses}")
        with run.autocast():
            scores = evaluate(stage.heads, run.evaluation(stage.inputs(test)))
        for n, (meter, score) in enumerate(zip(*stage.gather(meters, scores), strict=True), start=1):
            is_last = n == len(stage.net)
            # The published log has only the last head
            run.log(n, epoch, meter, score, line=logs.head_line if is_last else logs.lower_head_line)


if __name__ == "__main__":
    flags.start(main)
