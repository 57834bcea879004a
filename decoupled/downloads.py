"""Fetching a data set: into a folder of its own, and from there, when it is whole, to where it is wanted."""

import contextlib
import os
import shutil

from filelock import FileLock

from decoupled import InputError

WITHOUT_DOWNLOAD = "--dataset digits needs no download"


def download(dataset, data_dir, fetch, there, otherwise):
    """Has ``fetch(folder)`` put the files of ``dataset`` into an empty folder in ``data_dir``, and moves them up.

    One process fetches at a time; those that wait use what it got, which ``there()`` sees. Nothing else in ``data_dir``
    is touched. Raises InputError, naming what would do as well (``otherwise``), where the set cannot be had.
    """
    if not data_dir.is_dir() and str(data_dir) != "data":
        raise InputError(
            f"--data-dir {data_dir} is no folder: create it to download {dataset} there, or name the one that holds it"
        )
    created = not data_dir.exists()
    own, lock = data_dir / f".download-{dataset}", data_dir / f".download-{dataset}.lock"
    try:
        data_dir.mkdir(exist_ok=True)
        with FileLock(lock):
            try:
                if not there():
                    shutil.rmtree(own, ignore_errors=True)  # of a download that was killed
                    own.mkdir()
                    fetch(own)
                    move_up(own, data_dir)
            finally:
                shutil.rmtree(own, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # whatever a server, a proxy or an archive leads to
        reason = (str(getattr(error, "reason", error)).strip().splitlines() or [type(error).__name__])[0].rstrip(":")
        raise InputError(
            f"{dataset} is not in {data_dir} and cannot be downloaded ({reason}): put it there as {otherwise}; "
            f"{WITHOUT_DOWNLOAD}"
        ) from error
    finally:
        if created:
            with contextlib.suppress(OSError):
                data_dir.rmdir()


def move_up(own, data_dir):
    """Moves every file in the folder ``own`` to its place in ``data_dir``."""
    for path in sorted(own.rglob("*")):
        target = data_dir / path.relative_to(own)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
