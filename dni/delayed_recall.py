"""Delayed recall: a recurrent network has to recall the bit it read 8 steps
ago, learning from segments of 3 steps. Truncated back-propagation through time
never sees a bit and its recall in one segment; synthetic gradients (DNI;
Jaderberg et al. 2017, Sec. 3.1) tell earlier segments what later ones need.

    python dni/delayed_recall.py --output results/dni/delayed_recall.csv

Every method learns from one stream of random bits per sample, until it has used
as many FLOPs as the others, including synthesizers:

  truncation        segments of 3 steps
  long truncation   segments of 24: 8 times the activations, 1/8 the updates
  DNI               segments of 3, synthetic gradients of the hidden state
  cDNI              DNI; the synthesizer's context is the bits still to be recalled

Each runs with each --lr and seed: 36 runs of about 9 s on one CPU core. The
share of bits recalled (%, chance is 50) is counted before anything is learned
from them. Like labels, cDNI's context is available in training only: the
network that recalls the bits never sees it.
"""

import sys
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

import dni
from decoupled.errors import writing
from decoupled.networks.flops import count_flops
from decoupled.training import flags
from decoupled.training.environment import environment


class Method(NamedTuple):
    segment_factor: int = 1  # its segments are this many times as long as --segment
    synthetic: bool = False  # synthetic gradients at the end of a segment
    context: bool = False  # the synthesizer sees the bits still to be recalled


METHODS = {
    "truncation": Method(),
    "long truncation": Method(segment_factor=8),
    "DNI": Method(synthetic=True),
    "cDNI": Method(synthetic=True, context=True),
}
POINTS = 25  # of a curve


def parse_args():
    parser = flags.Parser(__doc__)
    positive = flags.integer(1)
    parser.add_argument("--delay", type=positive, default=8, help="steps between reading a bit and recalling it")
    parser.add_argument(
        "--segment", type=positive, default=3, help="steps per segment, after which the weights are updated"
    )
    parser.add_argument("--hidden", type=positive, default=64, help="units of the GRU")
    parser.add_argument("--batch-size", type=positive, default=32, help="number of streams of bits")
    parser.add_argument("--gflop", type=positive, default=40, help="GFLOP per run")
    parser.add_argument(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help="methods to run (default: all)",
    )
    parser.add_argument(
        "--lr",
        type=flags.number(above=0),
        nargs="+",
        default=[3e-4, 1e-3, 3e-3],
        help="learning rates of Adam (default: 3e-4 1e-3 3e-3)",
    )
    parser.add_argument(
        "--seeds", type=flags.integer(0), nargs="+", default=[1, 2, 3], help="random seeds (default: 1 2 3)"
    )
    parser.add_argument(
        "--output", type=flags.path, metavar="CSV", help="where to write the curves (default: standard output)"
    )
    return parser.parse_args()


class RecurrentNetwork(nn.Module):
    """A GRU that reads one bit per step, and a linear layer that recalls one."""

    def __init__(self, hidden):
        super().__init__()
        self.cell = nn.GRUCell(1, hidden)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, hidden, read, wanted):
        """Unrolls a segment: hidden state (B, H), bits to read and bits to recall (B, steps) → last hidden state, loss
        summed over the segment, number of bits recalled.
        """
        loss = 0
        recalled = 0
        for bit, target in zip(read.unbind(1), wanted.unbind(1), strict=True):
            hidden = self.cell(2 * bit[:, None] - 1, hidden)
            logit = self.readout(hidden).squeeze(1)
            loss = loss + F.binary_cross_entropy_with_logits(logit, target, reduction="sum")
            recalled += ((logit > 0) == target).sum()
        return hidden, loss, recalled


def learn(method, lr, seed, args):
    """Yields the curve of one run: pairs of the GFLOP used so far and the % of bits recalled since the previous
    point.
    """
    torch.manual_seed(seed)
    segment = args.segment * method.segment_factor
    network = RecurrentNetwork(args.hidden)
    parameters = [*network.parameters()]
    if method.synthetic:
        synthesizer = dni.BasicSynthesizer(args.hidden, n_hidden=1, context_dim=args.delay if method.context else None)
        interface = dni.BackwardInterface(synthesizer)
        parameters += interface.parameters()
    optimizer = Adam(parameters, lr=lr)

    def context(bits, start):
        """Shows the synthesizer the bits (B, delay) that are to be recalled from step ``start`` of the segment on."""
        wanted = bits[:, start : start + args.delay]
        return dni.synthesizer_context(2 * wanted - 1 if method.context else None)

    def step(hidden, bits):
        """Learns from a segment. ``bits`` (B, delay + segment): the last ``segment`` of them are read, the first
        ``segment`` recalled.
        """
        optimizer.zero_grad()
        with dni.defer_backward():
            hidden = hidden.detach()
            if method.synthetic:
                with context(bits, 0):
                    hidden = interface.make_trigger(hidden)
            hidden, loss, recalled = network(hidden, read=bits[:, args.delay :], wanted=bits[:, :segment])
            dni.backward(loss)
            if method.synthetic:
                with context(bits, segment):
                    interface.backward(hidden)  # what later segments need from this one
        optimizer.step()
        return hidden, recalled

    stream = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(args.batch_size, args.hidden)
    # The bits read in the last `delay` steps, which are still to be recalled, then those to be read in this segment
    bits = torch.randint(2, (args.batch_size, args.delay + segment), generator=stream).float()
    flops = count_flops(lambda: step(hidden, bits))  # includes the first update
    updates = max(1, round(args.gflop * 1e9 / flops / POINTS))  # between two points
    for point in range(1, POINTS + 1):
        total_recalled = 0
        for _ in range(updates):
            new_bits = torch.randint(2, (args.batch_size, segment), generator=stream).float()
            bits = torch.cat([bits[:, segment:], new_bits], dim=1)
            hidden, recalled = step(hidden, bits)
            total_recalled += recalled
        gflop = point * updates * flops / 1e9
        yield gflop, 100 * total_recalled.item() / (updates * segment * args.batch_size)


def write_curves(args, file):
    settings = [f"{name} {getattr(args, name)}" for name in ("delay", "segment", "hidden", "batch_size", "gflop")]
    print(*environment(torch.device("cpu"), half=False), f"# {' '.join(settings)}", sep="\n", file=file)
    print("method,lr,seed,gflop,recalled", file=file)
    for name in args.methods:
        for lr in args.lr:
            for seed in args.seeds:
                for gflop, recalled in learn(METHODS[name], lr, seed, args):
                    print(f"{name},{lr:g},{seed},{gflop:.2f},{recalled:.2f}", file=file, flush=True)


def main():
    args = parse_args()
    if args.output is None:
        write_curves(args, sys.stdout)
    else:
        with writing(args.output), open(args.output, "w") as file:
            write_curves(args, file)


if __name__ == "__main__":
    flags.start(main)
