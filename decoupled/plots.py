"""The figures the notebooks share, drawn from logs.

python -m decoupled.plots LOG [--output curves.png]
"""

from pathlib import Path

import matplotlib

from decoupled import InputError, checkpoints, flags
from decoupled.logs import read_log

LABELS = {
    "loss": "training loss",
    "train_top1": "train top-1 (%)",
    "test_top1": "test top-1 (%)",
    "ensemble_top1": "ensemble test top-1 (%)",
}


def curves(axes, frame, column, heads=None, label="head {n}", **style):
    """Draws ``column`` of a frame from read_log by epoch on ``axes``, a line for each head (or those in ``heads``), and
    labels the axes.

    ``label`` is formatted with n. Returns the lines.
    """
    lines = []
    for n, rows in frame.groupby("n"):
        if heads is None or n in heads:
            colour = {"color": f"C{n - 1}"} if "color" not in style else {}
            lines += axes.plot(rows["epoch"], rows[column], label=label.format(n=n), **colour, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel(LABELS.get(column, column))
    axes.grid(alpha=0.3)
    return lines


def reference_curves(axes, frame, column, heads=None, label="authors' log", **style):
    """As curves, wide and grey beneath the others: the curves that ours are compared with."""
    return curves(axes, frame, column, heads, label, **{"color": "0.75", "linewidth": 3, "zorder": 1} | style)


def learning_curves(frame, title=""):
    """A figure of one log: training loss and test top-1 of every head by epoch."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, column in zip(panels, ("loss", "test_top1"), strict=True):
        curves(axes, frame, column, marker="." if frame["epoch"].nunique() < 30 else "")
    panels[1].legend()
    figure.suptitle(title)
    return figure


def newest_log(path):
    """``path`` itself, or the newest log in it when it is a folder. Raises InputError when there is none."""
    path = Path(path)
    logs = sorted(path.glob("*.log"), key=lambda log: log.stat().st_mtime) if path.is_dir() else [path]
    if not logs:
        raise InputError(f"there is no log in {path}")
    return logs[-1]


def main():
    parser = flags.Parser("Draws training loss and test accuracy of every head of a log.")
    parser.add_argument("log", help="a log, or a folder: its newest log is drawn")
    parser.add_argument("--output", metavar="PNG", default="curves.png", help="where the figure goes")
    args = parser.parse_args()
    matplotlib.use("Agg")
    log = newest_log(args.log)
    frame = read_log(log)
    dataset = frame.attrs["arguments"].get("dataset", "")
    figure = learning_curves(frame, title=f"{log.stem} ({dataset})" if dataset else log.stem)
    with checkpoints.writing(args.output):
        figure.savefig(args.output, dpi=150)
    print(f"learning curves: {args.output}")


if __name__ == "__main__":
    flags.start(main)
