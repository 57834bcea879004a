"""Asynchronous Decoupled Greedy Learning with replay, for real: Algorithm 2 of
the paper's Sec. 5.6, in a process for each module or for some.

    torchrun --nproc-per-node 6 async_buffer/cifar_buffer_distributed.py \\
        --buffer 30 --slow 3:1.5

Each process learns at its own pace. What comes from the module below goes into
its replay buffer as it comes, from which it learns, again and again where the
module below is slow. Nobody waits for a slow process: --slow makes one and, with
--turn, which makes all others alike, draws in real time the Fig. 5 that
cifar_buffer.py simulates in one process. All meet when the slowest has finished
an epoch, to evaluate, and where the run is saved or stopped; what was sent is
then in the buffers. A resumed run goes on from there; what a process learns
from depends on who was faster, so no run is exactly another.
"""

import argparse

import async_flags
import torch
from async_flags import build
from replay_buffer import HandOver, make_buffers
from replay_stage import Pace, ReplayStage
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from turns import ImageStream, Tally

from decoupled import InputError, logs
from decoupled.networks.evaluation import evaluate
from decoupled.training import flags
from decoupled.training.flags import integer, number
from decoupled.training.run import Run


def slow_down(text):
    """An argparse type: "3:1.5" → (3, 1.5)."""
    rank, _, factor = text.partition(":")
    try:
        return integer(0)(rank), number(least=1)(factor)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be RANK:FACTOR, such as 3:1.5, with a factor ≥ 1") from None


def parse_args(argv=None):
    parser = async_flags.parser(__doc__)
    group = flags.add_processes(parser, "several processes: torchrun --nproc-per-node K")
    cut = "modules of each process, from the image up; by default the FLOPs of the busiest are fewest"
    group.add_argument("--modules-per-stage", type=flags.integers, metavar="N,N,…", help=cut)
    turn = "a turn of any process takes at least MS milliseconds, so that all are equally fast"
    group.add_argument("--turn", type=number(least=0), default=0.0, metavar="MS", help=turn)
    slow = "a turn of process RANK takes FACTOR times as long as it would"
    group.add_argument("--slow", type=slow_down, metavar="RANK:FACTOR", help=slow)
    group = parser.add_argument_group("replay")
    group.add_argument("--buffer", type=integer(1), default=30, metavar="M", help="mini-batches before each process")
    async_flags.add_reading(group)
    args = parser.parse_args(argv)
    async_flags.check_network(parser, args)
    return args


def make_buffer(args, run, stage):
    """The replay buffer before this process's modules; None in the lowest. Says what memory it takes."""
    if stage.lowest:
        return None
    dimensions, order = stage.below.shape, stage.below.back
    shape = [[None, *dimensions][place] for place in order[1:]]  # (C, h, w), however it lies in memory
    options = {"device": run.device, "dtype": stage.below.dtype, "bits": args.compress}
    options |= {"storage_device": run.device if args.buffer_device == "same" else torch.device("cpu")}
    options |= {"max_reuse": args.max_buffer_reuse, "sampling": args.buffer_sampling}
    (buffer,), _ = make_buffers(args.buffer, args.batch_size, [shape], **options)
    return buffer


def learn(run, module, optimizer, representation, labels):
    """A module's greedy step: its representation (B, C, s, s), made before the step, its loss and logits (B, classes),
    all detached.
    """
    with run.autocast():
        representation, logits = module(representation)
    loss = F.cross_entropy(logits.float(), labels)
    run.step(loss, optimizer)  # zero_grad, backward, step
    return representation.detach(), loss.detach(), logits.detach()  # no gradient crosses to another module


def forward_only(run, module, representation):
    """What a module does after its last epoch, batch norm statistics fixed: its representation (B, C, s, s)."""
    with run.autocast(), torch.no_grad():
        return module.eval().body(representation)


def main():
    args = parse_args()
    run = Run(args, distributed=True, free_on_resume=("slow", "turn"))
    size = run.processes.size
    if size == 1:
        raise InputError("one process has nobody to be asynchronous with: start it with torchrun --nproc-per-node 2 …")
    if args.slow and args.slow[0] >= size:
        raise InputError(f"--slow {args.slow[0]}:{args.slow[1]:g} names no process: there are {size}, from 0")
    train, test, classes = run.data(drop_last=True)
    stage = run.distribute(build(args, classes), kind=ReplayStage)
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        for module in stage.modules_here
    ]
    # After the module's own epochs 15, 30, 45.
    schedules = [StepLR(optimizer, step_size=args.epochdecay, gamma=0.2) for optimizer in optimizers]
    images = ImageStream(train) if stage.lowest else train
    buffer = make_buffer(args, run, stage)
    pace = Pace(stage.lengths, len(images), args.epochs)
    slow = args.slow[1] if args.slow and args.slow[0] == run.processes.rank else 1.0
    stage.connect(pace, images, buffer, args.batch_size, args.turn / 1000, slow)
    tallies = [Tally() for _ in stage.modules_here]
    inner = [
        HandOver(run.device) for _ in stage.modules_here[1:]
    ]  # within a process a module hands over as in Algorithm 1
    state = {"pace": [pace] * len(tallies), "net": stage, "optimizers": optimizers, "schedules": schedules}
    state |= {"train": images, "test": test, "tallies": tallies, "buffers": [buffer or HandOver(run.device), *inner]}

    for epoch in run.epochs(**state):  # over when the slowest process has finished its own
        stage.train()
        for sample, age in run.progress(stage.turns(epoch), resumes=True):  # turns of this process
            if sample is None:  # nothing has come yet, all was read as often as allowed, or nobody needs more
                continue
            representation, labels, learns = sample.representation, sample.labels, pace.learns
            for module, optimizer, tally in zip(stage.modules_here, optimizers, tallies, strict=True):
                tally.turns += 1
                if learns:
                    representation, loss, logits = learn(run, module, optimizer, representation, labels)
                    tally.learned(loss, logits, labels, age, sample.uses)
                else:
                    tally.frozen += 1
                    representation = forward_only(run, module, representation)
            pace.learned, pace.frozen = pace.learned + learns, pace.frozen + (not learns)
            if learns and pace.learned % len(images) == 0:
                for schedule in schedules:
                    schedule.step()
            stage.send(representation, labels)

        heads, arrivals = stage.heads, stage.inputs(test, totals=args.ensemble)
        if args.ensemble:
            heads = stage.ensembles(probabilities=False)
        with run.autocast():
            scores = [score.top1 for score in evaluate(heads, run.evaluation(arrivals))]
        ensembles = scores[len(tallies) :] or [float("nan")] * len(tallies)
        lines = []
        for n, (tally, score, ensemble) in enumerate(zip(tallies, scores, ensembles, strict=False), start=stage.first):
            line = logs.async_line(n, epoch, pace.own_epochs, tally.top1, score, ensemble)
            lines.append([line, tally.line(n, epoch)])
        lines[-1].append(f"# {stage.about}")
        for everyones in stage.mesh.to_first(lines):
            for line, *comments in everyones:
                run.report(line, *comments)


if __name__ == "__main__":
    flags.start(main)
