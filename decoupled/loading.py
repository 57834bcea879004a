"""The network of a checkpoint, whichever script made it: ``decoupled.load``."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

import torch

from decoupled import InputError
from decoupled.checkpoints import read_checkpoint
from decoupled.flags import pick_device
from decoupled.images import InputForm

ROOT = Path(__file__).resolve().parent.parent  # the repository, which the scripts' names in checkpoints start from


def load(checkpoint, *, script=None, device="cpu"):
    """The trained network of the file ``checkpoint``, in eval mode on ``device``: images as InputForm reads them,
    normalized, → a list of logits (B, classes), one for each head.

    It is what ``build(args, classes)`` of the script that made the checkpoint makes, with the checkpoint's weights.
    ``script`` is where that script is, for one that is not in this repository. Raises InputError for a file that is no
    checkpoint, for a script that is not there or has no ``build``, and where that builds another network.
    """
    return rebuild(read(checkpoint), checkpoint, script=script, device=device)


def read(path):
    """The checkpoint at ``path``: a dict, see decoupled.checkpoints. Raises InputError as ``load`` does."""
    path = Path(path)
    if not path.is_file() or path.suffix == ".log":
        raise InputError(f"{path} is no checkpoint: name the .pt file beside a run's log")
    return read_checkpoint(path, "name another one")


def input_form(saved, path):
    """The InputForm of the checkpoint ``saved``, read from ``path``. Raises InputError where it has none."""
    if set(saved["data"]) != set(InputForm._fields):
        raise InputError(f"{path} does not say what images its network reads: its run had no test images with a form")
    return InputForm(**saved["data"])


def rebuild(saved, path, *, script=None, device="cpu"):
    """As ``load``, from the checkpoint ``saved`` that was read from ``path``."""
    module, args = load_script(saved["script"], script), argparse.Namespace(**saved["arguments"])
    if not hasattr(module, "build"):
        raise InputError(f"{module.__file__} has no build(args, classes): give it one that makes the network")
    states = saved["state"].get("net", [])
    if len(states) != 1:
        raise InputError(f"{path} holds no network: its script has to call it net in run.epochs(net=…)")
    with torch.random.fork_rng(devices=[]):
        net = module.build(args, len(input_form(saved, path).classes))
    try:
        net.load_state_dict(states[0])
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise InputError(f"{path} is of another network than {module.__file__} builds now ({reason})") from error
    return net.to(pick_device(device), memory_format=torch.channels_last).eval()


def load_script(name, path=None):
    """The script ``path``, by default ``name`` (FOLDER/SCRIPT.py) in the repository, as a module; its own folder can be
    imported from meanwhile, as when it runs.
    """
    if path is None and not re.fullmatch(r"[\w-]+/[\w-]+\.py", name):
        raise InputError(f"{name!r} is the name of no script: say where the script is")
    path = ROOT / name if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"the script {path}, which builds the network, is missing: say where it is (--script)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module
