"""The figures the notebooks share, drawn from logs.

python -m decoupled.plots LOG [--output curves.png]
"""

import re
from pathlib import Path

import matplotlib

from decoupled import InputError, flags
from decoupled.checkpoints import EDITED, STAMP, writing
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
            colour = {"color": f"C{(n - 1) % 10}"} if "color" not in style else {}
            lines += axes.plot(rows["epoch"], rows[column], label=label.format(n=n), **colour, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel(LABELS.get(column, column))
    axes.grid(alpha=0.3)
    return lines


def reference_curves(axes, frame, column, heads=None, label="authors' log", **style):
    """As curves, wide and grey beneath the others: the curves that ours are compared with."""
    return curves(axes, frame, column, heads, label, **{"color": "0.75", "linewidth": 3, "zorder": 1} | style)


def learning_curves(frame, title=""):
    """A figure of one log, whichever experiment's: training loss, where it has one, else train top-1, and test top-1 of
    every head by epoch.
    """
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, column in zip(panels, ("loss" if "loss" in frame else "train_top1", "test_top1"), strict=True):
        curves(axes, frame, column, marker="." if frame["epoch"].nunique() < 30 else "")
    panels[1].legend()
    figure.suptitle(title.replace("$", r"\$"))
    return figure


def newest_log(path):
    """``path`` itself, or in a folder the log of the run that began last, by the time in its name; logs without one
    come first. Raises InputError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    logs = [log for log in path.glob("*.log") if not EDITED.search(log.name)]
    if not logs:
        raise InputError(f"there is no log in {path}")

    def began(log):
        match = re.search(f"-{STAMP.pattern}$", log.stem)
        return (match[1], int(match[2] or 0)) if match else ("", 0)

    return max(logs, key=lambda log: (*began(log), log.stat().st_mtime_ns))


def results_folder():
    """The repository's folder of results, seen from the folder where a notebook was opened, or from this package.

    Raises InputError when there is none.
    """
    package = Path(__file__).resolve().parent
    for folder in (Path.cwd(), *Path.cwd().parents, package.parent):
        if (folder / "results" / "rows.csv").is_file():
            return folder / "results"
    raise InputError(
        f"no folder of results is above {Path.cwd()}: open the notebook from its place in a clone of the repository"
    )


def main():
    parser = flags.Parser("Draws training loss and test accuracy of every head of a log.")
    parser.add_argument("log", type=flags.path, help="a log, or a folder: its newest log is drawn")
    output = {"metavar": "PNG", "default": "curves.png", "type": flags.path, "help": "where the figure goes"}
    parser.add_argument("--output", **output)
    args = parser.parse_args()
    matplotlib.use("Agg")
    log = newest_log(args.log)
    frame = read_log(log)
    dataset = frame.attrs["arguments"].get("dataset", "")
    figure = learning_curves(frame, title=f"{log.stem} ({dataset})" if dataset else log.stem)
    kinds = figure.canvas.get_supported_filetypes()
    if Path(args.output).suffix.lstrip(".").lower() not in kinds:
        parser.error(f"--output {args.output} must end in one of {', '.join(f'.{kind}' for kind in kinds)}")
    with writing(args.output, "name another --output, or make room or access there"):
        figure.savefig(args.output, dpi=150)
    if frame.attrs["damaged"]:
        numbers = ", ".join(map(str, frame.attrs["damaged"][:10]))
        print(f"left out, because they are damaged: {len(frame.attrs['damaged'])} lines of {log}, from line {numbers}")
    print(f"learning curves: {args.output}")


if __name__ == "__main__":
    flags.start(main)
