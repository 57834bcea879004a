"""The rows of the tables (rows.csv) and the logs of each row.

The logs of a row are results/EXPERIMENT/ROW-seedS.log, where reproduce.py puts them. Each must come from a run of that
row: the same script, on the same data, with the same values of all arguments that affect the result.
"""

import csv
import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from decoupled import InputError
from decoupled.logs import read_log

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent

# Scripts whose first epochs depend on the total number of epochs: a longer run is not a run of the row.
DEPEND_ON_LENGTH = ("learning_curves/cifar_sequential_greedy.py", "async_buffer/cifar_buffer.py")

# Arguments that may differ: they only say how and where a run was made. Seed and epochs are compared separately.
FREE_ARGUMENTS = {
    "resume",
    "log_dir",
    "save_folder",
    "data_dir",
    "data",
    "name",
    "save_every",
    "debug",
    "device",
    "half",
    "compile",
    "deterministic",
    "static_loss_scale",
    "dynamic_loss_scale",
    "buffer_device",
    "workers",
    "backend",
    "log_interval",
    "print_freq",
    "test_batch_size",
    "seed",
    "epochs",
}

DATA = {  # a row's data: the pattern of the log's line about training images
    "CIFAR-10": r"\d+ images of cifar10 \((PNG|original)\).*",
    "ImageNet": r"1281167 images of .*",
    "digits": r"\d+ images of digits.*",
}


class Row(NamedTuple):
    """A line of rows.csv.

    name   the column "row"
    head   the number of the last head; its result is the row's
    pflop  the cost of training one seed
    """

    name: str
    variant: str
    size: str
    script: str
    flags: str
    data: str
    head: int
    seeds: tuple
    pflop: float

    @property
    def experiment(self):
        return self.script.split("/")[0]

    @property
    def arguments(self):
        return parse_flags(self.script, self.flags)

    @property
    def epochs(self):
        return self.arguments["epochs"]

    def run_name(self, seed):
        """The --name of a run, and the name of its log in results/."""
        return f"{self.name}-seed{seed}"


class Log(NamedTuple):
    """A run's log.

    frame    its results so far, from read_log
    commits  of the repository, when the run was started and at each resume
    epochs   the total number of epochs asked for, by the last resume if there was one
    """

    path: Path
    frame: pd.DataFrame
    script: str
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

    def last_epoch(self, head):
        """The last epoch for which the log has results of ``head``; 0 if there is none."""
        return max(self.frame.loc[self.frame["n"] == head, "epoch"], default=0)


def read_rows(path=RESULTS / "rows.csv"):
    """The rows in the file at ``path``, a dict by name."""
    rows = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            row = Row(
                name=line["row"],
                variant=line["variant"],
                size=line["size"],
                script=line["script"],
                flags=line["flags"],
                data=line["data"],
                head=int(line["head"]),
                seeds=tuple(map(int, line["seeds"].split())),
                pflop=float(line["pflop"]),
            )
            if row.name in rows:
                raise InputError(f"{path}: two rows are called {row.name}: rename one")
            if row.data not in DATA:
                raise InputError(f"{path}: {row.name} has unknown data {row.data!r}: choose from {', '.join(DATA)}")
            rows[row.name] = row
    return rows


@functools.cache
def load_parse_args(script):
    """The function parse_args of ``script``, a path from the repository's root."""
    folder = str((ROOT / script).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = script.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_args


@functools.cache
def parse_flags(script, flags):
    """The arguments that ``script`` parses from ``flags``, including defaults: a dict."""
    positional = ["DIR"] if script.startswith("imagenet/") else []
    argv = sys.argv
    sys.argv = [script, *positional, *shlex.split(flags)]
    try:
        return vars(load_parse_args(script)())
    finally:
        sys.argv = argv


# Logs


def read_run_log(path):
    """Reads the Log at ``path``. Raises InputError if it does not say how its run was made."""
    frame = read_log(path, allow_empty=True)
    comments = {}
    commits = []
    for line in frame.attrs["comments"]:
        key, _, value = line.partition(": ")
        comments[key] = value
        if key == "commit" and value not in commits:
            commits.append(value)
    for key in ("command", "commit", "device", "train"):
        if key not in comments:
            raise InputError(f"{path} has no line '# {key}: …': name a log of these scripts")
    _python, script, *_flags = shlex.split(comments["command"])
    device = comments["device"]
    threads = ""
    precision = ""
    if match := re.fullmatch(r"(.*?), (\d+) threads?, (.*)", device):
        device, threads, precision = match.groups()
    epochs = frame.attrs["arguments"].get("epochs", 0)
    if found := re.findall(r"--n?epochs[ =](\d+)", comments["command"]):
        epochs = int(found[-1])
    return Log(path, frame, script, commits, comments["train"], device, threads, precision, epochs)


def check_log(row, log):
    """Raises an InputError that names the difference if ``log`` is not from a run of ``row``."""
    script = "/".join(Path(log.script).parts[-2:])  # FOLDER/SCRIPT, or only SCRIPT if it was started in its folder
    if script not in (row.script, Path(row.script).name):
        raise InputError(f"{log.path} is a run of {script}, and {row.name} of {row.script}")
    if not re.fullmatch(DATA[row.data], log.data):
        raise InputError(f"{log.path} is a run on {log.data}, and {row.name} on {row.data}")
    if log.arguments.get("seed") not in row.seeds:
        raise InputError(f"{log.path} is a run with seed {log.arguments.get('seed')}, which {row.name} does not have")
    if row.script in DEPEND_ON_LENGTH and log.epochs != row.epochs:
        raise InputError(f"{log.path} is a run of {log.epochs} epochs, and {row.name} of {row.epochs}")
    defaults = parse_flags(row.script, "")  # for flags that did not exist yet when the log was written
    for name, value in row.arguments.items():
        if name in FREE_ARGUMENTS:
            continue
        logged = log.arguments.get(name, defaults[name])
        if logged != value:
            raise InputError(f"{log.path} is a run with {name} {logged}, and {row.name} has {value}")


def read_runs(row, results=RESULTS):
    """The logs of ``row``, {seed: Log}, in the order of its seeds, finished or not. Raises InputError if one of them is
    not from a run of the row with that seed.
    """
    runs = {}
    for seed in row.seeds:
        path = results / row.experiment / f"{row.run_name(seed)}.log"
        if not path.is_file():
            continue
        log = read_run_log(path)
        check_log(row, log)
        if log.arguments["seed"] != seed:
            raise InputError(f"{path} is a run with seed {log.arguments['seed']}: rename it")
        runs[seed] = log
    return runs


def is_finished(log, row):
    """Whether ``log`` has all epochs of ``row``."""
    return log.last_epoch(row.head) >= row.epochs


def wall_time(log, row):
    """Seconds that the epochs of ``row`` took."""
    if row.script in DEPEND_ON_LENGTH:  # one time per module and epoch if modules learn one after the other
        return sum(log.seconds)
    return sum(log.seconds[: row.epochs])
