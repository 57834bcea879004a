"""SIGINT and SIGTERM as a request: the first is noted, for whoever asks between two mini-batches."""

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Inside ``with``, ``received`` is the number of the first signal, 0 before; a second one ends the process at once,
    with exit code 128 + its number. ``quiet``: without a word.
    """

    def __init__(self, quiet=False):
        self.quiet, self.received, self.before = quiet, 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # the only one that may
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = number
        if not self.quiet:
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this batch, then saving; again: ending at once", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
