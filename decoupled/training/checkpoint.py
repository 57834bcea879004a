"""The files of a run: its log, the checkpoint beside it, and a lock while a process writes them."""

import contextlib
import errno
import itertools
import os
import tempfile
import zipfile
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock, SoftFileLock, Timeout

from decoupled.errors import InputError, writing
from decoupled.logs import RESULT_STARTS, parse_run_name, started_at

FORMAT = 4
LAST_COMMIT_OF_FORMAT_3 = "2391bbc"
FIELDS = {  # fields of a checkpoint: name → type
    "format": int,
    "script": str,  # FOLDER/SCRIPT.py
    "script_sha256": str,  # of the script's text, in hexadecimal
    "arguments": dict,
    "module_index": int,  # these five are the fields of decoupled.training.run.Position
    "epoch": int,
    "within_epoch": bool,
    "batch": int,
    "seconds": float,
    "finished": bool,  # whether this was the run's last epoch
    "data": dict,  # the InputForm of the test images, or empty
    "log": str,  # the log's text
    "state": dict,  # see decoupled.training.state.State
}

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of file systems that cannot lock files


class RunFiles:
    """The files of one run in ``folder``:

    STEM.log   the log
    STEM.pt    the checkpoint
    STEM.lock  held by the process that writes the other two

    STEM is SCRIPT[-NAME]-TIME, with a number added if another run has the same name. TIME is when the run started. The
    folder need not exist yet. Raises InputError if it cannot be written to.
    """

    def __init__(self, folder, script, name=""):
        self.folder = writable_folder(folder)
        self.prefix = f"{script}-{name}" if name else script
        self.stem = None  # until the log is created, or a checkpoint is opened
        self.log_text = ""
        self.lock = None

    def path(self, suffix):
        return self.folder / (self.stem + suffix)

    # The lock

    def acquire(self):
        """Takes the lock until ``close`` or the end of this process. If another process has it, raises an InputError
        that names that process.
        """
        path = self.path(".lock")
        with writing(path):
            try:
                self.lock = lock_file(path)
            except Timeout as error:
                holder = first_line(path) or "unknown"
                raise InputError(
                    f"{self.path('.log')} is being written by process {holder}: wait until it ends, or stop it "
                    f"(if it ran on another machine and is gone, delete {path})"
                ) from error

    def close(self):
        """Releases the lock."""
        if self.lock is not None:
            self.path(".lock").unlink(missing_ok=True)
            self.lock.release()
            self.lock = None

    # The log

    def create_log(self, text):
        """Creates the log with ``text`` as its first lines, and returns STEM."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.reserve_stem()
        try:
            self.acquire()
            self.append_to_log(text)
        except InputError:
            self.remove_log()
            raise
        return self.stem

    def reserve_stem(self):
        """Creates an empty log under the first STEM that no other run has. Its time is never before that of the newest
        run, even if the clock has been set back: --resume would choose the wrong run.
        """
        time = datetime.now().strftime("%Y%m%d-%H%M%S")
        newest = self.newest_checkpoint()
        if newest is not None:
            time_of_newest, _ = started_at(newest)
            time = max(time, time_of_newest)
        first_choice = f"{self.prefix}-{time}"
        self.stem = first_choice
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                self.path(".log").open("x").close()
                return
            self.stem = f"{first_choice}-{number}"

    def append_to_log(self, text):
        """Appends ``text`` to the log. If that fails, for example on a full disk, the log is unchanged."""
        path = self.path(".log")
        with writing(path), open(path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            data = text.encode()
            try:
                while data:
                    written = file.write(data)
                    data = data[written:]
            except OSError:
                file.truncate(end)
                raise
        self.log_text += text

    def restore_log(self, text):
        """Restores the log to ``text``, its content when the checkpoint was written. If the log does not start with
        ``text``, or continues with lines that no run writes, someone has edited it: it is kept as STEM.edited.log.
        """
        log = self.path(".log")
        with writing(log):
            if log.exists() and is_edited_since(log.read_bytes(), text.encode()):
                kept = self.unused_name_for_edited_log()
                os.replace(log, kept)
                text += f"# this log had been edited: the edited log is kept as {kept.name}\n"
            temporary = self.path(".log.tmp")
            temporary.write_bytes(text.encode())
            os.replace(temporary, log)
        self.log_text = text

    def log_begins_with(self, text):
        log = self.path(".log")
        return log.exists() and log.read_bytes().startswith(text.encode())

    def unused_name_for_edited_log(self):
        kept = self.path(".edited.log")
        for number in itertools.count(1):
            if not kept.exists():
                return kept
            kept = self.path(f".edited-{number}.log")

    def remove_log(self):
        """Removes the log of a run that could not be saved even once, and releases the lock."""
        self.path(".log").unlink(missing_ok=True)
        self.close()

    # The checkpoint

    def write_checkpoint(self, snapshot):
        """Writes the checkpoint ``snapshot``, a dict with all FIELDS except format and log, which are added here.

        The checkpoint is written to a temporary file and renamed, so the disk has a complete checkpoint at all times.
        """
        log = self.path(".log")
        temporary = self.path(".pt.tmp")
        target = self.path(".pt")
        with writing(target):
            try:
                with open(
                    log, "rb"
                ) as file:  # the log first: after a power failure it must not be older than the checkpoint
                    os.fsync(file.fileno())
                with open(temporary, "wb") as file:
                    save({**snapshot, "format": FORMAT, "log": self.log_text}, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def select(self, path):
        """Switches to the files of the run whose checkpoint is at ``path``. Reads and locks nothing."""
        self.folder = Path(path).parent
        self.stem = Path(path).name.removesuffix(".pt")

    def open_checkpoint(self, path):
        """Selects the run whose checkpoint is at ``path``, takes its lock, and returns the checkpoint.

        Raises InputError if the file does not exist, is damaged or is not a checkpoint, or if another process is
        writing that run.
        """
        path = Path(path)
        if path.suffix != ".pt":
            raise InputError(
                f"{path} is not called .pt: --resume takes a checkpoint, such as {path.with_suffix('.pt').name} beside "
                "a log, or without a name the newest in --log-dir"
            )
        if not path.is_file():
            raise InputError(f"no checkpoint {path}: --resume without a name takes the newest in --log-dir")
        writable_folder(path.parent)
        self.select(path)
        self.acquire()
        return read_checkpoint(path, "resume another one, or start without --resume")

    def newest_checkpoint(self):
        """The path of the newest checkpoint with this prefix, by the time in its name; None if there is none."""
        candidates = []
        for path in self.folder.glob("*.pt"):
            name = parse_run_name(path)
            if name is not None and name.prefix == self.prefix:
                candidates.append(path)
        return max(candidates, key=started_at, default=None)


def is_edited_since(log, saved):
    """Whether someone has changed a log after its first bytes, ``saved``, were written to a checkpoint."""
    if not log.startswith(saved):
        return True
    *lines, _ = log.removeprefix(saved).decode(errors="replace").split("\n")  # a killed run may cut off the last line
    return not all(line.startswith(("#", *RESULT_STARTS)) for line in lines)


def writable_folder(name):
    """The folder called ``name``, which need not exist yet. Raises InputError if it cannot be written to."""
    folder = Path(os.path.expanduser(name))
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--log-dir {name} cannot be written to: choose another folder")
    return folder


# The lock


def lock_file(path):
    """Acquires the lock at ``path`` and returns it. The file's first line is the PID of this process. Raises Timeout if
    another process has the lock.

    It is a flock, which ends with the process. On file systems without flock, the existence of the file is the lock,
    and filelock takes over the lock of a dead process on this machine.
    """
    if has_flock(path.parent):
        lock = FileLock(path, timeout=0)
        lock.acquire()
        try:
            path.write_text(f"{os.getpid()}\n")
        except OSError:
            path.unlink()
            lock.release()
            raise
    else:
        lock = SoftFileLock(path, timeout=0)
        lock.acquire()  # writes the PID and more
    return lock


def has_flock(folder):
    """Whether files in ``folder`` can be locked: some network file systems cannot."""
    if os.name != "posix":
        return True
    import fcntl

    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
    return True


def first_line(path):
    return path.read_text(errors="replace").partition("\n")[0]


# Reading and writing a checkpoint file


class ErrorKeepingFile:
    """A file for torch.save to write to. torch.save hides why a write failed; ``error`` keeps the OSError."""

    def __init__(self, file):
        self.file = file
        self.error = None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def save(snapshot, file):
    """torch.save to ``file``. If a write fails, raises its OSError."""
    output = ErrorKeepingFile(file)
    try:
        torch.save(snapshot, output)
    except (OSError, RuntimeError):
        if output.error is None:
            raise
        raise output.error from None


def read_checkpoint(path, fix="name another one"):
    """Reads the checkpoint at ``path``, a dict with FIELDS. Raises InputError, with ``fix``, if the file is damaged, is
    not a checkpoint or comes from an earlier version.
    """
    check_archive(path, fix)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip file with other contents
        raise InputError(f"{path} is no checkpoint of these scripts: {fix}") from error
    fields = checkpoint if isinstance(checkpoint, dict) else {}
    if "log_bytes" in fields or fields.get("format") in range(FORMAT):
        raise InputError(
            f"{path} was written by an earlier version, of which commit {LAST_COMMIT_OF_FORMAT_3} is the last: "
            "check that one out to use it, or start a new run"
        )
    if fields.get("format") != FORMAT or any(type(fields.get(name)) is not kind for name, kind in FIELDS.items()):
        raise InputError(f"{path} is no checkpoint of these scripts: {fix}")
    return checkpoint


def check_archive(path, fix):
    """Raises InputError if the checkpoint file ``path``, a zip archive, differs from what torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            attributes = [entry.external_attr for entry in archive.infolist()]
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged offset
            raise InputError(f"{path} is damaged: {fix}") from error
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except Exception as error:  # zipfile may raise anything on damaged bytes
        raise InputError(f"{path} is truncated, damaged or no checkpoint: {fix}") from error
    # torch.save writes attributes of 0, which no checksum covers: an entry that a flipped bit calls a folder would be
    # read as arbitrary numbers.
    if damaged is not None or any(attributes):
        raise InputError(f"{path} is damaged: {fix}")
