"""What the benchmarks with --output print, they write there as well."""

from pathlib import Path

from decoupled.errors import writing

WAY_OUT = "name a file that can"


def check_output(path):
    """Raises InputError where ``path`` cannot be written: before the work. None is no file."""
    if path:
        with writing(path, WAY_OUT):
            Path(path).open("a").close()


def publish(text, path):
    """Prints ``text``, and writes it to ``path`` unless that is None."""
    print(text, end="")
    if path:
        with writing(path, WAY_OUT):
            Path(path).write_text(text)
