"""Prints a benchmark's result, and writes it to the file that --output names."""

from pathlib import Path

from decoupled.errors import writing

FIX = "name a writable file"


def check_output(path):
    """Raises InputError if ``path`` cannot be written: call this before the work. None means no file."""
    if path:
        with writing(path, FIX):
            Path(path).open("a").close()


def publish(text, path):
    """Prints ``text`` and, unless ``path`` is None, writes it there."""
    print(text, end="")
    if path:
        with writing(path, FIX):
            Path(path).write_text(text)
