"""Asynchronous Decoupled Greedy Learning with replay, in real time: Algorithm 2 of
the paper's Sec. 5.6. Each process has one module or several consecutive ones.

    torchrun --nproc-per-node 6 async_buffer/cifar_buffer_distributed.py \\
        --buffer 30 --slow 3:1.5

Each process learns at its own pace. Mini-batches that arrive from the process
below go into a replay buffer. The process learns from the buffer, several times
from the same mini-batches if the process below is slow: no process waits for
another. --slow slows a process down, and --turn makes all others equally fast:
together they measure in real time what cifar_buffer.py simulates for Fig. 5.

All processes meet to evaluate, when the slowest has finished an epoch, and when
the run is saved or stopped. By then, everything that was sent is in the buffers,
and a resumed run continues from there. What a process learns from depends on
which process was faster, so no two runs are equal.
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


def rank_and_factor(text):
    """An argparse type: "3:1.5" → (3, 1.5)."""
    rank, _, factor = text.partition(":")
    try:
        return integer(0)(rank), number(least=1)(factor)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} must be RANK:FACTOR, such as 3:1.5, with a factor ≥ 1") from None


def parse_args(argv=None):
    parser = async_flags.parser(__doc__)
    group = flags.add_processes(parser, "several processes: torchrun --nproc-per-node K")
    group.add_argument(
        "--modules-per-stage",
        type=flags.integers,
        metavar="N,N,…",
        help="number of modules of each process, lowest first (default: balanced by FLOPs)",
    )
    group.add_argument(
        "--turn",
        type=number(least=0),
        default=0.0,
        metavar="MS",
        help="make each turn take at least MS milliseconds, so that all processes are equally fast",
    )
    group.add_argument(
        "--slow",
        type=rank_and_factor,
        metavar="RANK:FACTOR",
        help="make each turn of process RANK take FACTOR times as long",
    )
    group = parser.add_argument_group("replay")
    group.add_argument(
        "--buffer",
        type=integer(1),
        default=30,
        metavar="M",
        help="mini-batches in the buffer of each process",
    )
    async_flags.add_buffers(group)
    args = parser.parse_args(argv)
    async_flags.check_network(parser, args)
    return args


def make_buffer(args, run, stage):
    """The replay buffer of this process; None in the lowest process."""
    if stage.lowest:
        return None
    options = async_flags.buffer_options(args, run.device)
    options |= {"dtype": stage.input_format.dtype}
    (buffer,), _ = make_buffers(args.buffer, args.batch_size, [stage.input_format.shape], **options)
    return buffer


def buffers_by_module(stage, buffer, device):
    """The buffers that a checkpoint saves for the modules of this process: ``buffer`` for the lowest. The others learn
    from the module below in the same turn, as in Algorithm 1, and need none, so theirs is an empty HandOver.
    """
    buffers = [HandOver(device) for _ in stage.modules_here]
    if buffer is not None:
        buffers[0] = buffer
    return buffers


def slow_down(args, rank):
    """The factor by which --slow slows down process ``rank``."""
    if args.slow is None:
        return 1.0
    slow_rank, factor = args.slow
    return factor if rank == slow_rank else 1.0


def forward_only(run, modules, representation):
    """The representation (B, C, s, s) that ``modules`` compute after their last epoch. Batch norm statistics are
    fixed.
    """
    with run.autocast(), torch.no_grad():
        for module in modules:
            representation = module.eval().body(representation)
    return representation


def main():
    args = parse_args()
    run = Run(args, distributed=True, free_on_resume=("slow", "turn"))
    size = run.processes.size
    if size == 1:
        raise InputError(
            "asynchronous learning needs at least 2 processes: start it with torchrun --nproc-per-node 2 …"
        )
    if args.slow and args.slow[0] >= size:
        raise InputError(f"--slow {args.slow[0]}:{args.slow[1]:g}: the processes are 0 to {size - 1}")
    train, test, classes = run.data(drop_last=True)
    stage = run.distribute(build(args, classes), kind=ReplayStage)  # the modules that this process trains
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        for module in stage.modules_here
    ]
    # Steps in these modules' own epochs
    schedules = [StepLR(optimizer, step_size=args.epochdecay, gamma=0.2) for optimizer in optimizers]
    pace = Pace(stage.modules_per_stage, len(train), args.epochs)
    stream = ImageStream(train) if stage.lowest else train  # above the lowest process, train is an Outline
    buffer = make_buffer(args, run, stage)
    factor = slow_down(args, run.processes.rank)
    stage.connect(pace, stream, buffer, args.batch_size, min_seconds=args.turn / 1000, slow_down=factor)
    tallies = [Tally() for _ in stage.modules_here]

    # An epoch of the log ends when the slowest process has finished its own epoch.
    for epoch in run.epochs(
        net=stage,
        optimizers=optimizers,
        schedules=schedules,
        train=stream,
        test=test,
        pace=[pace for _ in stage.modules_here],  # a checkpoint has one entry for each module
        tallies=tallies,
        buffers=buffers_by_module(stage, buffer, run.device),
    ):
        stage.train()
        for _ in run.progress(stage.turns(epoch), resumes=True):  # one turn of this process
            sample, staleness = stage.read()  # the next images in the lowest process, elsewhere from the replay buffer
            if sample is None:  # nothing to do: not counted as a turn, but the time counts in stage.idle_seconds
                continue
            representation = sample.representation
            labels = sample.labels
            if pace.learns:
                for module, optimizer, tally in zip(stage.modules_here, optimizers, tallies, strict=True):
                    with run.autocast():
                        representation, logits = module(representation)  # (B, C, s, s), (B, classes)
                    loss = F.cross_entropy(logits.float(), labels)
                    run.step(loss, optimizer)  # zero_grad, backward, step
                    representation = representation.detach()  # the module above sends no gradient back
                    tally.turns += 1
                    tally.add(loss, logits, labels, staleness, sample.uses)
                pace.learned += 1
                if pace.learned % pace.length == 0:  # an epoch of these modules has ended
                    for schedule in schedules:
                        schedule.step()
            else:
                representation = forward_only(run, stage.modules_here, representation)
                for tally in tallies:
                    tally.turns += 1
                    tally.frozen += 1
                pace.frozen += 1
            stage.end_turn(representation, labels)  # into the replay buffer of the process above

        heads = stage.ensembles(probabilities=False) if args.ensemble else stage.heads
        with run.autocast():
            scores = evaluate(heads, run.evaluation(stage.inputs(test, with_ensemble_sum=args.ensemble)))
        log(run, stage, epoch, tallies, pace, [score.top1 for score in scores])


def log(run, stage, epoch, tallies, pace, scores):
    """Logs the modules of all processes. ``scores``: test top-1 of this process's heads, then of their ensembles."""
    count = len(tallies)
    ensembles = scores[count:] or [float("nan")] * count
    entries = []  # (line, comments) of each module here
    for index, tally in enumerate(tallies):
        n = stage.first_module + index
        line = logs.async_line(n, epoch, pace.own_epochs, tally.top1, scores[index], ensembles[index])
        entries.append((line, [tally.line(n, epoch)]))
    _, last_comments = entries[-1]
    last_comments.append(f"# {stage.epoch_summary}")
    for entries_of_process in run.mesh.to_first(entries):
        for line, comments in entries_of_process:
            run.report(line, *comments)


if __name__ == "__main__":
    flags.start(main)
