"""Exports logs, as one table or for TensorBoard:

python -m decoupled export LOG… --csv FILE            rows: log, n, epoch, results
python -m decoupled export LOG… --tensorboard DIR     a run for each log
"""

from pathlib import Path

import pandas as pd

from decoupled.errors import InputError
from decoupled.logs import read_log


def to_csv(frames, path):
    """Writes ``frames``, {path: frame from read_log}, as one table: read_log's columns after "log", the file's name."""
    names = [Path(log).name for log in frames]
    pd.concat(frames.values(), keys=names, names=["log"]).reset_index("log").to_csv(path, index=False)


def to_tensorboard(frames, folder):
    """Writes ``frames``, {path: frame from read_log}, as scalars "column/head n" by epoch, each log a run in a folder
    of its own under ``folder``. Raises InputError where tensorboard is not installed or such a folder is there already.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package: pip install tensorboard, or export with --csv") from error
    runs = {Path(folder) / Path(log).stem: frame for log, frame in frames.items()}
    for run in runs:
        if run.exists():
            raise InputError(f"--tensorboard: {run} is there already: remove it, or name another folder")
    for run, frame in runs.items():
        with SummaryWriter(str(run)) as writer:
            for row in frame.to_dict("records"):
                for column in row.keys() - {"n", "epoch"}:
                    writer.add_scalar(f"{column}/head {row['n']}", row[column], row["epoch"])


def main():
    from decoupled.errors import writing
    from decoupled.training import flags

    parser = flags.Parser("Exports logs, as one table or for TensorBoard.")
    parser.add_argument("logs", metavar="LOG", nargs="+", type=flags.path, help="a log")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--csv", metavar="FILE", type=flags.path, help="a table: log, n, epoch and the log's results")
    tensorboard = "scalars by epoch, each log a run in a folder under DIR; needs the package tensorboard"
    way.add_argument("--tensorboard", metavar="DIR", type=flags.path, help=tensorboard)
    args = parser.parse_args()
    frames = {log: read_log(log) for log in args.logs}
    names = [Path(log).name for log in frames]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two of the logs are called {min(repeated)}: export them one by one, or rename one")
    target = args.csv or args.tensorboard
    with writing(target, "name another place, or make room or access there"):
        (to_csv if args.csv else to_tensorboard)(frames, target)
    print(f"exported: {target}")


if __name__ == "__main__":
    from decoupled.training import flags

    flags.start(main)
