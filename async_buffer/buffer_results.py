"""Results of cifar_buffer.py: the numbers behind the paper's Figs. 5 and 6 (Sec. 5.6), and results of
cifar_buffer_distributed.py for comparison. The runs are rows of results/rows.csv.
"""

import re
from pathlib import Path
from typing import NamedTuple

import cifar_buffer
import pandas as pd
from turns import read_tallies

from decoupled import InputError
from decoupled.logs import final, read_log
from decoupled.training import run as runs

VARIED = ("buffer", "noise", "layer_noise", "seed")  # arguments that the figures vary

# Arguments that say where a run was made and do not affect results
FLAGS_OF_PLACE = (*runs.FREE_ON_RESUME, "name", "device")

COLUMNS = (
    "setting",
    *VARIED,
    "slow_down",
    "test_top1",
    "ensemble_top1",
    "staleness",
    "reuse",
    "skipped",
    "log",
)


# A process's pace in an epoch, in the comments of cifar_buffer_distributed.py's logs
PACE = re.compile(r"process (?P<module>\d+), epoch (?P<epoch>\d+): (?P<images_per_s>[\d.]+) images/s, .*")


class LoggedRun(NamedTuple):
    """A log of cifar_buffer.py."""

    path: Path
    arguments: dict
    frame: pd.DataFrame
    complete: bool  # has the last epoch of all modules


def read_runs(folder):
    """A list with a LoggedRun for every log of cifar_buffer.py in ``folder``."""
    found = []
    for path in sorted(Path(folder).glob("*.log")):
        try:
            frame = read_log(path)
        except InputError:  # no epoch has finished yet
            continue
        arguments = frame.attrs["arguments"]
        if "own_epoch" not in frame or not set(VARIED) <= set(arguments):
            continue  # a log of another script
        last_epoch = frame[frame["epoch"] == arguments["epochs"]]
        complete = set(last_epoch["n"]) == set(range(arguments["ncnn"]))
        found.append(LoggedRun(path, arguments, frame, complete))
    return found


def results(folder):
    """A data frame with a row for each complete log in ``folder``. Columns:

    setting                     arguments that no figure varies, if they differ from the defaults, and the data set
    buffer, noise, layer_noise, seed, slow_down
    test_top1, ensemble_top1    in % after the last epoch, of the last head and of the ensemble of all heads
    staleness, reuse            means over the run, of the slow module; of the last module if none or the lowest is slow
    skipped                     turns, of all modules
    log                         file name
    """
    rows = []
    for run in read_runs(folder):
        if run.complete:
            rows.append(result(run))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def result(run):
    """The row of a LoggedRun in ``results``: a dict."""
    last = final(run.frame).iloc[-1]
    tallies = read_tallies(run.frame.attrs["comments"])
    watched_module = run.arguments["layer_noise"]
    if run.arguments["noise"] == 0 or watched_module == 0:  # none is slow, or one that reads no buffer
        watched_module = run.arguments["ncnn"] - 1
    watched = tallies[tallies["n"] == watched_module]
    row = {"setting": setting_of(run)}
    for name in VARIED:
        row[name] = run.arguments[name]
    row["slow_down"] = round(1 / (1 - run.arguments["noise"]), 3)
    row["test_top1"] = last["test_top1"]
    row["ensemble_top1"] = last["ensemble_top1"]
    row["staleness"] = watched["staleness"].mean()
    row["reuse"] = watched["reuse"].mean()
    row["skipped"] = tallies["skipped"].sum()
    row["log"] = run.path.name
    return row


def setting_of(run):
    """The arguments of a LoggedRun that no figure varies, if they differ from the defaults, and its data set."""
    defaults = vars(cifar_buffer.parse_args([]))
    words = []
    for name, value in run.arguments.items():
        if name not in VARIED and name not in FLAGS_OF_PLACE and value != defaults.get(name):
            words.append(f"{name}={value}")
    setting = " ".join(words) or "default flags"
    for comment in run.frame.attrs["comments"]:
        if comment.startswith("train: "):
            return f"{setting}, {comment.split(' of ')[-1]}"
    return setting


def table(frame):
    """For each setting in a data frame from ``results``: means over seeds of the final accuracies, their standard
    deviation (``spread``) and the number of seeds.
    """
    slow_module = frame["layer_noise"].where(frame["noise"] > 0, "-").astype(str)
    groups = frame.assign(module=slow_module).groupby(["setting", "buffer", "module", "slow_down"])
    summary = groups.agg(
        seeds=("seed", "nunique"),
        test_top1=("test_top1", "mean"),
        spread=("test_top1", "std"),
        ensemble_top1=("ensemble_top1", "mean"),
        staleness=("staleness", "mean"),
        reuse=("reuse", "mean"),
        skipped=("skipped", "mean"),
    )
    return summary.round(2)


class SlowModule(NamedTuple):
    """Which module of a run was slow, and how it was slowed down."""

    how: str  # "real" or "simulated"
    module: int | None  # None: none was slow
    factor: float


def slow_module_of(arguments):
    """The SlowModule of a run with these ``arguments``."""
    if "slow" in arguments:  # of cifar_buffer_distributed.py
        module, factor = arguments["slow"] or (None, 1.0)
        return SlowModule("real", module, factor)
    noise = arguments.get("noise", 0)
    module = arguments["layer_noise"] if noise else None
    return SlowModule("simulated", module, 1 / (1 - noise))


def side_by_side(folder, module):
    """A data frame with a row for each run in ``folder`` in which ``module`` or none is slow, either simulated or in
    real time with one process per module. The logs are .txt files, so that no other table includes them.

    Columns: how ("simulated", "real"), slow_down, log, and the means over the run of staleness and reuse of what
    ``module`` learned from.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.txt")):
        frame = read_log(path)
        slow = slow_module_of(frame.attrs["arguments"])
        if slow.factor > 1 and slow.module != module:
            continue
        tallies = read_tallies(frame.attrs["comments"])
        watched = tallies[tallies["n"] == module]
        rows.append(
            {
                "how": slow.how,
                "slow_down": round(slow.factor, 2),
                "log": path.name,
                "staleness": watched["staleness"].mean(),
                "reuse": watched["reuse"].mean(),
            }
        )
    return pd.DataFrame(rows).sort_values(["how", "slow_down"], ascending=[False, True], ignore_index=True)


def paces(folder, epoch):
    """A data frame of images/s in ``epoch`` of the real-time runs in ``folder`` (see ``side_by_side``), with a row for
    each module and a column for each slow-down factor.
    """
    columns = {}
    for path in sorted(Path(folder).glob("*.txt")):
        frame = read_log(path)
        slow = slow_module_of(frame.attrs["arguments"])
        if slow.how != "real":
            continue
        pace = {}
        for comment in frame.attrs["comments"]:
            match = PACE.fullmatch(comment)
            if match and int(match["epoch"]) == epoch:
                pace[int(match["module"])] = float(match["images_per_s"])
        columns[slow.factor] = pace
    return pd.DataFrame(columns).sort_index(axis="index").sort_index(axis="columns")
