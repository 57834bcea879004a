"""Delayed recall: a recurrent network has to say the bit it read 8 steps ago,
learning from segments of 3 steps. Truncated back-propagation through time never
sees a bit and its recall in one segment; synthetic gradients (DNI; Jaderberg et
al. 2017, Sec. 3.1) bring what later segments want back to the earlier ones.

    python dni/delayed_recall.py --output results/dni/delayed_recall.csv

Every method learns from one stream of random bits a sample, until it has used
as many FLOPs as the others, synthesizers included:

  truncation        segments of 3 steps
  long truncation   segments of 24: 8 times the activations, 1/8 the updates
  DNI               segments of 3, synthetic gradients of the hidden state
  cDNI              DNI whose synthesizer's context is the bits still to be said

Each runs with each --lr and seed: 36 runs of about 9 s of one CPU core. The
share of bits said right (%, chance is 50) is counted as they come, each before
anything is learned from it. The context of cDNI is there in training only, as
labels are: the network that says the bits never sees it.
"""

import sys
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

import dni
from decoupled.networks.flops import count_flops
from decoupled.training import checkpoint as checkpoints
from decoupled.training import environment as provenance
from decoupled.training import flags


class Method(NamedTuple):
    segments: int = 1  # of the shortest, in one
    synthetic: bool = False
    context: bool = False


METHODS = {
    "truncation": Method(),
    "long truncation": Method(segments=8),
    "DNI": Method(synthetic=True),
    "cDNI": Method(synthetic=True, context=True),
}
POINTS = 25  # of a curve


def parse_args():
    parser = flags.Parser(__doc__)
    whole = flags.integer(1)
    parser.add_argument("--delay", type=whole, default=8, help="steps from a bit to its recall")
    parser.add_argument("--segment", type=whole, default=3, help="steps between updates")
    parser.add_argument("--hidden", type=whole, default=64, help="units of the GRU")
    parser.add_argument("--batch-size", type=whole, default=32, help="streams")
    parser.add_argument("--gflop", type=whole, default=40, help="a run's budget")
    parser.add_argument(
        "--lr",
        type=flags.number(above=0),
        nargs="+",
        default=[3e-4, 1e-3, 3e-3],
        help="of Adam (default: 3e-4 1e-3 3e-3)",
    )
    parser.add_argument("--seeds", type=flags.integer(0), nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument(
        "--output", type=flags.path, metavar="CSV", help="where to write the curves (default: standard output)"
    )
    return parser.parse_args()


def learn(method, lr, seed, args):
    """One run's curve: pairs of the GFLOP used so far and the bits said right since the point before, in %."""
    torch.manual_seed(seed)
    segment = args.segment * method.segments
    cell, readout = nn.GRUCell(1, args.hidden), nn.Linear(args.hidden, 1)
    parameters = [*cell.parameters(), *readout.parameters()]
    if method.synthetic:
        synthesizer = dni.BasicSynthesizer(args.hidden, n_hidden=1, context_dim=args.delay if method.context else None)
        interface = dni.BackwardInterface(synthesizer)
        parameters += interface.parameters()
    optimizer = Adam(parameters, lr=lr)

    def unroll(hidden):
        """(last hidden state, loss summed over the segment, bits said right) of this segment."""
        loss, right = 0, 0
        for read, wanted in zip(bits[:, args.delay :].unbind(1), bits[:, :segment].unbind(1), strict=True):
            hidden = cell(2 * read[:, None] - 1, hidden)
            logit = readout(hidden).squeeze(1)
            loss = loss + F.binary_cross_entropy_with_logits(logit, wanted, reduction="sum")
            right += ((logit > 0) == wanted).sum()
        return hidden, loss, right

    def to_say(start):
        """The context: the bits (B, delay) to be said from step ``start`` of the segment on."""
        return dni.synthesizer_context(2 * bits[:, start : start + args.delay] - 1 if method.context else None)

    def step(hidden):
        optimizer.zero_grad()
        with dni.defer_backward():
            hidden = hidden.detach()
            if method.synthetic:
                with to_say(0):
                    hidden = interface.make_trigger(hidden)
            hidden, loss, right = unroll(hidden)
            dni.backward(loss)
            if method.synthetic:
                with to_say(segment):
                    interface.backward(hidden)  # what the segments to come want of this one
        optimizer.step()
        return hidden, right

    stream = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(args.batch_size, args.hidden)
    # those read in the last `delay` steps, which are to be said, and those read in this segment
    bits = torch.randint(2, (args.batch_size, args.delay + segment), generator=stream).float()
    flops = count_flops(lambda: step(hidden))  # in passing also the first update
    every = max(1, round(args.gflop * 1e9 / flops / POINTS))  # updates between two points
    for point in range(1, POINTS + 1):
        total = 0
        for _ in range(every):
            new = torch.randint(2, (args.batch_size, segment), generator=stream).float()
            bits = torch.cat([bits[:, segment:], new], dim=1)
            hidden, right = step(hidden)
            total += right
        yield point * every * flops / 1e9, 100 * total.item() / (every * segment * args.batch_size)


def main():
    args = parse_args()
    setting = " ".join(f"{key} {getattr(args, key)}" for key in ("delay", "segment", "hidden", "batch_size", "gflop"))
    with checkpoints.writing(args.output), open(args.output, "w") if args.output else nullcontext(sys.stdout) as file:
        print(*provenance.environment(torch.device("cpu"), half=False), f"# {setting}", sep="\n", file=file)
        print("method,lr,seed,gflop,recalled", file=file)
        for name, method in METHODS.items():
            for lr in args.lr:
                for seed in args.seeds:
                    for gflop, recalled in learn(method, lr, seed, args):
                        print(f"{name},{lr:g},{seed},{gflop:.2f},{recalled:.2f}", file=file, flush=True)


if __name__ == "__main__":
    flags.start(main)
