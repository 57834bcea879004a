"""Errors that end a script with a one-line message: bad input, and files that cannot be written."""

import contextlib

EXIT_BAD_INPUT = 2


class InputError(Exception):
    """The user's input cannot be used. The message is one line that names the problem and the fix.

    Scripts print it and exit with EXIT_BAD_INPUT.
    """


def one_line(text):
    """``text`` with line breaks and other unprintable characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error, most=150):
    """The first line of an exception's message, cut after ``most`` characters, or the exception's type if the message
    is empty.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:most]


def last_line(error):
    """The last line of an exception's message."""
    return str(error).strip().split("\n")[-1].strip()


@contextlib.contextmanager
def writing(path, fix="free some space or get write access there, then --resume"):
    """Turns an OSError inside the block into an InputError: ``path`` cannot be written. ``fix`` tells the user what to
    do.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): {fix}") from error
