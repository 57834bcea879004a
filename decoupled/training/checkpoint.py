"""The files of one run: its log, the checkpoint beside it, and a lock while a process is at work on them. What of a run
survives in a checkpoint, and the network of one, whichever script made it: ``decoupled.load``.
"""

import argparse
import contextlib
import errno
import importlib.util
import itertools
import os
import re
import sys
import warnings
import zipfile
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.optim import Optimizer

from decoupled.data.images import InputForm
from decoupled.errors import InputError, writing
from decoupled.logs import STAMP
from decoupled.parallel.mesh import all_reduce_meters
from decoupled.training.precision import pick_device

FORMAT = 4


FIELDS = {  # of a checkpoint: name → type
    "format": int, "script": str, "arguments": dict, "module_index": int, "epoch": int, "within": bool, "batch": int,
    "seconds": float, "data": dict, "log": str, "state": dict,
}  # fmt: skip


OTHERWISE = "resume another one, or start without --resume"


class Checkpoint:
    """The files of one run in ``folder``: STEM.log and STEM.pt, where STEM is ``script``, ``name``, a time and, where
    that is taken, a number; and STEM.lock, held by the one process that may write the two.

    Raises InputError when nothing can be written to the folder, which may not exist yet.
    """

    def __init__(self, folder, script, name=""):
        self.folder, self.stem = writable_folder(folder), "-".join(filter(None, (script, name)))
        self.prefix = self.stem + "-"
        self.text = ""  # what the log holds
        self.lock = None

    def path(self, suffix):
        return self.folder / (self.stem + suffix)

    def create(self, text):
        """Creates a log that begins with ``text``, and returns the STEM."""
        stamp = self.prefix + datetime.now().strftime("%Y%m%d-%H%M%S")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for attempt in itertools.count():
                self.stem = stamp + (f"-{attempt}" if attempt else "")
                with contextlib.suppress(FileExistsError):
                    self.path(".log").open("x").close()
                    break
        self.acquire()
        try:
            self.append(text)
        except BaseException:  # no half-made run stays behind
            self.path(".log").unlink(missing_ok=True)
            self.close()
            raise
        return self.stem

    def acquire(self):
        """Takes the lock, which lives as long as this process. Raises InputError, naming it, where another has it."""
        path = self.path(".lock")
        lock = FileLock(path, timeout=0)
        with writing(path):
            try:
                lock.acquire()
            except Timeout as held:
                holder = path.read_text(errors="replace").strip() or "another process"
                raise InputError(
                    f"{self.path('.log')} is being written by {holder}: wait for its end, or stop it"
                ) from held
            path.write_text(f"process {os.getpid()}\n")
        self.lock = lock

    def close(self):
        """Gives the lock back."""
        if self.lock is not None:
            self.path(".lock").unlink(missing_ok=True)
            self.lock.release()
            self.lock = None

    # The log

    def append(self, text):
        """Appends to the log; when that fails (a full disk), the log ends where it did before."""
        with writing(self.path(".log")):
            self.mend()
            with open(self.path(".log"), "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                data = text.encode()
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(end)
                    raise
        self.text += text

    def mend(self):
        """Writes the log anew where its size says that it is not what this run wrote."""
        log = self.path(".log")
        if not log.is_file() or log.stat().st_size != len(self.text.encode()):
            self.write_anew()

    def write_anew(self):
        """Writes the log anew; what stands there is kept as STEM.edited.log."""
        log = self.path(".log")
        names = (self.path(f".edited{-n or ''}.log") for n in itertools.count())
        kept = next(name for name in names if not os.path.lexists(name))
        note = "# the log was gone, and is written anew from here up\n"
        if os.path.lexists(log):
            os.replace(log, kept)
            note = f"# the log had been changed: that one is kept as {kept.name}, this one written anew from here up\n"
        self.text += note
        temporary = self.path(".log.tmp")
        temporary.write_text(self.text)
        os.replace(temporary, log)

    def reopen(self, text):
        """Brings the log back to ``text``, what it was when the checkpoint was written."""
        log = self.path(".log")
        self.text = text
        with writing(log):
            if log.is_file() and log.read_bytes().startswith(text.encode()):
                os.truncate(log, len(text.encode()))
            else:
                self.write_anew()

    # The checkpoint

    def write(self, snapshot):
        """Writes the checkpoint ``snapshot``, a dict, and with it the log's text: under a temporary name, then renamed.
        At any moment one whole checkpoint is on the disk.
        """
        log, temporary, target = (self.path(suffix) for suffix in (".log", ".pt.tmp", ".pt"))
        with writing(target):
            self.mend()
            try:
                with open(log, "rb") as file:  # the log's lines first: a checkpoint never claims lines that are lost
                    os.fsync(file.fileno())
                with open(temporary, "wb") as file:
                    save(snapshot | {"format": FORMAT, "log": self.text}, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                if not target.exists():  # the run's first: no half-made one stays behind
                    log.unlink(missing_ok=True)
                raise

    def read(self, path=None, accept=lambda saved, path: None):
        """(the checkpoint at ``path``, or this script's newest one, folder, STEM), locked for this process. Raises
        InputError when there is none, when its run is under way, for a file that is damaged or no checkpoint, and where
        ``accept(checkpoint, path)`` does.
        """
        path = self.newest() if path is None else Path(path)
        if path is None:
            there = f"no checkpoint is called {self.prefix}*.pt"
            raise InputError(f"nothing to resume in {self.folder}: {there}; start without --resume")
        if path.suffix != ".pt":
            raise InputError(
                f"{path} is not called .pt: --resume takes a checkpoint, such as {path.with_suffix('.pt').name} beside "
                "a log, or without a name the newest in --log-dir"
            )
        if not path.is_file():
            raise InputError(f"no checkpoint {path}: --resume without a name takes the newest in --log-dir")
        self.folder, self.stem = path.parent, path.name.removesuffix(".pt")
        writable_folder(self.folder)
        self.acquire()
        try:
            saved = read_checkpoint(path)
            accept(saved, path)
        except InputError:
            self.close()
            raise
        return saved, self.folder, self.stem

    def newest(self):
        """The path of the newest checkpoint with this prefix, by the time in its name; None where there is none."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = STAMP.fullmatch(path.name.removeprefix(self.prefix).removesuffix(".pt"))
            if match and path.name == f"{self.prefix}{match[0]}.pt":
                found.append((match[1], int(match[2] or 0), path))
        return max(found)[2] if found else None


class Output:
    """A file for torch.save, which hides why a write failed: ``error`` is the OSError."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def save(snapshot, file):
    """torch.save straight to ``file``, with the OSError of a write that fails."""
    output = Output(file)
    try:
        torch.save(snapshot, output)
    except (OSError, RuntimeError):
        if output.error is None:
            raise
        raise output.error from None


def read_checkpoint(path, otherwise=OTHERWISE):
    """The checkpoint at ``path``, after its checksums. Raises InputError for a file that is damaged or no checkpoint of
    these scripts; ``otherwise`` says the way out.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever a damaged file leads to
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: of a place that is not
            raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
        raise InputError(f"{path} is truncated, damaged or no checkpoint: {otherwise}") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged, its checksum is not that of {damaged}: {otherwise}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that something else has left leads to
        raise InputError(f"{path} is no checkpoint of these scripts: name one that a run has left") from error
    fields = checkpoint if isinstance(checkpoint, dict) else {}
    if "log_bytes" in fields or fields.get("format") in range(FORMAT):
        raise InputError(f"{path} is from an earlier version of these scripts: use it with that one, or start anew")
    if any(type(fields.get(name)) is not kind for name, kind in FIELDS.items()) or fields["format"] != FORMAT:
        raise InputError(f"{path} is no checkpoint of these scripts: name one that a run has left")
    return checkpoint


def check(saved, path, script, now, free, num_modules):
    """Raises InputError when the checkpoint ``saved``, read from ``path``, is of another script than ``script`` or of
    other arguments than ``now`` (a dict) in more than those called as in ``free`` and a larger epochs, and when it says
    that it was left where a run of so many ``num_modules`` never is.
    """
    before = saved["arguments"]
    if saved["script"] != script:
        raise InputError(f"{path} is a checkpoint of {saved['script']}, not of {script}: name one of this script's")
    longer = type(before.get("epochs")) is int and now["epochs"] > before["epochs"] and saved["module_index"] == 0
    free = (*free, "epochs") if longer else free
    # As text: in a foreign file they may be anything
    differing = [name for name in now | before if name not in free and repr(now.get(name)) != repr(before.get(name))]
    if differing:
        what = ", ".join(f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})" for name in differing)
        raise InputError(f"{path} is of a run with {' '.join(what.split())}: resume it with the same arguments")
    reached = 0 <= saved["module_index"] < num_modules and saved["within"] <= saved["epoch"] <= now["epochs"]
    if not (reached and saved["batch"] >= 0 and 0 <= saved["seconds"] < float("inf")):
        place = f"module_index {saved['stage']}, epoch {saved['epoch']}, batch {saved['batch']}"
        raise InputError(f"{path} says it was left in {place}, which this run does not have: {OTHERWISE}")


def writable_folder(name):
    """The folder called ``name``, which may not exist yet. Raises InputError when nothing can be written there."""
    folder = Path(os.path.expanduser(name))
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--log-dir {name} cannot be written to: name a folder that can")
    return folder


class State:
    """The ``objects`` of a run, {name: object with state_dict, or a list of them}, with a loss scale, ``scaler(it)``,
    for each optimizer among them.

    Lists have one object for each module; "net" is the network; "meters" count on every replica of ``mesh``. With
    ``stage``, a decoupled.parallel.stages.Stage of several, this process has its part of the lists and the network.
    """

    def __init__(self, objects, scaler, mesh, stage=None):
        self.mesh, self.stage = mesh, stage
        self.listed = {"scalers", *(key for key, value in objects.items() if isinstance(value, (list, tuple)))}
        self.objects = {key: list(value) if key in self.listed else [value] for key, value in objects.items()}
        optimizers = [value for value in self if isinstance(value, Optimizer)]
        self.objects["scalers"] = [scaler(optimizer) for optimizer in optimizers]

    def __iter__(self):
        return (value for values in self.objects.values() for value in values)

    def __getitem__(self, key):
        return self.objects[key]

    def __contains__(self, key):
        return key in self.objects

    def each(self, method):
        """Calls ``method`` of all objects that have it."""
        for value in self:
            getattr(value, method, lambda: None)()

    def gather(self):
        """{name: [state_dict, …]} of the whole run in process 0. All processes call this after the same mini-batch."""
        objects = self.objects | {"meters": all_reduce_meters(self.objects.get("meters", []), self.mesh)}
        state = {key: [value.state_dict() for value in values] for key, values in objects.items()}
        return state if self.stage is None else self.join(self.mesh.to_first(state))

    def join(self, parts):
        """One state of those of all stages: lists one after the other, the network's parts together, and of what each
        has, as of the images, the lowest's.
        """
        whole = {}
        for part in parts:
            for key, values in part.items():
                if key in self.listed:
                    whole[key] = whole.get(key, []) + values
                elif key == "net":
                    whole[key] = [whole.get(key, [{}])[0] | values[0]]
                else:
                    whole.setdefault(key, values)
        return whole

    def restore(self, saved, path):
        """Brings all objects back to what ``gather`` gave. Raises InputError, naming its file ``path``, where that is
        of other modules.
        """
        try:
            for key, values in self.objects.items():
                states = saved[key]
                if self.stage is not None and key in self.listed:
                    states = self.stage.own(states)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # another stage's
                    for value, state in zip(values, states, strict=True):
                        value.load_state_dict(state)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # whatever a state that is another object's leads to
            reason = str(error).strip().split("\n")[-1].strip()
            what = f"{path} is a checkpoint of another network ({reason})"
            raise InputError(f"{what}: name one of this network's") from error
        for meter in self.objects.get("meters", ()) if self.mesh.replica else ():
            meter.begin()  # replica 0 has the sum over all


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
    """The checkpoint at ``path``: a dict, see decoupled.training.checkpoint. Raises InputError as ``load`` does."""
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
