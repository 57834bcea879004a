"""Asynchronous Decoupled Greedy Learning of a CNN on CIFAR-10, each of its six
layers a module with a replay buffer before it: the paper's Sec. 5.6, Figs. 5
and 6.

    python async_buffer/cifar_buffer.py --buffer 30 --noise 0.1 \\
        --layer_noise 3 --seed 0

A simulation in one process of modules that do not wait for each other
(Algorithm 2). In each turn one module, drawn at random, learns from its buffer;
the lowest module learns from the next images. --noise makes one module slower,
on average by a factor of 1 / (1 - noise). In the paper, factors up to about 1.2
cost next to nothing on any module, and a buffer of one mini-batch loses little.
Without --buffer the run is synchronous DGL (Algorithm 1).

Learning from an image costs 2.6 GFLOP in all six modules, an epoch 131 TFLOP.
30 mini-batches before each module take 6.5 GB.
"""

import async_flags
import torch
from async_flags import build
from asynchronous_cnn import representation_shapes
from replay_buffer import make_buffers
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from turns import SEQUENCES, ImageStream, Tally, Turns

from decoupled import logs
from decoupled.networks.evaluation import WithEnsembles, evaluate
from decoupled.training import flags
from decoupled.training.flags import integer, number
from decoupled.training.run import Run

FLAGS_OF_ASYNCHRONY = ("noise", "layer_noise", "buffer-sampling", "max-buffer-reuse", "buffer-device", "compress")


def parse_args(argv=None):
    parser = async_flags.parser(__doc__)
    group = parser.add_argument_group("asynchrony")
    group.add_argument(
        "--buffer",
        type=integer(0),
        default=0,
        metavar="M",
        help="mini-batches in the buffer before each module; 0: synchronous",
    )
    group.add_argument(
        "--noise",
        type=number(least=0, below=1),
        default=0.0,
        metavar="PART",
        help="fraction by which the slow module is drawn less often",
    )
    group.add_argument(
        "--layer_noise", type=integer(0), default=0, metavar="MODULE", help="the slow module, counted from 0"
    )
    group.add_argument(
        "--layer-sequence",
        choices=SEQUENCES,
        default="random",
        help="draw the module of each turn at random, or take turns in order",
    )
    async_flags.add_buffers(group)
    parser.add_dropped("-j", "--workers", why="images are on the training device, and no workers read them")
    parser.add_dropped("--prog", why="a progress bar is shown on terminals only")
    parser.add_dropped("--decay", why="--epochdecay sets when the learning rate drops")
    parser.add_dropped("--debug_parameters", why="every log begins with all arguments and the network")
    args = parser.parse_args(argv)

    # A flag that would have no effect is an error: the log would claim something that the run did not do.
    if args.layer_noise >= args.ncnn:
        parser.error(f"--layer_noise {args.layer_noise}: the modules are 0 to {args.ncnn - 1}")
    if args.noise and args.layer_sequence == "sequential":
        parser.error("--noise has no effect with --layer-sequence sequential: no module is drawn")
    for name in FLAGS_OF_ASYNCHRONY:
        key = name.replace("-", "_")
        if args.buffer == 0 and getattr(args, key) != parser.get_default(key):
            parser.error(f"--{name} has no effect without --buffer: the run is synchronous")
    async_flags.check_network(parser, args)
    return args


def draw_weights(args):
    """The relative probability of drawing each module; None if the modules take turns in order."""
    if args.buffer == 0 or args.layer_sequence == "sequential":
        return None
    weights = [1.0] * args.ncnn
    weights[args.layer_noise] = 1 - args.noise  # slower by a factor of 1 / (1 - noise)
    return weights


def forward_only(run, module, representation):
    """The representation (B, C, s, s) that a module computes after its last epoch, with fixed batch norm statistics."""
    with run.autocast(), torch.no_grad():
        return module.eval().body(representation)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data(drop_last=True)
    net = run.prepare(build(args, classes))
    optimizers = [SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True) for module in net]
    # After the module's own epochs 15, 30, 45.
    schedules = [StepLR(optimizer, step_size=args.epochdecay, gamma=0.2) for optimizer in optimizers]
    images = ImageStream(train)
    options = async_flags.buffer_options(args, run.device)
    shapes = representation_shapes(net)[:-1]
    buffers, memory = make_buffers(args.buffer, args.batch_size, shapes, **options)  # before modules 1, 2, …
    print(*memory, sep="\n")
    run.describe(*memory)
    turns = Turns(
        args.ncnn, len(train), args.epochs, weights=draw_weights(args), warm_up=args.buffer > 0, seed=args.seed
    )
    tallies = [Tally() for _ in net]

    state = {"net": net, "optimizers": optimizers, "schedules": schedules, "train": images, "test": test}
    state |= {"buffers": buffers, "turns": turns, "tallies": tallies}
    for epoch in run.epochs(**state):  # ends when the slowest module has finished its own epoch
        net.train()
        for n in run.progress(turns.until(epoch), resumes=True):  # one turn of module n
            tally = tallies[n]
            tally.turns += 1
            if not turns.learns(n) and not turns.feeds(n):  # no module needs its representations
                tally.frozen += 1
                continue
            sample = images.read() if n == 0 else buffers[n - 1].read()
            if sample is None:  # every mini-batch in the buffer has been read as often as allowed
                tally.skipped += 1
                continue
            if turns.learns(n):
                with run.autocast():
                    representation, logits = net[n](sample.representation)  # (B, C, s, s), (B, classes)
                loss = F.cross_entropy(logits.float(), sample.labels)
                run.step(loss, optimizers[n])  # zero_grad, backward, step
                representation = representation.detach()  # no gradient crosses to another module
                staleness = turns.learned[n - 1] - sample.step if n > 0 else None
                tally.add(loss, logits, sample.labels, staleness, sample.uses)
                turns.learned[n] += 1
                if turns.learned[n] % len(images) == 0:  # an epoch of this module has ended
                    schedules[n].step()
            else:
                tally.frozen += 1
                representation = forward_only(run, net[n], sample.representation)
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
