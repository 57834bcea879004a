"""The rows of the tables (rows.csv), and which logs are runs of which row.

A log is a run of a row when its script, the arguments that decide a result and its data are the row's. It counts when
it was made at a commit not older than the row's ``since``, the oldest whose results stand for it, and older than its
``before``, if there is one. Where a log lies and what it is called do not matter.
"""

import csv
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from decoupled import InputError
from decoupled.logs import EDITED, read_log

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
SEQUENTIAL = "learning_curves/cifar_sequential_greedy.py"
WHOLE = (SEQUENTIAL, "async_buffer/cifar_buffer.py")  # their first epochs depend on how many there are to be
# Arguments that say how and where a run was made, not what it is; epochs and seed are compared on their own.
HOW = {
    "resume",
    "log_dir",
    "save_folder",
    "data_dir",
    "data",
    "name",
    "device",
    "half",
    "compile",
    "deterministic",
    "workers",
    "backend",
}
HOW |= {"log_interval", "print_freq", "test_batch_size", "buffer_device", "static_loss_scale", "dynamic_loss_scale"}
HOW |= {"epochs", "seed", "save_every", "debug"}
DATA = {  # the data a row asks for → the log's line on the training images
    "CIFAR-10": r"\d+ images of cifar10 \((PNG|original)\)",
    "CIFAR-10 (JPEG)": r"\d+ images of cifar10 \(JPEG\)",
    "ImageNet": r"1281167 images of .*",
    "digits": r"\d+ images of digits.*",
}


class Row(NamedTuple):
    """A line of rows.csv. ``head``: the number of the last head, whose result is the row's; ``pflop``: what training
    one seed costs.
    """

    row: str
    variant: str
    size: str
    script: str
    flags: str
    data: str
    head: int
    seeds: tuple
    since: str
    before: str
    pflop: float

    @property
    def experiment(self):
        return self.script.split("/")[0]

    @property
    def arguments(self):
        return parse(self.script, self.flags)

    @property
    def epochs(self):
        return self.arguments["epochs"]


class Log(NamedTuple):
    """A run's log. ``frame``: its results so far; ``commits``: of its start and of each resume; ``epochs``: how many
    its last start was for.
    """

    path: Path
    script: str
    frame: pd.DataFrame
    command: list
    commits: list
    data: str
    device: str
    threads: str
    precision: str
    epochs: int

    @property
    def arguments(self):
        return self.frame.attrs["arguments"]

    @property
    def seconds(self):
        return self.frame.attrs["seconds"]

    def reached(self, head):
        """The last epoch with a line of ``head``, 0 before the first. Heads are written in order."""
        return max(self.frame.loc[self.frame["n"] == head, "epoch"], default=0)


def read_rows(path=RESULTS / "rows.csv"):
    """The rows in the file at ``path``, a dict by name. Raises InputError for flags that their script refuses."""
    rows = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            fields = {"head": int(line["head"]), "pflop": float(line["pflop"])}
            row = Row(**line | fields | {"seeds": tuple(map(int, line["seeds"].split()))})
            if row.row in rows or row.data not in DATA:
                raise InputError(f"{path}: {row.row} is there twice, or its data {row.data!r} are not known")
            rows[row.row] = row
    return rows


