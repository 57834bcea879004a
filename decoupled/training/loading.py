"""``decoupled.load``: the network of a checkpoint, from any script."""

import argparse
import contextlib
import hashlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import torch

from decoupled.data.images import InputForm
from decoupled.errors import InputError, last_line
from decoupled.training.checkpoint import read_checkpoint
from decoupled.training.device import pick_device

ROOT = Path(__file__).resolve().parents[2]  # the repository: checkpoints name scripts relative to it


def load(checkpoint, *, script=None, build=None, classes=None, device="cpu"):
    """The trained network in the file ``checkpoint``, in eval mode on ``device``. It maps inputs like those of the run
    (images: prepared as the checkpoint's InputForm says) to a list of logits (B, classes), one per head.

    ``build(args, classes)`` makes the network from the run's arguments and the number of classes, and the weights are
    loaded into it. By default, ``build`` comes from the script in this repository that made the checkpoint. Any other
    script runs only if you name it (``script``). Warns if the script has changed since.

    ``classes`` is needed only if the checkpoint has no InputForm, which names the classes. Raises InputError if the
    file is not a checkpoint, if the script is missing or has no ``build``, or if the network does not match the
    weights.
    """
    return rebuild(read(checkpoint), checkpoint, script=script, build=build, classes=classes, device=device)


def read(path):
    """Reads the checkpoint at ``path``: a dict, see decoupled.training.checkpoint. Raises InputError like ``load``."""
    path = Path(path)
    if not path.is_file() or path.suffix == ".log":
        raise InputError(f"{path} is not a checkpoint: name the .pt file beside a run's log")
    return read_checkpoint(path)


def input_form(saved, path):
    """The InputForm of the checkpoint ``saved``, read from ``path``. Raises InputError if it has none."""
    if set(saved["data"]) != set(InputForm._fields):
        raise InputError(
            f"{path} has no InputForm, which says how to prepare images: its script must give run.epochs a test=… "
            "with a form"
        )
    return InputForm(**saved["data"])


def rebuild(saved, path, *, script=None, build=None, classes=None, device="cpu"):
    """Like ``load``, for the checkpoint ``saved``, which was read from ``path``."""
    args = argparse.Namespace(**saved["arguments"])
    if classes is None:
        classes = count_classes(saved, path)
    device = pick_device(device, setting="device=")
    states = saved["state"].get("net", [])
    if len(states) != 1:
        raise InputError(f"{path} has no network: its script must call it net in run.epochs(net=…)")
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not affected
        if build is None:
            script = find_script(saved["script"]) if script is None else named_script(script)
            warn_if_changed(script, saved, path)
            net = build_with_script(script, args, classes)
        else:
            net = build(args, classes)
    try:
        net.load_state_dict(states[0])
    except RuntimeError as error:
        raise InputError(
            f"{path} does not match the network that build(args, classes) returns now ({last_line(error)})"
        ) from error
    return net.to(device, memory_format=torch.channels_last).eval()


def count_classes(saved, path):
    """The number of classes of the checkpoint ``saved``, read from ``path``. Raises InputError if the checkpoint does
    not have it.
    """
    if not saved["data"]:
        raise InputError(f"{path} does not say how many classes its network has: pass their number (classes=)")
    return len(input_form(saved, path).classes)


def find_script(name):
    """The path of the script that a checkpoint calls ``name``, FOLDER/SCRIPT.py in this repository. Because a
    checkpoint may come from anywhere, it cannot choose any other file. Raises InputError if the repository has no
    such script.
    """
    path = ROOT / name
    in_repository = (ROOT / "pyproject.toml").is_file() and re.fullmatch(r"[\w-]+/[\w-]+\.py", name)
    if not in_repository or not path.is_file():
        raise InputError(
            f"the network was built by {name!r}, which is no script of this repository: name the script (script=; "
            "predict: --script), or pass a function build(args, classes) (build=)"
        )
    return path.resolve()


def named_script(path):
    """The path of the script named by the caller. Raises InputError if it does not exist."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no script {path}: name the one that builds the network")
    return path.resolve()


def warn_if_changed(script, saved, path):
    """Warns if ``script`` is not the one that made the checkpoint ``saved``, read from ``path``."""
    if hashlib.sha256(script.read_bytes()).hexdigest() != saved["script_sha256"]:
        warnings.warn(
            f"{script} is not, or no longer, the script that made {path}: its network may compute something else",
            stacklevel=4,
        )


def build_with_script(path, args, classes):
    """Calls ``build(args, classes)`` of the script at ``path`` and returns the network. Raises InputError if the script
    has no ``build``.
    """
    with imports_from(path.parent):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "build"):
            raise InputError(f"{path} has no build(args, classes): give it one that makes the network, or use build=")
        return module.build(args, classes)


@contextlib.contextmanager
def imports_from(folder):
    """Makes ``import`` look in ``folder`` first inside the block, as for a script there, even for names that are
    already in sys.modules. Restores sys.path and sys.modules afterwards.
    """
    names = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
