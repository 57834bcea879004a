"""What a run shows while it goes on, where stderr is a terminal: its first lines, a bar for each epoch and evaluation,
and the time to its end. Elsewhere nothing of this; the lines of results, on stdout, are the same in both cases.
"""

import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque

from tqdm import tqdm

PATIENCE = 1.0  # seconds of reading images before that is said


TOLD = tuple(f"# {name}: " for name in ("device", "processes", "train", "test"))  # of the first lines of a log


LATEST = 5  # epochs by which the time to the end is judged


BAR = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}{postfix}"


EVALUATION = "{desc}: {percentage:3.0f}%|{bar}|"


COUNT = "{desc}: {n_fmt} mini-batches, {rate_fmt}{postfix}"  # where nobody knows how many there will be


class Terminal:
    """What one process shows on the terminal; with ``quiet``, nothing."""

    def __init__(self, quiet=False):
        self.quiet, self.bar = quiet, None
        self.epoch, self.later, self.heads = "", 0, ""  # the epoch's name, how many follow, what its heads have reached
        self.lasted = deque(maxlen=LATEST)  # seconds of each

    @property
    def shown(self):
        return not self.quiet and sys.stderr.isatty()

    def write(self, line):
        """Prints ``line`` on stdout, above a bar where there is one."""
        if not self.quiet:
            tqdm.write(line)

    def say(self, *lines):
        """Prints ``lines`` on stderr, above a bar where there is one."""
        for line in lines if self.shown else ():
            tqdm.write(line, file=sys.stderr)

    def start(self, header, log):
        """What a log's ``header`` says of the device and the images; where the ``log`` is."""
        self.say(*(line.removeprefix("# ") for line in header if line.startswith(TOLD)), f"log: {log}")

    @contextlib.contextmanager
    def reading(self):
        """Inside, images are read: says so where that takes more than a moment."""
        timer = threading.Timer(PATIENCE, self.say, ["reading images"])
        timer.daemon = True
        if self.shown:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # Epochs

    def begin_epoch(self, epoch, epochs, stage=1, stages=None):
        """``epoch`` of ``epochs`` begins or goes on; with ``stages``, that of ``stage``: each has as many."""
        self.epoch = (f"module {stage}/{stages}, " if stages else "") + f"epoch {epoch}/{epochs}"
        self.later, self.heads = ((stages or 1) - stage + 1) * epochs - epoch, ""

    def end_epoch(self, seconds):
        """The epoch is over, evaluation included, after ``seconds``."""
        self.lasted.append(seconds)
        self.say(f"{self.epoch}: {seconds:.1f} s" + (f", {self.left(1)}" if self.later else ""))

    def training(self, left, batches, done, size):
        """Iterates over what is ``left`` of an epoch of ``batches`` of ``size`` images, when ``done`` are gone."""
        if not self.shown:
            yield from left
            return
        total = len(batches) if hasattr(batches, "__len__") else None  # None: as many as it takes
        form = {"bar_format": COUNT, "unit": " mini-batches"}
        if total:
            form = {"bar_format": BAR, "unit": " images", "unit_scale": size}
        self.open(left, self.epoch, total, initial=done, **form)
        since = time.perf_counter()
        for number, batch in enumerate(self.bar, start=1):
            yield batch
            part = (done + number) / total if total else 0
            left = self.left(part, (time.perf_counter() - since) * total / number if total else None)
            self.bar.set_postfix_str(", ".join(filter(None, (left, self.heads))), refresh=False)

    def evaluation(self, batches):
        """``batches``, to be iterated over."""
        if not self.shown:
            return batches
        self.open(batches, f"{self.epoch}, evaluation", len(batches), bar_format=EVALUATION)
        return self.bar

    def open(self, batches, name, total, **form):
        self.bar = tqdm(batches, name, total, leave=False, dynamic_ncols=True, **form)

    def note(self, measured):
        """Shows from here on the running train top-1 of those of ``measured`` that have one; waits for the device."""
        if not self.shown:
            return
        found = []
        for meter in measured:
            with contextlib.suppress(AttributeError, ZeroDivisionError):  # ZeroDivisionError: has seen nothing yet
                found.append(f"{meter.top1:.1f}")
        self.heads = f"top-1 {' '.join(found)} %" if found else ""

    def left(self, part, epoch_seconds=None):
        """How long the run still takes after ``part`` of the epoch, by the latest epochs or, before there are any, by
        the ``epoch_seconds`` that this one seems to take; empty where that is unknown.
        """
        seconds = statistics.mean(self.lasted) if self.lasted else epoch_seconds
        return f"{tqdm.format_interval((self.later + 1 - part) * seconds)} left" if seconds else ""

    def close(self):
        """Takes away a bar that was left in its midst: what is said next has a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def stopped(self, what, checkpoint):
        """Says on stderr, terminal or not, ``what`` has stopped; in which ``checkpoint`` it is saved, None: in none."""
        self.close()
        if not self.quiet:
            saved = "nothing is saved with --debug 1"
            saved = saved if checkpoint is None else f"saved in {checkpoint}: --resume continues there"
            print(f"{what}, {saved}", file=sys.stderr)


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


class Unfailing:
    """A text stream that shows what it can: characters that its encoding lacks as escapes, and nothing more once it is
    closed, full, or nobody reads it.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: closed
            self.silence()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self):
        """Lets what is still buffered go nowhere, or Python would fail on it when it ends."""
        with contextlib.suppress(OSError, ValueError):
            number = self.stream.fileno()
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), number)


@contextlib.contextmanager
def unfailing_output():
    """Inside, print and the like write to stdout and stderr as long as that works, and never raise."""
    before = sys.stdout, sys.stderr
    for number in (0, 1, 2):  # closed ones would be the next files' numbers: C code would write its warnings there
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    sys.stdout, sys.stderr = (
        Unfailing(open(os.devnull, "w") if stream is None else stream)  # noqa: SIM115
        for stream in before
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def silent_libraries():
    """Inside, what C code writes to stderr goes nowhere: errors arrive as exceptions too, and in one line."""
    try:
        before = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
