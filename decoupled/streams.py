"""What is printed: stdout and stderr that cannot be written to end no run, for the log is what counts."""

import contextlib
import os
import sys


def one_line(text):
    """``text`` with line breaks, and whatever else cannot be printed, as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


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
