"""The files of one run: its log, the checkpoint beside it, and a lock while a process is at work on them."""

import contextlib
import errno
import itertools
import os
import re
import zipfile
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from decoupled import InputError

FORMAT = 3
STAMP = re.compile(r"(\d{8}-\d{6})(?:-(\d+))?")
EDITED = re.compile(r"\.edited(-\d+)?\.log$")  # the names of logs that were changed, and are kept beside the run's
FIELDS = {  # of a checkpoint: name → type
    "format": int, "script": str, "arguments": dict, "stage": int, "epoch": int, "within": bool, "batch": int,
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


def check(saved, path, script, now, free, stages):
    """Raises InputError when the checkpoint ``saved``, read from ``path``, is of another script than ``script`` or of
    other arguments than ``now`` (a dict) in more than those called as in ``free`` and a larger epochs, and when it says
    that it was left where a run of so many ``stages`` never is.
    """
    before = saved["arguments"]
    if saved["script"] != script:
        raise InputError(f"{path} is a checkpoint of {saved['script']}, not of {script}: name one of this script's")
    longer = type(before.get("epochs")) is int and now["epochs"] > before["epochs"] and saved["stage"] == 1
    free = (*free, "epochs") if longer else free
    # As text: in a foreign file they may be anything
    differing = [name for name in now | before if name not in free and repr(now.get(name)) != repr(before.get(name))]
    if differing:
        what = ", ".join(f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})" for name in differing)
        raise InputError(f"{path} is of a run with {' '.join(what.split())}: resume it with the same arguments")
    reached = 1 <= saved["stage"] <= stages and saved["within"] <= saved["epoch"] <= now["epochs"]
    if not (reached and saved["batch"] >= 0 and 0 <= saved["seconds"] < float("inf")):
        place = f"stage {saved['stage']}, epoch {saved['epoch']}, batch {saved['batch']}"
        raise InputError(f"{path} says it was left in {place}, which this run does not have: {OTHERWISE}")


def writable_folder(name):
    """The folder called ``name``, which may not exist yet. Raises InputError when nothing can be written there."""
    folder = Path(os.path.expanduser(name))
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--log-dir {name} cannot be written to: name a folder that can")
    return folder


@contextlib.contextmanager
def writing(path, way_out="make room or access there, then --resume"):
    """Turns a failure to write ``path`` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): {way_out}") from error
