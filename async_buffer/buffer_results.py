"""The results of the runs of cifar_buffer.py: the numbers behind the paper's Figs. 5 and 6 (Sec. 5.6), and beside them
the results of cifar_buffer_distributed.py. The runs are rows of results/rows.csv.
"""

from pathlib import Path
from typing import NamedTuple

import cifar_buffer
import pandas as pd
from turns import tallies

from decoupled import InputError
from decoupled.logs import final, read_log
from decoupled.training import run as runs

VARIED = ("buffer", "noise", "layer_noise", "seed")  # arguments that the figures vary

# Arguments that say where a run was made, not what it is
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


class LoggedRun(NamedTuple):
    """A log of cifar_buffer.py."""

    path: Path
    arguments: dict
    frame: pd.DataFrame
    complete: bool  # has the last epoch of all modules


def current_names(arguments):
    """A log's arguments under their current names: earlier versions called priority_lifo lifo."""
    if arguments.get("buffer_sampling") == "lifo":
        return {**arguments, "buffer_sampling": "priority_lifo"}
    return arguments


def read_runs(folder):
    """A list with the LoggedRun of every log of cifar_buffer.py in ``folder``."""
    found = []
    for path in sorted(Path(folder).glob("*.log")):
        try:
            frame = read_log(path)
        except InputError:  # no epoch is finished yet
            continue
        arguments = current_names(frame.attrs["arguments"])
        if "own_epoch" not in frame or not set(VARIED) <= set(arguments):
            continue  # a log of another script
        last_epoch = frame[frame["epoch"] == arguments["epochs"]]
        complete = set(last_epoch["n"]) == set(range(arguments["ncnn"]))
        found.append(LoggedRun(path, arguments, frame, complete))
    return found


def results(folder):
    """A data frame with a row for each complete log in ``folder``. Columns:

    setting                     arguments that no figure varies, where they differ from the defaults, and the data set
    buffer, noise, layer_noise, seed, slow_down
    test_top1, ensemble_top1    in % after the last epoch, of the last head and of the ensemble of all heads
    staleness, reuse            means over the run: of the slow module; of the last module when none or the lowest is
                                slow
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
    turns = tallies(run.frame.attrs["comments"])
    slow_module = run.arguments["layer_noise"] if run.arguments["noise"] else 0
    watched_module = slow_module or run.arguments["ncnn"] - 1
    watched = turns[turns["n"] == watched_module]
    row = {"setting": setting_of(run)}
    for name in VARIED:
        row[name] = run.arguments[name]
    row["slow_down"] = round(1 / (1 - run.arguments["noise"]), 3)
    row["test_top1"] = last["test_top1"]
    row["ensemble_top1"] = last["ensemble_top1"]
    row["staleness"] = watched["staleness"].mean()
    row["reuse"] = watched["reuse"].mean()
    row["skipped"] = turns["skipped"].sum()
    row["log"] = run.path.name
    return row


def setting_of(run):
    """The arguments of a LoggedRun that no figure varies, where they differ from the defaults, and its data set."""
    defaults = current_names(vars(cifar_buffer.parse_args([])))
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
    """Means over seeds of the final accuracies, their standard deviation (``spread``) and the number of seeds, for each
    setting of a data frame from ``results``.
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


def slow_module_of(arguments, module):
    """(how, slow module, slow-down) of a run with these ``arguments``: "real" or "simulated". Where none is slow, the
    slow module is ``module``, slowed down by 1.
    """
    if "slow" in arguments:  # of cifar_buffer_distributed.py
        slow, factor = arguments["slow"] or (module, 1.0)
        return "real", slow, factor
    factor = 1 / (1 - arguments.get("noise", 0))
    return "simulated", arguments.get("layer_noise") if factor > 1 else module, factor


def side_by_side(folder, module):
    """A data frame with a row for each run in ``folder``, simulated or in real time with a process for each module, in
    which ``module`` or none is slow. The logs are .txt files, because they are no rows of the other tables.

    Columns: how ("simulated", "real"), slow_down, log, test_top1 and ensemble_top1 as in ``results``, staleness and
    reuse of what ``module`` learned from, means over the run.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.txt")):
        frame = read_log(path)
        how, slow_module, factor = slow_module_of(frame.attrs["arguments"], module)
        if factor > 1 and slow_module != module:
            continue
        last = final(frame).iloc[-1]
        turns = tallies(frame.attrs["comments"])
        watched = turns[turns["n"] == module]
        rows.append(
            {
                "how": how,
                "slow_down": round(factor, 2),
                "log": path.name,
                "test_top1": last["test_top1"],
                "ensemble_top1": last["ensemble_top1"],
                "staleness": watched["staleness"].mean(),
                "reuse": watched["reuse"].mean(),
            }
        )
    return pd.DataFrame(rows).sort_values(["how", "slow_down"], ascending=[False, True], ignore_index=True)
