"""Runs the grid of the paper's Fig. 5 or Fig. 6 (Sec. 5.6) with
cifar_buffer.py, one run after the other, and prints the table of what came out.

    python async_buffer/sweep.py --figure 5
    python async_buffer/sweep.py --figure 6 --buffers 1 5 30 -- --feature_size 32 --nepochs 10 --epochdecay 3

Fig. 5: each layer slowed down in turn, with one size of the buffer. Fig. 6: one
layer slowed down, with several sizes. A run that has a complete log in
--log-dir is not made again, an interrupted one is resumed; the two grids share
the runs they have in common. Flags after -- are cifar_buffer.py's. The
checkpoint of a finished run, which holds its buffers, is deleted.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cifar_buffer
import pandas as pd
from turns import number, tallies

from decoupled import InputError, runs
from decoupled.logs import final, read_log

VARIED = ("buffer", "noise", "layer_noise", "seed")
ELSEWHERE = (*runs.WHEREABOUTS, "name", "device")  # where a run was made, not what it is


def parse_args(argv=None):
    parser = runs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = runs.whole_number(0)
    parser.add_argument("--figure", type=int, choices=(5, 6), required=True)
    parser.add_argument(
        "--slow-downs",
        type=number(least=1),
        nargs="+",
        metavar="FACTOR",
        help="(default: 1 1.1 1.2 1.5 2; in Fig. 6: 1 1.2 2)",
    )
    parser.add_argument(
        "--layers", type=count, nargs="+", metavar="LAYER", help="slowed down (default: all; in Fig. 6: 3)"
    )
    parser.add_argument(
        "--buffers", type=count, nargs="+", metavar="M", help="(0: synchronous; default: 30; in Fig. 6: 0 1 2 5 10 30)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--log-dir", default="results/async_buffer", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left to run, and the table")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of cifar_buffer.py")
    args = parser.parse_args(argv)
    five = args.figure == 5
    args.slow_downs = args.slow_downs or ([1, 1.1, 1.2, 1.5, 2] if five else [1, 1.2, 2])
    args.buffers = args.buffers or ([30] if five else [0, 1, 2, 5, 10, 30])
    args.layers = args.layers or (range(cifar_buffer.parse_args(args.flags).ncnn) if five else [3])
    return args


def grid(args):
    """The flags of each run, without repetitions: no layer is named where none is slowed down."""
    runs_of = {}
    for seed in args.seeds:
        for buffer in args.buffers:
            for factor in (
                args.slow_downs if buffer else [1]
            ):  # without buffers no layer waits for another, or they all do
                for layer in args.layers:
                    name, flags = f"buffer{buffer}-slow{factor:g}", ["--buffer", str(buffer)]
                    if factor > 1:
                        name, flags = (
                            f"{name}-layer{layer}",
                            [*flags, "--noise", f"{1 - 1 / factor:.6g}", "--layer_noise", str(layer)],
                        )
                    name = f"{name}-seed{seed}"
                    runs_of[name] = [
                        *args.flags,
                        *flags,
                        "--seed",
                        str(seed),
                        "--name",
                        name,
                        "--log-dir",
                        args.log_dir,
                    ]
    return list(runs_of.values())


def cell(arguments):
    """The place in a grid of a run's arguments: buffer, noise, slowed-down layer, seed."""
    return arguments["buffer"], arguments["noise"], arguments["layer_noise"], arguments["seed"]


def cells(figure):
    """The places of all runs of Fig. 5 or 6 with the default flags: a set."""
    return {cell(vars(cifar_buffer.parse_args(flags))) for flags in grid(parse_args(["--figure", str(figure)]))}


def what(arguments):
    """What of a run's arguments decides its result."""
    return {key: value for key, value in arguments.items() if key not in ELSEWHERE}


def renamed(arguments):
    """A log's arguments in today's words: earlier versions had no --avg_size and called priority_lifo lifo."""
    sampling = arguments.get("buffer_sampling")
    return {"avg_size": 16} | arguments | {"buffer_sampling": "priority_lifo" if sampling == "lifo" else sampling}


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

    setting                     the arguments that no grid varies, where they differ from the defaults
    buffer, noise, layer_noise, seed, slow_down
    test_top1, ensemble_top1    of the last layer and of the ensemble of all, in %, after the last epoch
    staleness, reuse            means over the run, of the slowed-down layer; of the last one, where none or the
                                lowest is slowed down
    skipped                     turns, of all layers
    """
    rows, published = [], vars(cifar_buffer.parse_args([]))
    for path, arguments, frame, complete in read_runs(folder):
        if not complete:
            continue
        top = final(frame).iloc[-1]
        turns = tallies(frame.attrs["comments"])
        watched = turns[
            turns["n"] == ((arguments["layer_noise"] if arguments["noise"] else 0) or arguments["ncnn"] - 1)
        ]
        fixed = {
            key: value for key, value in what(arguments).items() if key not in VARIED and value != published.get(key)
        }
        setting = " ".join(f"{key}={value}" for key, value in fixed.items()) or "default flags"
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
    groups = frame.assign(layer=frame["layer_noise"].where(frame["noise"] > 0, "-").astype(str)).groupby(
        ["setting", "buffer", "layer", "slow_down"]
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


def main():
    args = parse_args()
    runs.writable_folder(args.log_dir)
    todo = grid(args)
    expected = [
        what(vars(cifar_buffer.parse_args(flags))) for flags in todo
    ]  # a bad flag ends the sweep before the first run
    for index, (flags, arguments) in enumerate(zip(todo, expected, strict=True), start=1):
        same = [(path, complete) for path, its, _, complete in read_runs(args.log_dir) if what(its) == arguments]
        if any(complete for _, complete in same):
            continue
        checkpoints = [path.with_suffix(".pt") for path, _ in same if path.with_suffix(".pt").is_file()]
        command = [
            sys.executable,
            os.path.relpath(cifar_buffer.__file__),
            *flags,
            *(["--resume", str(checkpoints[-1])] if checkpoints else []),
        ]
        print(f"run {index} of {len(todo)}: {shlex.join(['python', *command[1:]])}", flush=True)
        if args.dry_run:
            continue
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise InputError(
                f"run {index} of {len(todo)} ended with exit code {done.returncode}: the same "
                "command goes on from there"
            )
        for path, its, _, complete in read_runs(args.log_dir):
            if complete and what(its) == arguments:
                path.with_suffix(".pt").unlink(missing_ok=True)
    frame = results(args.log_dir)
    for setting, rows in table(frame).groupby(level="setting"):
        print(f"\n{setting}\n{rows.droplevel('setting').to_string()}")
    if frame.empty:
        print(f"no complete log in {args.log_dir}")


if __name__ == "__main__":
    runs.start(main)
