"""How and where a run was made, for the first lines of its log."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from decoupled.errors import one_line


def environment(device, half):
    """The first lines of a log: command, versions, commit, device and precision."""
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "numpy"))
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return [
        f"# command: {one_line(shlex.join(['python', *sys.argv]))}",
        f"# versions: python {platform.python_version()} {packages}",
        f"# commit: {commit()}",
        f"# device: {device.type} ({device_name}), {torch.get_num_threads()} threads, {precision_name(device, half)}",
    ]


def precision_name(device, half):
    if not half:
        return "fp32"
    return "fp16 mixed" if device.type == "cuda" else "bf16 mixed"


def commit():
    """The git commit of this package and, if the script is in another repository, also that of the script. "unknown"
    outside a repository.

    A "+" follows if tracked files differ from the commit or if git does not track the script.
    """
    package = Path(__file__).resolve()
    script = Path(sys.argv[0]).resolve()
    package_root = top_folder(package.parent) if tracks_files_in(package.parent) else None
    script_root = top_folder(script.parent)
    if script_root != package_root and not tracks_files_in(script.parent):
        script_root = None  # the folder is inside a repository, but not part of it
    if script_root is None:
        return commit_of(package_root, package)
    if script_root == package_root:
        return commit_of(script_root, script)
    return (
        f"{commit_of(script_root, script)} (script, {one_line(str(script_root))}), "
        f"{commit_of(package_root, package)} (package, {one_line(str(package.parent.parent))})"
    )


def top_folder(folder):
    """The top folder of the git repository around ``folder``; None outside one."""
    top = git(folder, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def tracks_files_in(folder):
    """Whether git tracks files in ``folder``. If not, it may be a copy inside an unrelated repository."""
    return bool(git(folder, "ls-files", "--", "."))


def commit_of(root, file):
    """The commit of the repository ``root``, with "+" if its files differ from it or git does not track ``file``."""
    head = None if root is None else git(root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    tracked = git(file.parent, "ls-files", "--", file.name)
    changed = git(root, "status", "--porcelain", "--untracked-files=no")
    return head if tracked and not changed else f"{head}+"


def git(folder, *words):
    """The output of git in ``folder``; None if it fails or is not installed."""
    try:
        command = ("git", "-C", str(folder), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
