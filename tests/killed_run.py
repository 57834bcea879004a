"""Runs a script in a process that is forked from this one and kills itself with SIGKILL at a chosen moment."""

import io
import os
import signal
import sys

import torch
from running import ROOT, load_script

from decoupled.training import checkpoint as checkpoints
from decoupled.training import run as runs
from decoupled.training.flags import start


class Countdown:
    """Kills this process when it is called for the ``count``-th time."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(tick):
    """In the middle of an epoch."""
    step = runs.Run.step

    def dying_step(self, *args, **options):
        step(self, *args, **options)
        tick()

    runs.Run.step = dying_step


def die_in_log(tick):
    """When half of what is appended to the log is written."""

    class HalfWritten(io.FileIO):
        def write(self, data):
            if tick.left > 1:
                tick()
                return super().write(data)
            super().write(bytes(data)[: len(data) // 2])
            tick()

    def half_open(path, mode="r", **options):
        if mode == "r+b":
            return HalfWritten(path, "r+")
        return open(path, mode, **options)

    checkpoints.open = half_open


def die_in_checkpoint(tick):
    """When half of a checkpoint is written."""
    save = torch.save

    def half_save(value, file):
        if tick.left > 1:
            save(value, file)
        else:
            buffer = io.BytesIO()
            save(value, buffer)
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
        tick()

    torch.save = half_save


def die_before_rename(tick):
    """When a checkpoint is whole, but not yet under its name."""
    replace = os.replace

    def dying_replace(source, target):
        tick()
        replace(source, target)

    os.replace = dying_replace


MOMENTS = {"step": die_after_step, "log": die_in_log, "write": die_in_checkpoint, "rename": die_before_rename}


def run_forked(script, words, prepare=lambda: None):
    """Runs the script in a forked process, after ``prepare()`` there; returns its exit status as subprocess does."""
    pid = os.fork()
    if pid == 0:
        code = 70  # of a traceback
        try:
            prepare()
            sys.argv = [str(ROOT / script), *map(str, words)]
            start(load_script(script).main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_killed(script, words, moment, count):
    """Runs the script until the ``count``-th time of the ``moment``, one of MOMENTS, and checks that it died there."""
    code = run_forked(script, words, lambda: MOMENTS[moment](Countdown(count)))
    assert code == -signal.SIGKILL, code
