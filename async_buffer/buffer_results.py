"""What the runs of cifar_buffer.py came to: the numbers behind the paper's Figs. 5 and 6 (Sec. 5.6). The runs are rows
of results/rows.csv, made by results/reproduce.py. And what those of cifar_buffer_distributed.py came to, beside them.
"""

from pathlib import Path

import cifar_buffer
import pandas as pd
from turns import tallies

from decoupled import InputError
from decoupled.logs import final, read_log
from decoupled.training import run as runs

VARIED = ("buffer", "noise", "layer_noise", "seed")
FLAGS_FREE_ON_RESUME = (*runs.FLAGS_FREE_ON_RESUME, "name", "device")  # where a run was made, not what it is


def renamed(arguments):
    """A log's arguments in today's words: earlier versions called priority_lifo lifo."""
    sampling = arguments.get("buffer_sampling")
    return arguments | {"buffer_sampling": "priority_lifo" if sampling == "lifo" else sampling}


def read_runs(folder):
    """Every log of cifar_buffer.py in ``folder``: a list of (path, arguments, frame, complete)."""
    found = []
    for path in sorted(Path(folder).glob("*.log")):
        try:
            frame = read_log(path)
        except InputError:  # no epoch is over yet
            continue
        arguments = renamed(frame.attrs["arguments"])
        if "own_epoch" in frame and set(VARIED) <= set(arguments):
            last = frame[frame["epoch"] == arguments["epochs"]]
            found.append((path, arguments, frame, set(last["n"]) == set(range(arguments["ncnn"]))))
    return found


def results(folder):
    """A frame with a row for each complete log in ``folder``. Columns:

    setting                     the arguments that no figure varies, where they differ from the defaults, and the data
    buffer, noise, layer_noise, seed, slow_down
    test_top1, ensemble_top1    of the last head and of the ensemble of all, in %, after the last epoch
    staleness, reuse            means over the run, of the slowed-down module; of the last one, where none or the
                                lowest is slowed down
    skipped                     turns, of all modules
    """
    rows, published = [], renamed(vars(cifar_buffer.parse_args([])))
    for path, arguments, frame, complete in read_runs(folder):
        if not complete:
            continue
        top = final(frame).iloc[-1]
        turns = tallies(frame.attrs["comments"])
        watched = turns[
            turns["n"] == ((arguments["layer_noise"] if arguments["noise"] else 0) or arguments["ncnn"] - 1)
        ]
        fixed = {
            key: value
            for key, value in arguments.items()
            if key not in (*VARIED, *FLAGS_FREE_ON_RESUME) and value != published.get(key)
        }
        images = next((line for line in frame.attrs["comments"] if line.startswith("train: ")), "").split(" of ")[-1]
        setting = " ".join(f"{key}={value}" for key, value in fixed.items()) or "default flags"
        setting += f", {images}" * bool(images)
        row = {
            "setting": setting,
            **{key: arguments[key] for key in VARIED},
            "slow_down": round(1 / (1 - arguments["noise"]), 3),
        }
        row |= {"test_top1": top["test_top1"], "ensemble_top1": top["ensemble_top1"]}
        row |= {key: watched[key].mean() for key in ("staleness", "reuse")} | {
            "skipped": turns["skipped"].sum(),
            "log": path.name,
        }
        rows.append(row)
    columns = ["setting", *VARIED, "slow_down", "test_top1", "ensemble_top1", "staleness", "reuse", "skipped", "log"]
    return pd.DataFrame(rows, columns=columns)


def table(frame):
    """Mean, spread (standard deviation) and number of seeds of the final accuracies, for each setting of a frame from
    results.
    """
    groups = frame.assign(module=frame["layer_noise"].where(frame["noise"] > 0, "-").astype(str)).groupby(
        ["setting", "buffer", "module", "slow_down"]
    )
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


def side_by_side(folder, module):
    """A frame with a row for each log in ``folder`` (.txt, for they are no rows of the tables), of the simulation or of
    a process for each module, in which ``module`` or none is slow. Columns: how ("simulated", "real"), slow_down,
    test_top1 and ensemble_top1 as in ``results``, staleness and reuse of what ``module`` learned from, means over the
    run.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.txt")):
        frame = read_log(path)
        arguments, turns, top = frame.attrs["arguments"], tallies(frame.attrs["comments"]), final(frame).iloc[-1]
        real = "slow" in arguments
        simulated = arguments.get("layer_noise"), 1 / (1 - arguments.get("noise", 0))
        slow, factor = (arguments["slow"] or (module, 1.0)) if real else simulated
        if factor > 1 and slow != module:
            continue
        row = {"how": "real" if real else "simulated", "slow_down": round(factor, 2), "log": path.name}
        row |= {key: top[key] for key in ("test_top1", "ensemble_top1")}
        rows.append(row | {key: turns[turns["n"] == module][key].mean() for key in ("staleness", "reuse")})
    return pd.DataFrame(rows).sort_values(["how", "slow_down"], ascending=[False, True], ignore_index=True)
