"""Prints a benchmark's result, and writes it to the file that --output names."""

from pathlib import Path

from decoupled.errors import writing

WAY_OUT = "name a file that can be written"


def check_output(path):
    """Raises InputError, before the work, if ``path`` cannot be written. None means no file."""
    if path:
        with writing(path, WAY_OUT):
            Path(path).open("a").close()


def publish(text, path):
    """Prints ``text``, and writes it to ``path`` unless that is None."""
    print(text, end="")
    if path:
        with writing(path, WAY_OUT):
            Path(path).write_text(text)
