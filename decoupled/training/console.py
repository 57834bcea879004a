"""What a run shows while it goes on: on a terminal its first lines, a bar for each epoch and evaluation, and the time
to its end; elsewhere its result lines only. And what it does on signals.
"""

import contextlib
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

READING_DELAY = 1.0  # seconds of reading images before the console says so
SHOWN_AT_START = tuple(f"# {name}: " for name in ("device", "processes", "train", "test"))  # of the log's first lines
PASSED_ON_WITHIN = 2.0  # seconds in which torchrun passes on a signal that this process has received, too
LATEST_EPOCHS = 5  # epochs that the time to the end is estimated from

EPOCH_BAR = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}{postfix}"
EVALUATION_BAR = "{desc}: {percentage:3.0f}%|{bar}|"
COUNTER = "{desc}: {n_fmt} mini-batches, {rate_fmt}{postfix}"  # for an epoch of unknown length


def is_first_process():
    """Whether this process is the one that prints: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") in ("", "0")


def warn(message):
    """Prints a warning on stderr, in one line."""
    if is_first_process():
        print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr, flush=True)


class Console:
    """What one process shows; nothing with ``quiet``."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.bar = None
        self.epoch = ""  # the epoch's name
        self.later_epochs = 0  # that follow it
        self.accuracies = ""  # running train top-1 of each head
        self.epoch_seconds = deque(maxlen=LATEST_EPOCHS)

    @property
    def on_terminal(self):
        return not self.quiet and sys.stderr.isatty()

    def write(self, line):
        """Prints ``line`` on stdout, above the bar if there is one."""
        if not self.quiet:
            tqdm.write(line)

    def show(self, *lines):
        """Prints ``lines`` on the terminal, above the bar if there is one."""
        if self.on_terminal:
            for line in lines:
                tqdm.write(line, file=sys.stderr)

    def start(self, header, log):
        """Shows what the log's ``header`` says of device and images, and the log's path."""
        for line in header:
            if line.startswith(SHOWN_AT_START):
                self.show(line.removeprefix("# "))
        self.show(f"log: {log}")

    @contextlib.contextmanager
    def reading(self):
        """While the block reads images: says so if that takes more than a moment."""
        timer = threading.Timer(READING_DELAY, self.show, ["reading images"])
        timer.daemon = True
        if self.on_terminal:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # Epochs

    def begin_epoch(self, epoch, epochs, module_index=0, num_modules=None):
        """Epoch ``epoch`` of ``epochs`` begins or continues. With ``num_modules``, each module has as many epochs, one
        module after the other.
        """
        self.epoch = f"epoch {epoch}/{epochs}"
        if num_modules:
            self.epoch = f"module {module_index + 1}/{num_modules}, {self.epoch}"
        later_modules = (num_modules or 1) - module_index - 1
        self.later_epochs = later_modules * epochs + epochs - epoch
        self.accuracies = ""

    def end_epoch(self, seconds):
        """The epoch is over, evaluation included, after ``seconds``."""
        self.epoch_seconds.append(seconds)
        line = f"{self.epoch}: {seconds:.1f} s"
        if self.later_epochs:
            line += f", {self.time_left(1)}"
        self.show(line)

    def training(self, rest, batches, done, batch_size):
        """Iterates over ``rest``, what is left of an epoch of ``batches`` after ``done`` mini-batches."""
        if not self.on_terminal:
            yield from rest
            return
        total = len(batches) if hasattr(batches, "__len__") else None
        if total:
            form = {"bar_format": EPOCH_BAR, "unit": " images", "unit_scale": batch_size}
        else:
            form = {"bar_format": COUNTER, "unit": " mini-batches"}
        self.open_bar(rest, self.epoch, total, initial=done, **form)
        begun = time.perf_counter()
        for number, batch in enumerate(self.bar, start=1):
            yield batch
            time_left = ""
            if total:
                estimate = (time.perf_counter() - begun) * total / number  # seconds of this epoch
                time_left = self.time_left((done + number) / total, estimate)
            postfix = ", ".join(text for text in (time_left, self.accuracies) if text)
            self.bar.set_postfix_str(postfix, refresh=False)

    def evaluation(self, batches):
        """``batches``, to be iterated over."""
        if not self.on_terminal:
            return batches
        self.open_bar(batches, f"{self.epoch}, evaluation", len(batches), bar_format=EVALUATION_BAR)
        return self.bar

    def open_bar(self, batches, name, total, **form):
        self.bar = tqdm(batches, name, total, leave=False, dynamic_ncols=True, **form)

    def show_accuracies(self, meters):
        """From here on, the bar shows the running train top-1 of ``meters``. Waits for the device."""
        if not self.on_terminal:
            return
        values = [meter.top1 for meter in meters if getattr(meter, "count", 0) and hasattr(meter, "top1")]
        values = [value for value in values if not math.isnan(value)]
        self.accuracies = f"top-1 {' '.join(f'{value:.1f}' for value in values)} %" if values else ""

    def time_left(self, part, estimate=None):
        """The time to the end of the run after ``part`` of this epoch, from the latest epochs; before any is over, from
        the ``estimate`` of this one's seconds. Empty if unknown.
        """
        seconds = statistics.mean(self.epoch_seconds) if self.epoch_seconds else estimate
        if not seconds:
            return ""
        return f"{tqdm.format_interval((self.later_epochs + 1 - part) * seconds)} left"

    def close(self):
        """Removes an unfinished bar, so that what is printed next has a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def stopped(self, what, checkpoint):
        """Says on stderr, terminal or not, ``what`` has stopped, and in which ``checkpoint`` it is saved, if any."""
        self.close()
        if self.quiet:
            return
        if checkpoint is None:
            print(f"{what}, nothing is saved with --debug 1", file=sys.stderr)
        else:
            print(f"{what}, saved in {checkpoint}: --resume continues there", file=sys.stderr)


class Signals:
    """Within the block, ``received`` is the number of the first SIGINT or SIGTERM, 0 before one. A second one ends the
    process at once, with exit code 128 + its number. Prints nothing with ``quiet``.

    A job queue may signal all processes, and torchrun passes its own signal on to those that it has started: under
    torchrun, what comes right after the first one is the same signal again.

    Before and after the block the first one ends the process.
    """

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.received = 0
        self.received_at = 0.0
        self.handlers_before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if self.received:
            under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
            if under_torchrun and time.monotonic() - self.received_at < PASSED_ON_WITHIN:
                return
            os._exit(128 + number)
        self.received = number
        self.received_at = time.monotonic()
        if not self.quiet:
            name = signal.Signals(number).name
            print(
                f"\n{name}: finishing this mini-batch, then saving; a second signal ends the run at once",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


class IgnoreBrokenPipe:
    """A text ``stream`` that goes on after its reader is gone, as after ``| head``: the rest goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.redirect_to_nowhere()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.redirect_to_nowhere()

    def redirect_to_nowhere(self):
        """What the stream still buffers would otherwise fail when Python ends and flushes it."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def broken_pipes_ignored():
    """Within the block, a reader of stdout or stderr that goes away does not end the process."""
    stdout = sys.stdout
    stderr = sys.stderr
    if stdout is not None:  # None: closed, and print does nothing
        sys.stdout = IgnoreBrokenPipe(stdout)
    if stderr is not None:
        sys.stderr = IgnoreBrokenPipe(stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout = stdout
        sys.stderr = stderr


@contextlib.contextmanager
def silent_libraries():
    """Until decoupled.parallel.processes does without it: within the block, what C code writes to stderr is dropped."""
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
