"""What a run prints, and how it reacts to signals. On a terminal it shows its first lines, a progress bar for each
epoch and evaluation, and the time left; elsewhere it prints result lines only.
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

READING_DELAY = 1.0  # seconds after which a slow reading of images is announced
SHOWN_AT_START = ("# device: ", "# processes: ", "# train: ", "# test: ")  # lines of the log to show
PASSED_ON_WITHIN = 2.0  # seconds within which torchrun may repeat a signal that this process has already received
LATEST_EPOCHS = 5  # number of epochs from which the time left is estimated

EPOCH_BAR = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}{postfix}"
EVALUATION_BAR = "{desc}: {percentage:3.0f}%|{bar}|"
COUNTER = "{desc}: {n_fmt} mini-batches, {rate_fmt}{postfix}"  # for epochs of unknown length


def is_first_process():
    """Whether this process is the one that prints: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") in ("", "0")


def warn(message):
    """Prints a one-line warning on stderr."""
    if is_first_process():
        print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr, flush=True)


class Console:
    """The output of one process; nothing with ``quiet``."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.bar = None
        self.epoch_name = ""
        self.epochs_to_follow = 0  # after the current epoch
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
        """Shows the lines of the log's ``header`` about device, processes and images, and the log's path."""
        for line in header:
            if line.startswith(SHOWN_AT_START):
                self.show(line.removeprefix("# "))
        self.show(f"log: {log}")

    @contextlib.contextmanager
    def reading(self):
        """Says so if reading images inside the block takes longer than READING_DELAY."""
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
        """Epoch ``epoch`` of ``epochs`` begins or continues. With ``num_modules``, modules are trained one after the
        other, and it is an epoch of module ``module_index``.
        """
        self.epoch_name = f"epoch {epoch}/{epochs}"
        if num_modules:
            self.epoch_name = f"module {module_index + 1}/{num_modules}, {self.epoch_name}"
        later_modules = (num_modules or 1) - module_index - 1
        self.epochs_to_follow = later_modules * epochs + epochs - epoch
        self.accuracies = ""

    def end_epoch(self, seconds):
        """The epoch, including its evaluation, has ended after ``seconds``."""
        self.epoch_seconds.append(seconds)
        line = f"{self.epoch_name}: {seconds:.1f} s"
        if self.epochs_to_follow:
            line += f", {self.time_left(1)}"
        self.show(line)

    def training(self, rest, batches, done, batch_size):
        """Iterates over ``rest``, the mini-batches of ``batches`` after the first ``done``, with a progress bar."""
        if not self.on_terminal:
            yield from rest
            return
        total = len(batches) if hasattr(batches, "__len__") else None
        if total:
            style = {"bar_format": EPOCH_BAR, "unit": " images", "unit_scale": batch_size}
        else:
            style = {"bar_format": COUNTER, "unit": " mini-batches"}
        self.open_bar(rest, self.epoch_name, total, initial=done, **style)
        started = time.perf_counter()
        for number, batch in enumerate(self.bar, start=1):
            yield batch
            time_left = ""
            if total:
                estimate = (time.perf_counter() - started) * total / number  # seconds of this epoch
                time_left = self.time_left((done + number) / total, estimate)
            postfix = ", ".join(text for text in (time_left, self.accuracies) if text)
            self.bar.set_postfix_str(postfix, refresh=False)

    def evaluation(self, batches):
        """Returns an iterable over ``batches`` with a progress bar."""
        if not self.on_terminal:
            return batches
        self.open_bar(batches, f"{self.epoch_name}, evaluation", len(batches), bar_format=EVALUATION_BAR)
        return self.bar

    def open_bar(self, batches, name, total, **style):
        self.bar = tqdm(batches, name, total, leave=False, dynamic_ncols=True, **style)

    def show_accuracies(self, meters):
        """Makes the bar show the running train top-1 of ``meters``. Waits for the device."""
        if not self.on_terminal:
            return
        values = [meter.top1 for meter in meters if getattr(meter, "count", 0) and hasattr(meter, "top1")]
        values = [value for value in values if not math.isnan(value)]
        self.accuracies = f"top-1 {' '.join(f'{value:.1f}' for value in values)} %" if values else ""

    def time_left(self, fraction, estimate=None):
        """The text for the time left after a ``fraction`` of this epoch; empty if unknown. An epoch is assumed to take
        as long as the latest ones on average or, in the first epoch, ``estimate`` seconds.
        """
        seconds = statistics.mean(self.epoch_seconds) if self.epoch_seconds else estimate
        if not seconds:
            return ""
        return f"{tqdm.format_interval((self.epochs_to_follow + 1 - fraction) * seconds)} left"

    def close(self):
        """Removes an unfinished bar, so that the next output starts on a new line."""
        if self.bar is not None:
            self.bar.close()

    def stopped(self, message, checkpoint):
        """Prints ``message`` and where the run is saved on stderr, terminal or not. ``checkpoint`` is None if it is not
        saved.
        """
        self.close()
        if self.quiet:
            return
        if checkpoint is None:
            print(f"{message}, nothing is saved with --debug 1", file=sys.stderr)
        else:
            print(f"{message}, saved in {checkpoint}: --resume continues there", file=sys.stderr)


class Signals:
    """Inside the block, the first SIGINT or SIGTERM does not end the process. ``received`` is its number, 0 before. A
    second signal ends the process at once, with exit code 128 + its number. Prints nothing with ``quiet``.

    A job queue may signal all processes, and torchrun passes its own signal on to its workers: under torchrun, a signal
    right after the first one is the same signal.
    """

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.received = 0
        self.received_at = 0.0
        self.handlers_before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers_before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
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
    """A text ``stream`` that discards all further output once its reader is gone, as after ``| head``."""

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
        """Discards buffered output as well: Python flushes it at exit, which would fail again."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def broken_pipes_ignored():
    """Lets the process continue, inside the block, after the reader of its stdout or stderr is gone."""
    stdout = sys.stdout
    stderr = sys.stderr
    if stdout is not None:  # None if it is closed: print then does nothing
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
