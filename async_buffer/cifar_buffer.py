"""Asynchronous Decoupled Greedy Learning of a 6-layer CNN on CIFAR-10, with a
replay buffer before each layer: the paper's Sec. 5.6, Figs. 5 and 6.

    python async_buffer/cifar_buffer.py --buffer 30 --noise 0.1 --layer_noise 3 --seed 0

A simulation in one process of layers that do not wait for each other (Algorithm
2): each turn one layer, drawn at random, learns from its buffer or, the lowest,
from the next images. --noise makes one layer slower, on average by a factor of
1 / (1 - noise). In the paper, factors up to about 1.2 cost next to nothing on
any layer, and a buffer of one mini-batch loses little. Without --buffer the run
is synchronous DGL (Algorithm 1). Learning from an image costs 2.6 GFLOP in all
six layers, an epoch 131 TFLOP. 30 mini-batches before each layer take 6.5 GB.
"""

import argparse

import torch
from asynchronous_cnn import DOWNSAMPLING, asynchronous_cnn, layer_list, representation_shapes
from replay_buffer import BITS, SAMPLING, make_buffers
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from turns import SEQUENCES, ImageStream, Tally, Turns, number

from decoupled import logs, runs
from decoupled.metrics import WithEnsembles, evaluate


def parse_args(argv=None):
    parser = runs.parser(__doc__, epochs=50, batch_size=128)
    count, positive = runs.whole_number(0), runs.whole_number(1)
    group = parser.add_argument_group("learning")
    alias = {"type": positive, "metavar": "N", "default": argparse.SUPPRESS}
    group.add_argument(
        "--nepochs",
        dest="epochs",
        help="the paper's name for --epochs: each layer's own, after which it only forwards",
        **alias,
    )
    group.add_argument(
        "--batch_size",
        dest="batch_size",
        help="the paper's name for --batch-size; a last short batch is dropped",
        **alias,
    )
    group.add_argument("--lr", type=number(above=0), default=0.1, help="at first (default: %(default)s)")
    group.add_argument(
        "--epochdecay",
        type=positive,
        default=15,
        help="own epochs of a layer until its lr falls to a fifth (default: %(default)s)",
    )
    group.add_argument(
        "--ensemble",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: evaluate the ensembles of heads (default: %(default)s)",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--ncnn", type=runs.whole_number(2), default=6, help="layers (default: %(default)s)")
    group.add_argument(
        "--feature_size", type=positive, default=128, help="channels of the first layer (default: %(default)s)"
    )
    group.add_argument(
        "--down",
        type=layer_list,
        default=(1, 3),
        help="layers, from 0, after which the size is halved (default: [1,3])",
    )
    group.add_argument(
        "--ds-type", choices=DOWNSAMPLING, default="maxpool", help="how it is halved (default: %(default)s)"
    )
    group.add_argument(
        "--mlp",
        type=count,
        default=3,
        help="hidden layers of each head; 0: one Linear after a batch norm (default: %(default)s)",
    )
    group.add_argument(
        "--nlin", type=count, default=0, help="3x3 convolutions of each head, at full size (default: %(default)s)"
    )
    group.add_argument(
        "--width_aux",
        type=positive,
        help="their channels in the first head, doubled at each down-sampling (default: 256)",
    )
    group.add_argument(
        "--avg_size",
        type=positive,
        default=16,
        help="window of the first head's average pooling, halved at each down-sampling (default: %(default)s, to 2x2)",
    )
    group.add_argument(
        "--bn", type=int, choices=(0, 1), default=1, help="0: no batch norm, in layers or heads (default: %(default)s)"
    )
    group = parser.add_argument_group("asynchrony")
    group.add_argument(
        "--buffer",
        type=count,
        default=0,
        metavar="M",
        help="mini-batches before each layer; 0: synchronous (default: %(default)s)",
    )
    group.add_argument(
        "--noise",
        type=number(least=0, below=1),
        default=0.0,
        help="by that part a layer is drawn less often (default: %(default)s)",
    )
    group.add_argument(
        "--layer_noise", type=count, default=0, metavar="LAYER", help="which layer, from 0 (default: %(default)s)"
    )
    group.add_argument(
        "--layer-sequence", choices=SEQUENCES, default="random", help="whose turn is next (default: %(default)s)"
    )
    group.add_argument(
        "--buffer-sampling",
        choices=SAMPLING,
        default="priority_lifo",
        help="which of the least used is read: the newest or, with fifo, the oldest (default: %(default)s)",
    )
    group.add_argument(
        "--max-buffer-reuse",
        type=positive,
        metavar="R",
        help="a mini-batch is read at most R times (default: no limit)",
    )
    group.add_argument(
        "--buffer-device", choices=("same", "cpu"), default="same", help="where they are kept (default: %(default)s)"
    )
    group.add_argument(
        "--compress",
        type=int,
        choices=BITS,
        metavar="BITS",
        help="keep representations in 8 or 4 bits a value: plain affine quantization by channel",
    )
    parser.dropped("-j", "--workers", why="the images are on the training device, and no worker reads them")
    parser.dropped("--prog", why="a terminal shows a progress bar, anything else none")
    parser.dropped("--decay", why="the rate falls by --epochdecay")
    parser.dropped("--debug_parameters", why="the log begins with all parameters of the run and the network")
    args = parser.parse_args(argv)

    # A flag that would have no effect is refused: the log would claim what the run did not do.
    if args.layer_noise >= args.ncnn:
        parser.error(f"--layer_noise {args.layer_noise} is no layer: there are {args.ncnn}, from 0")
    if args.width_aux and not args.nlin:
        parser.error("--width_aux has no effect without --nlin")
    if args.noise and args.layer_sequence == "sequential":
        parser.error("--noise has no effect with --layer-sequence sequential: no layer is drawn")
    for flag in (
        "--noise",
        "--layer_noise",
        "--buffer-sampling",
        "--max-buffer-reuse",
        "--buffer-device",
        "--compress",
    ):
        name = flag.strip("-").replace("-", "_")
        if args.buffer == 0 and getattr(args, name) != parser.get_default(name):
            parser.error(f"{flag} has no effect without --buffer: the run is synchronous")
    args.width_aux = (args.width_aux or 256) if args.nlin else None
    return args


