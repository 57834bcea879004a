"""The network of a checkpoint, whichever script made it: ``decoupled.load``."""

import argparse
import contextlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

from decoupled.data.images import InputForm
from decoupled.errors import InputError
from decoupled.training.checkpoint import read_checkpoint
from decoupled.training.precision import pick_device

ROOT = Path(__file__).resolve().parents[2]  # the repository: scripts' names in checkpoints are relative to it


def load(checkpoint, *, script=None, build=None, device="cpu"):
    """The trained network of the file ``checkpoint``, in eval mode on ``device``: images as InputForm reads them,
    normalized, → a list of logits (B, classes), one for each head.

    It is ``build(args, classes)`` with the checkpoint's weights: the function ``build`` or, by default, that of the
    script that made the checkpoint, which is at ``script`` if not in this repository. ``args`` are the run's arguments,
    ``classes`` is their number. Raises InputError for a file that is no checkpoint, for a script that is missing or has
    no ``build``, and where the network is another one.
    """
    return rebuild(read(checkpoint), checkpoint, script=script, build=build, device=device)


def read(path):
    """The checkpoint at ``path``: a dict, see decoupled.training.checkpoint. Raises InputError as ``load`` does."""
    path = Path(path)
    if not path.is_file() or path.suffix == ".log":
        raise InputError(f"{path} is no checkpoint: name the .pt file beside a run's log")
    return read_checkpoint(path)


def input_form(saved, path):
    """The InputForm of the checkpoint ``saved``, read from ``path``. Raises InputError where it has none."""
    if set(saved["data"]) != set(InputForm._fields):
        raise InputError(f"{path} does not say what images its network reads: its run had no test images with a form")
    return InputForm(**saved["data"])


def rebuild(saved, path, *, script=None, build=None, device="cpu"):
    """As ``load``, from the checkpoint ``saved`` that was read from ``path``."""
    args = argparse.Namespace(**saved["arguments"])
    classes = len(input_form(saved, path).classes)
    states = saved["state"].get("net", [])
    if len(states) != 1:
        raise InputError(f"{path} has no network: its script must call it net in run.epochs(net=…)")
    with torch.random.fork_rng(devices=[]):
        if build is None:
            net = build_by_script(script_path(saved["script"], script), args, classes)
        else:
            net = build(args, classes)
    try:
        net.load_state_dict(states[0])
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"{path} is of another network than build(args, classes) makes now ({reason})") from error
    return net.to(pick_device(device), memory_format=torch.channels_last).eval()


def script_path(name, path=None):
    """Where the script is that a checkpoint calls ``name``, FOLDER/SCRIPT.py in the repository: at ``path`` if given.

    Raises InputError where there is none.
    """
    if path is None and not re.fullmatch(r"[\w-]+/[\w-]+\.py", name):
        raise InputError(f"{name!r} is no script of this repository: say where it is (script=), or give build=")
    path = ROOT / name if path is None else Path(path)
    if not path.is_file():
        raise InputError(
            f"the script {path}, which builds the network, is missing: say where it is (script=, --script), or give "
            "load a function build(args, classes) (build=)"
        )
    return path.resolve()


def build_by_script(path, args, classes):
    """What ``build(args, classes)`` of the script at ``path`` makes. Raises InputError where it has none."""
    with imports_from(path.parent):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "build"):
            raise InputError(f"{path} has no build(args, classes): give it one that makes the network, or use build=")
        return module.build(args, classes)


@contextlib.contextmanager
def imports_from(folder):
    """Within the block, modules are imported from ``folder`` first, as in a script there, also those that are called
    like ones that the program has already imported. Afterwards everything is as before.
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
