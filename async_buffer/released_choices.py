"""Counts how two choices of the released code change what modules learn from in
asynchronous learning; cifar_buffer.py does not share them.

    python async_buffer/released_choices.py

Simulates turns and replay buffers, without networks, of
cifar_buffer.py --noise 0.1 --layer_noise 3 --seed 0 with several --buffer: six
modules, 50 epochs of 390 mini-batches.

The released tie-break: of the mini-batches with the fewest uses, the newest is
read, except that the oldest is read if its slot is the next to be overwritten.
The released warm-up is repeated at each drop of a module's learning rate.
"""

import torch
from replay_buffer import ReplayBuffer
from turns import WARM_UP, Turns

from decoupled.training import flags
from decoupled.training.environment import commit

MODULES = 6
LENGTH = 390  # mini-batches per epoch
EPOCHS = 50
EPOCHS_PER_DROP = 15  # of the learning rate
WEIGHTS = [1, 1, 1, 0.9, 1, 1]  # module 3 is slow


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--buffers", type=flags.integer(1), nargs="+", default=(1, 2, 5, 10, 30), metavar="M", help="values of --buffer"
    )
    return parser.parse_args()


class CountingBuffer(ReplayBuffer):
    """A ReplayBuffer of empty mini-batches. It counts its reads, and those in which the released tie-break returns
    another mini-batch than the newest one.
    """

    def __init__(self, capacity, released):
        super().__init__(capacity, batch_size=0, shape=(0, 0, 0))
        self.released = released
        self.reads = 0
        self.not_newest = 0

    def choose(self):
        newest = super().choose()
        chosen = newest
        next_written = self.slots[self.writes % self.capacity]
        if self.released and self.writes >= self.capacity and next_written.uses == newest.uses:
            chosen = next_written
        self.reads += 1
        self.not_newest += chosen is not newest
        return chosen


class RepeatingTurns(Turns):
    """Turns with the released warm-up."""

    warm_ups = 0  # repeated ones
    remaining = ()  # turns of the current one

    def repeat_warm_up(self):
        self.warm_ups += 1
        self.remaining = [module for module in range(self.modules) for _ in range(WARM_UP)]

    def draw(self):
        if self.remaining:
            self.taken += 1
            return self.remaining.pop(0)
        return super().draw()


def simulate(capacity, released_tie_break=False, released_warm_up=False):
    """Returns the turns, the buffers, and the mean staleness of what modules learn from, in steps."""
    turns = RepeatingTurns(MODULES, LENGTH, EPOCHS, weights=WEIGHTS)
    buffers = [CountingBuffer(capacity, released_tie_break) for _ in range(MODULES - 1)]
    nothing = torch.empty(0, 0, 0, 0)
    staleness = []
    for n in turns.until(EPOCHS):
        if not turns.learns(n) and not turns.feeds(n):
            continue
        step = buffers[n - 1].read().step if n > 0 else None
        if turns.learns(n):
            if n > 0:
                staleness.append(turns.learned[n - 1] - step)
            turns.learned[n] += 1
            if released_warm_up and turns.learned[n] % (EPOCHS_PER_DROP * LENGTH) == 0:
                turns.repeat_warm_up()
        if n + 1 < MODULES:
            buffers[n].write(nothing, torch.empty(0, dtype=torch.int64), turns.learned[n])
    return turns, buffers, sum(staleness) / len(staleness)


def main():
    args = parse_args()
    print(f"# python async_buffer/released_choices.py, commit {commit()}")
    for capacity in args.buffers:
        _, buffers, released = simulate(capacity, released_tie_break=True)
        _, _, ours = simulate(capacity)
        reads = sum(buffer.reads for buffer in buffers)
        percent = 100 * sum(buffer.not_newest for buffer in buffers) / reads
        print(
            f"--buffer {capacity}: {reads} reads, of which {percent:.1f} % do not return the newest with the released "
            f"tie-break; mean staleness {released:.2f} steps, ours {ours:.2f}"
        )
    capacity = args.buffers[-1]
    turns, _, released = simulate(capacity, released_warm_up=True)
    print(
        f"--buffer {capacity}: the released warm-up is repeated {turns.warm_ups} times, "
        f"{turns.warm_ups * WARM_UP * MODULES} of {turns.taken} turns; mean staleness {released:.2f} steps"
    )


if __name__ == "__main__":
    flags.start(main)