def main():
    args = parse_args()
    run = runs.Run(args)
    train, test, classes = run.data(drop_last=True)
    heads = {"pool": args.avg_size, "hidden_layers": args.mlp, "convs": args.nlin, "batch_norm": bool(args.bn)}
    heads |= {"conv_channels": args.width_aux} if args.nlin else {}
    net = run.prepare(asynchronous_cnn(args.feature_size, args.ncnn, args.down, args.ds_type, classes, **heads))
    optimizers = [SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True) for module in net]
    schedules = [
        StepLR(optimizer, step_size=args.epochdecay, gamma=0.2) for optimizer in optimizers
    ]  # after the layer's own epochs 15, 30, 45
    images = ImageStream(train)
    half = torch.float16 if run.device.type == "cuda" else torch.bfloat16  # run.autocast's: what the layers hand on
    options = {"device": run.device, "dtype": half if args.half else torch.float32, "bits": args.compress}
    options |= {"storage_device": run.device if args.buffer_device == "same" else torch.device("cpu")}
    options |= {"max_reuse": args.max_buffer_reuse, "sampling": args.buffer_sampling}
    buffers, memory = make_buffers(
        args.buffer, args.batch_size, representation_shapes(net)[:-1], **options
    )  # before layers 1, 2, …
    print(*memory, sep="\n")
    weights = [
        1 - args.noise * (n == args.layer_noise) for n in range(args.ncnn)
    ]  # the slow layer's factor is 1 / (1 - noise)
    drawn = args.buffer > 0 and args.layer_sequence == "random"
    turns = Turns(
        args.ncnn, len(train), args.epochs, weights=weights if drawn else None, warm_up=args.buffer > 0, seed=args.seed
    )
    state = {
        "optimizers": optimizers,
        "schedules": schedules,
        "train": train,
        "test": test,
        "images": images,
        "buffers": buffers,
        "turns": turns,
    }

    for epoch in run.epochs(net=net, **state):  # over when the slowest layer has finished its own
        if epoch == 1:
            run.write("".join(f"# {line}\n" for line in memory))
        net.train()
        tallies = [Tally() for _ in net]
        for n in run.progress(turns.until(epoch)):  # one turn of one layer
            tally = tallies[n]
            tally.turns += 1
            if not turns.learns(n) and not turns.feeds(
                n
            ):  # its last epoch is over, as is that of every layer above: nobody needs what it makes
                tally.frozen += 1
                continue
            sample = images.read() if n == 0 else buffers[n - 1].read()
            if sample is None:  # all that is there was read as often as allowed
                tally.skipped += 1
                continue
            if turns.learns(n):
                with run.autocast():
                    representation, logits = net[n](sample.representation)  # (B, C, s, s), (B, classes)
                loss = F.cross_entropy(logits.float(), sample.labels)
                run.step(loss, optimizers[n])  # zero_grad, backward, step
                age = turns.learned[n - 1] - sample.step if n > 0 else None
                tally.learned(loss, logits, sample.labels, age, sample.uses)
                turns.learned[n] += 1
                if turns.learned[n] % len(train) == 0:
                    schedules[n].step()
            else:  # it only forwards, batch norm statistics fixed
                tally.frozen += 1
                with run.autocast(), torch.no_grad():
                    representation = net[n].eval().body(sample.representation)  # (B, C, s, s)
            if n + 1 < len(net):  # made before the step; no gradient crosses to the layer below
                buffers[n].write(representation.detach(), sample.labels, turns.learned[n])

        with run.autocast():
            scores = [
                score.top1
                for score in evaluate(WithEnsembles(net, probabilities=False) if args.ensemble else net, test)
            ]
        ensembles = scores[len(net) :] or [float("nan")] * len(net)
        for n, tally in enumerate(tallies):
            line = logs.async_line(n, epoch, turns.own_epochs(n), tally.top1, scores[n], ensembles[n])
            run.write(f"{line}\n{tally.line(n, epoch)}\n")
            print(line, flush=True)


if __name__ == "__main__":
    runs.start(main)