@functools.cache
def script_parser(script):
    """The parse_args of a script, named from the repository's root, whose folder is importable from then on."""
    folder = str((ROOT / script).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py").replace("/", "_"), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_args


@functools.cache
def parse(script, flags):
    """The arguments of ``script`` run with ``flags``: a dict, defaults included."""
    before = sys.argv
    sys.argv = [script, *(["DIR"] if script.startswith("imagenet/") else []), *shlex.split(flags)]
    try:
        return vars(script_parser(script)())
    finally:
        sys.argv = before


def read_logs(*folders):
    """The logs in ``folders`` and below, each once."""
    paths = {path.resolve(): path for folder in folders for path in sorted(Path(folder).rglob("*.log"))}
    paths = {key: path for key, path in paths.items() if not EDITED.search(path.name)}
    return [log for path in paths.values() if (log := as_log(path)) is not None]


def as_log(path):
    """The log at ``path``; None when it is no log of these scripts."""
    frame = read_log(path, empty=True)
    comments = [line.partition(": ")[::2] for line in frame.attrs["comments"]]
    found = {key: value for key, value in comments if value}
    if not {"command", "commit", "device", "train"} <= set(found):
        return None
    command = shlex.split(found["command"])
    script = "/".join(Path(command[1]).parts[-2:])
    if "/" not in script:  # started in its own folder
        script = next(
            filter(path.name.startswith, (f"{p.parent.name}-{p.stem}-" for p in ROOT.glob(f"*/{script}"))), ""
        )
        script = script.strip("-").replace("-", "/") + ".py"
    match = re.fullmatch(r"(.*?), (\d+) threads?, (.*)", found["device"])
    device, threads, precision = match.groups() if match else (found["device"], "", "")
    epochs = re.findall(r"--n?epochs[ =](\d+)", found["command"]) or [frame.attrs["arguments"].get("epochs", 0)]
    commits = list(dict.fromkeys(value for key, value in comments if key == "commit"))
    return Log(path, script, frame, command, commits, found["train"], device, threads, precision, int(epochs[-1]))


def in_todays_words(value):
    """A flag's value, by its present name where an older log has another."""
    return "priority_lifo" if value == "lifo" else value


def is_run_of(log, row, seed):
    """Whether the arguments and data of ``log`` are those of ``row`` with that seed."""
    if log.script != row.script or not re.fullmatch(DATA[row.data], log.data) or log.arguments.get("seed") != seed:
        return False
    if row.script in WHOLE and log.epochs != row.epochs:
        return False
    defaults = parse(row.script, "")  # of flags that are younger than the log
    what = {key: value for key, value in row.arguments.items() if key not in HOW}
    return all(in_todays_words(log.arguments.get(key, defaults[key])) == value for key, value in what.items())


@functools.cache
def git(*words):
    """(exit code, output) of a git command in the repository; (None, "") where there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None, ""
    return done.returncode, done.stdout.strip()


def has_history():
    """Whether the commits that logs name can be looked up here: not so without git, or in a shallow clone."""
    return git("rev-parse", "--is-shallow-repository") == (0, "false")


def contains(commit, older):
    """Whether ``commit`` has ``older`` in its past, or is it; None when one of them is not known here."""
    code, _ = git("merge-base", "--is-ancestor", older, commit.rstrip("+"))
    return {0: True, 1: False}.get(code)


def standing(log, row):
    """ "stands", "superseded", "another" (of a time that the row is not about) or "unknown" (no such commit here)."""
    since = [contains(commit, row.since) if row.since else True for commit in log.commits]
    before = [contains(commit, row.before) if row.before else False for commit in log.commits]
    if None in since + before:
        return "unknown"
    return "another" if any(before) else "stands" if all(since) else "superseded"


def runs_of(row, seed, logs):
    """{standing: logs, the one that came furthest first} of the runs of ``row`` with that seed."""
    found = {}
    for log in logs:
        if is_run_of(log, row, seed):
            found.setdefault(standing(log, row), []).append(log)
    return {key: sorted(runs, key=lambda log: (-log.reached(row.head), -len(log.frame))) for key, runs in found.items()}


def best(row, seed, logs):
    """The log that counts for ``row`` with that seed and came furthest, finished or not; None when there is none."""
    return next(iter(runs_of(row, seed, logs).get("stands", [])), None)


def seconds(log, row):
    """Wall time of the epochs that ``row`` asks for."""
    return sum(log.seconds if row.script in WHOLE else log.seconds[: row.epochs])


def progress(log, row):
    """The part of the row's epochs that ``log`` has, from 0 to 1. The sequential script's modules count alike."""
    return min(len(log.seconds) / row.epochs / (row.head if row.script == SEQUENTIAL else 1), 1)
