"""The lines of a log that say how a run was made: command, versions, commit, device and precision."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch


def environment(device, half):
    """The lines that say how and where a command runs: command, versions, commit, device and precision."""
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "numpy"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    precision = {"cuda": "fp16 mixed", "cpu": "bf16 mixed", "mps": "bf16 mixed"}[device.type] if half else "fp32"
    return [
        f"# command: {shlex.join(['python', *sys.argv])}",
        f"# versions: python {platform.python_version()} {packages}",
        f"# commit: {commit()}",
        f"# device: {device.type} ({name}), {torch.get_num_threads()} threads, {precision}",
    ]


def commit():
    """The repository's git commit, with "+" when files differ from it; "unknown" outside a checkout."""

    def git(*words):
        where = ("git", "-C", Path(__file__).parent)
        return subprocess.run((*where, *words), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
