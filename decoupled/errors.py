"""What ends a script in one line: InputError, and failures to write a file."""

import contextlib


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line that names it and says how to fix it; scripts
    exit with code 2.
    """


def one_line(text):
    """``text`` with line breaks, and whatever else cannot be printed, as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@contextlib.contextmanager
def writing(path, way_out="make room or access there, then --resume"):
    """Turns a failure to write ``path`` into an InputError; ``way_out`` says how to fix it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): {way_out}") from error
