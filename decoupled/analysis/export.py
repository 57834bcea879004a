"""Exports logs, as one table or for TensorBoard:

    python -m decoupled export LOG… --csv FILE            one row per head and epoch
    python -m decoupled export LOG… --tensorboard DIR     one TensorBoard run per log

If a LOG is a folder, exports all its logs.
"""

import argparse
from pathlib import Path

import pandas as pd

from decoupled.analysis.plots import print_damaged
from decoupled.errors import InputError, writing
from decoupled.logs import logs_in, read_log
from decoupled.training import flags


def to_csv(frames, path):
    """Writes ``frames``, {log path: frame from read_log}, as one table: the log's file name in a column "log", then the
    columns of read_log.
    """
    tables = []
    for log, frame in frames.items():
        table = frame.copy()
        table.insert(0, "log", Path(log).name)
        tables.append(table)
    pd.concat(tables).to_csv(path, index=False)


def to_tensorboard(frames, folder):
    """Writes ``frames``, {log path: frame from read_log}, as scalars "column/head n" by epoch. Each log becomes a run
    in its own folder under ``folder``. Raises InputError if tensorboard is not installed or such a folder exists.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package: pip install tensorboard, or export with --csv") from error
    runs = {Path(folder) / Path(log).stem: frame for log, frame in frames.items()}
    for run in runs:
        if run.exists():
            raise InputError(f"--tensorboard: {run} already exists: remove it, or name another folder")
    for run, frame in runs.items():
        with SummaryWriter(str(run)) as writer:
            for row in frame.to_dict("records"):
                n = row.pop("n")
                epoch = row.pop("epoch")
                for column, value in row.items():
                    writer.add_scalar(f"{column}/head {n}", value, epoch)


def table_path(text):
    """An argparse type: the path of a table. It must not be a log, which would be overwritten, as with --csv *.log."""
    if Path(text).suffix in (".log", ".pt"):
        raise argparse.ArgumentTypeError(f"{text} is a run's file: name the table first, such as all.csv")
    return flags.path(text)


def parse_args():
    parser = flags.Parser(__doc__)
    parser.prog = "python -m decoupled export"
    parser.add_argument("logs", metavar="LOG", nargs="+", type=flags.path, help="a log, or a folder with logs")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--csv", metavar="FILE", type=table_path, help="write a table with the columns log, n, epoch and the results"
    )
    group.add_argument(
        "--tensorboard",
        metavar="DIR",
        type=flags.path,
        help="write scalars by epoch, each log as a run in its own folder under DIR (requires the package tensorboard)",
    )
    return parser.parse_args()


def list_logs(paths):
    """The logs at ``paths``, including all logs of a folder. Raises InputError if a folder has none."""
    found = []
    for path in paths:
        if Path(path).is_dir():
            found += logs_in(path)
        else:
            found.append(path)
    return found


def main():
    args = parse_args()
    frames = {}
    names = set()
    for log in list_logs(args.logs):
        name = Path(log).stem
        if name in names:
            raise InputError(f"{log} has the same file name as another log: export them one by one, or rename one")
        names.add(name)
        frames[log] = read_log(log)
    with writing(args.csv or args.tensorboard, "name another place, or free some space or get write access there"):
        if args.csv:
            to_csv(frames, args.csv)
        else:
            to_tensorboard(frames, args.tensorboard)
    for log, frame in frames.items():
        print_damaged(log, frame)
    print(f"exported: {args.csv or args.tensorboard}")
