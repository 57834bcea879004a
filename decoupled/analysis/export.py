"""Exports logs, as one table or for TensorBoard:

python -m decoupled export LOG… --csv FILE            one row per head and epoch
python -m decoupled export LOG… --tensorboard DIR     one TensorBoard run per log

A LOG may be a folder: then all its logs.
"""

from pathlib import Path

import pandas as pd

from decoupled.errors import InputError, writing
from decoupled.logs import logs_in, read_log
from decoupled.training import flags


def to_csv(frames, path):
    """Writes ``frames``, {path: frame from read_log}, as one table: "log", the file's name, then read_log's columns."""
    named = []
    for log, frame in frames.items():
        frame = frame.copy()
        frame.insert(0, "log", Path(log).name)
        named.append(frame)
    pd.concat(named).to_csv(path, index=False)


def to_tensorboard(frames, folder):
    """Writes ``frames``, {path: frame from read_log}, as scalars "column/head n" by epoch, each log as a run in a
    folder of its own under ``folder``. Raises InputError where tensorboard is not installed or such a folder exists.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package: pip install tensorboard, or export with --csv") from error
    runs = {Path(folder) / Path(log).stem: frame for log, frame in frames.items()}
    for run in runs:
        if run.exists():
            raise InputError(f"--tensorboard: {run} exists already: remove it, or name another folder")
    for run, frame in runs.items():
        with SummaryWriter(str(run)) as writer:
            for row in frame.to_dict("records"):
                n = row.pop("n")
                epoch = row.pop("epoch")
                for column, value in row.items():
                    writer.add_scalar(f"{column}/head {n}", value, epoch)


def parse_args():
    parser = flags.Parser(__doc__)
    parser.prog = "python -m decoupled export"
    parser.add_argument("logs", metavar="LOG", nargs="+", type=flags.path, help="a log, or a folder: all its logs")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--csv", metavar="FILE", type=flags.path, help="write a table: the log, n, epoch and the log's results"
    )
    group.add_argument(
        "--tensorboard",
        metavar="DIR",
        type=flags.path,
        help="write scalars by epoch, each log as a run in a folder under DIR; needs the package tensorboard",
    )
    return parser.parse_args()


def list_logs(paths):
    """The logs at ``paths``: of a folder all. Raises InputError if a folder has none."""
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
        name = Path(log).name
        if name in names:
            raise InputError(f"two of the logs are called {name}: export them one by one, or rename one")
        names.add(name)
        frames[log] = read_log(log)
    with writing(args.csv or args.tensorboard, "name another place, or make room or access there"):
        if args.csv:
            to_csv(frames, args.csv)
        else:
            to_tensorboard(frames, args.tensorboard)
    print(f"exported: {args.csv or args.tensorboard}")
