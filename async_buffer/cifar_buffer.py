"""Asynchronous Decoupled Greedy Learning of a 6-layer CNN on CIFAR-10, with a
replay buffer before each layer: the paper's Sec. 5.6, Figs. 5 and 6.

    python async_buffer/cifar_buffer.py --buffer 30 --noise 0.1 \\
        --layer_noise 3 --seed 0

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
from turns import SEQUENCES, ImageStream, Tally, Turns

from decoupled import flags, logs
from decoupled.flags import integer, number
from decoupled.metrics import WithEnsembles, evaluate
from decoupled.runs import Run


def parse_args(argv=None):
    parser = flags.parser(__doc__, epochs=50, batch_size=128)
    count, positive, switch = integer(0), integer(1), {"type": int, "choices": (0, 1), "default": 1}
    group = parser.add_argument_group("learning")
    alias = {"type": positive, "metavar": "N", "default": argparse.SUPPRESS}
    epochs = "the paper's name for --epochs: each layer's own, after which it only forwards"
    group.add_argument("--nepochs", dest="epochs", help=epochs, **alias)
    batch_size = "the paper's name for --batch-size; a last short batch is dropped"
    group.add_argument("--batch_size", dest="batch_size", help=batch_size, **alias)
    decay = "own epochs of a layer until its rate falls to a fifth"
    group.add_argument("--epochdecay", type=positive, default=15, metavar="N", help=decay)
    group.add_argument("--ensemble", **switch, help="1: evaluate the ensembles of heads")
    group = parser.add_argument_group("network")
    group.add_argument("--ncnn", type=integer(2, 1000), default=6, metavar="N", help="layers")
    group.add_argument("--feature_size", type=flags.WIDTH, default=128, metavar="C", help="channels of the first layer")
    down = "layers, from 0, after which the size is halved (default: [1,3])"
    group.add_argument("--down", type=layer_list, default=(1, 3), help=down)
    group.add_argument("--ds-type", choices=DOWNSAMPLING, default="maxpool", help="how it is halved")
    mlp = "hidden layers of each head; 0: one Linear after a batch norm"
    group.add_argument("--mlp", type=flags.LAYERS, default=3, metavar="N", help=mlp)
    nlin = "3x3 convolutions of each head, at full size"
    group.add_argument("--nlin", type=flags.LAYERS, default=0, metavar="N", help=nlin)
    width = "their channels in the first head, doubled at each down-sampling (default: 256)"
    group.add_argument("--width_aux", type=flags.WIDTH, metavar="C", help=width)
    window = "window of the first head's average pooling, halved at each down-sampling (default: 16, to 2x2)"
    group.add_argument("--avg_size", type=positive, default=16, metavar="S", help=window)
    group.add_argument("--bn", **switch, help="0: no batch norm, in layers or heads")
    group = parser.add_argument_group("asynchrony")
    group.add_argument(
        "--buffer", type=count, default=0, metavar="M", help="mini-batches before each layer; 0: synchronous"
    )
    noise = "a layer is drawn less often by this part"
    group.add_argument("--noise", type=number(least=0, below=1), default=0.0, metavar="PART", help=noise)
    group.add_argument("--layer_noise", type=count, default=0, metavar="LAYER", help="which layer, from 0")
    group.add_argument("--layer-sequence", choices=SEQUENCES, default="random", help="whose turn is next")
    sampling = "which of the least used is read"
    group.add_argument("--buffer-sampling", choices=SAMPLING, default=SAMPLING[0], help=sampling)
    reuse = "a mini-batch is read at most R times (default: no limit)"
    group.add_argument("--max-buffer-reuse", type=positive, metavar="R", help=reuse)
    group.add_argument("--buffer-device", choices=("same", "cpu"), default="same", help="where they are kept")
    bits = "keep representations in 8 or 4 bits a value: plain affine quantization by channel"
    group.add_argument("--compress", type=int, choices=BITS, metavar="BITS", help=bits)
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
    for name in ("noise", "layer_noise", "buffer-sampling", "max-buffer-reuse", "buffer-device", "compress"):
        key = name.replace("-", "_")
        if args.buffer == 0 and getattr(args, key) != parser.get_default(key):
            parser.error(f"--{name} has no effect without --buffer: the run is synchronous")
    args.width_aux = (args.width_aux or 256) if args.nlin else None
    return args


def learn(run, module, optimizer, sample):
    """A layer's greedy step on a mini-batch: its representation (B, C, s, s), made before the step, its loss and logits
    (B, classes), all detached.
    """
    with run.autocast():
        representation, logits = module(sample.representation)
    loss = F.cross_entropy(logits.float(), sample.labels)
    run.step(loss, optimizer)  # zero_grad, backward, step
    return representation.detach(), loss.detach(), logits.detach()  # no gradient crosses to another layer


def forward_only(run, module, sample):
    """What a layer does after its last epoch, batch norm statistics fixed: its representation (B, C, s, s)."""
    with run.autocast(), torch.no_grad():
        return module.eval().body(sample.representation)


def build(args, classes):
    """The network that the flags name."""
    heads = {"pool": args.avg_size, "hidden_layers": args.mlp, "convs": args.nlin, "batch_norm": bool(args.bn)}
    heads |= {"conv_channels": args.width_aux} if args.nlin else {}
    return asynchronous_cnn(args.feature_size, args.ncnn, args.down, args.ds_type, classes, **heads)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data(drop_last=True)
    net = run.prepare(build(args, classes))
    optimizers = [SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True) for module in net]
    # After the layer's own epochs 15, 30, 45.
    schedules = [StepLR(optimizer, step_size=args.epochdecay, gamma=0.2) for optimizer in optimizers]
    images = ImageStream(train)
    half = torch.float16 if run.device.type == "cuda" else torch.bfloat16  # run.autocast's: what the layers hand on
    options = {"device": run.device, "dtype": half if args.half else torch.float32, "bits": args.compress}
    options |= {"storage_device": run.device if args.buffer_device == "same" else torch.device("cpu")}
    options |= {"max_reuse": args.max_buffer_reuse, "sampling": args.buffer_sampling}
    shapes = representation_shapes(net)[:-1]
    buffers, memory = make_buffers(args.buffer, args.batch_size, shapes, **options)  # before layers 1, 2, …
    print(*memory, sep="\n")
    run.describe(*memory)
    weights = None  # turn by turn
    if args.buffer > 0 and args.layer_sequence == "random":  # the slow layer's factor is 1 / (1 - noise)
        weights = [1 - args.noise * (n == args.layer_noise) for n in range(args.ncnn)]
    turns = Turns(args.ncnn, len(train), args.epochs, weights=weights, warm_up=args.buffer > 0, seed=args.seed)
    tallies = [Tally() for _ in net]
    state = {"net": net, "optimizers": optimizers, "schedules": schedules, "train": images, "test": test}
    state |= {"buffers": buffers, "turns": turns, "tallies": tallies}

    for epoch in run.epochs(**state):  # over when the slowest layer has finished its own
        net.train()
        for n in run.progress(turns.until(epoch)):  # one turn of one layer
            tally = tallies[n]
            tally.turns += 1
            if not turns.learns(n) and not turns.feeds(n):  # nobody needs what it makes
                tally.frozen += 1
                continue
            sample = images.read() if n == 0 else buffers[n - 1].read()
            if sample is None:  # all that is there was read as often as allowed
                tally.skipped += 1
                continue
            if turns.learns(n):
                representation, loss, logits = learn(run, net[n], optimizers[n], sample)
                age = turns.learned[n - 1] - sample.step if n > 0 else None
                tally.learned(loss, logits, sample.labels, age, sample.uses)
                turns.learned[n] += 1
                if turns.learned[n] % len(images) == 0:
                    schedules[n].step()
            else:
                tally.frozen += 1
                representation = forward_only(run, net[n], sample)
            if n + 1 < len(net):
                buffers[n].write(representation, sample.labels, turns.learned[n])

        evaluated = WithEnsembles(net, probabilities=False) if args.ensemble else net
        with run.autocast():
            scores = [score.top1 for score in evaluate(evaluated, run.evaluation(test))]
        ensembles = scores[len(net) :] or [float("nan")] * len(net)
        for n, tally in enumerate(tallies):
            line = logs.async_line(n, epoch, turns.own_epochs(n), tally.top1, scores[n], ensembles[n])
            run.report(line, tally.line(n, epoch))


if __name__ == "__main__":
    flags.start(main)
