"""Runs a script's main in a process that kills itself with SIGKILL at a chosen moment. Not a test: tests/test_runs.py
starts it.

    python tests/killed_run.py MOMENT COUNT SCRIPT [flags …]

MOMENT: "step" (mid-epoch), "log" (half a line is written), "write" (half a checkpoint is written), "replace" (it is
whole, but not renamed) or "renamed" (just after). It dies when that happens for the COUNT-th time.
"""

import io
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from running import ROOT, load_script, small

from decoupled.training import checkpoint as checkpoints
from decoupled.training import run as runs
from decoupled.training.flags import start

moment, count, script, *words = sys.argv[1:]
left = int(count)


def die_in_the_end():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten(io.FileIO):
    """A file that takes half of what is written, then perhaps kills the process."""

    def write(self, data):
        if left > 1:
            die_in_the_end()
            return super().write(data)
        super().write(bytes(data)[: len(data) // 2])
        die_in_the_end()


def half_open(path, mode="r", **options):
    if moment == "log" and mode == "r+b":
        return HalfWritten(path, mode.replace("b", ""))
    return open(path, mode, **options)


real_step, real_replace, real_save = runs.Run.step, os.replace, torch.save


def step(self, loss, optimizer):
    real_step(self, loss, optimizer)
    die_in_the_end()


def replace(source, target):
    if moment == "replace":
        die_in_the_end()
    real_replace(source, target)
    if moment == "renamed":
        die_in_the_end()


def save(value, file):
    """torch.save, whose file takes half of it when its time has come."""
    if left == 1:
        buffer = io.BytesIO()
        real_save(value, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
    else:
        real_save(value, file)
    die_in_the_end()


if moment == "write":
    torch.save = save
checkpoints.open = half_open
if moment == "step":
    runs.Run.step = step
os.replace = replace
sys.argv = [str(ROOT / script), *words]
module = load_script(script)
module.layerwise_cnn = small()
start(module.main)
