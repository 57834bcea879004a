"""The lines of a log that say how a run was made: command, versions, commit, device and precision."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from decoupled.errors import one_line


def environment(device, half):
    """The lines that say how and where a command runs: command, versions, commit, device and precision."""
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "numpy"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    precision = {"cuda": "fp16 mixed", "cpu": "bf16 mixed", "mps": "bf16 mixed"}[device.type] if half else "fp32"
    return [
        f"# command: {one_line(shlex.join(['python', *sys.argv]))}",
        f"# versions: python {platform.python_version()} {packages}",
        f"# commit: {commit()}",
        f"# device: {device.type} ({name}), {torch.get_num_threads()} threads, {precision}",
    ]


def commit():
    """The git commit of this package's repository, with "+" when files differ from it; "unknown" outside a checkout.
    Where the script that runs is from another repository, also that one's, and which is whose.
    """
    package, script = Path(__file__).resolve().parent, Path(sys.argv[0]).resolve().parent
    top = repository(script)
    if top is None or top == repository(package):
        return state(package)
    return f"{state(script)} (script, {one_line(str(top))}), {state(package)} (package, {one_line(str(package))})"


def git(folder, *words):
    """What git says in ``folder``; None where it says nothing."""
    try:
        command = ("git", "-C", str(folder), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def repository(folder):
    """The top folder of the repository that ``folder`` is in; None outside one."""
    top = git(folder, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def state(folder):
    """The commit of ``folder``'s repository, with "+" when files differ from it; "unknown" outside one."""
    head = git(folder, "rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(git(folder, "status", "--porcelain", "--untracked-files=no")) if head else "unknown"
