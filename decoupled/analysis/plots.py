"""Figures of logs, in one style for the notebooks and the command line:

python -m decoupled plot LOG… [--heads all|last|1,4] [--output curves.png]

Logs that differ in the seed only are drawn as one: the mean, and a band from
the lowest to the highest. --output's suffix says the format: .png, .pdf, .svg.
"""

import argparse
import re
from pathlib import Path

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.ticker import MaxNLocator

from decoupled.errors import InputError, writing
from decoupled.logs import EDITED, STAMP, final, read_log
from decoupled.training import flags
from decoupled.training.run import FLAGS_FREE_ON_RESUME

LABELS = {
    "loss": "training loss",
    "train_top1": "train top-1 (%)",
    "test_top1": "test top-1 (%)",
    "ensemble_top1": "ensemble test top-1 (%)",
}


# Okabe and Ito's colors, which the color-blind can tell apart, without the yellow, and a marker for each: in print too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MARKERS = "osD^vPX"


LINES = ("-", "--", ":", "-.")  # of curves beneath others


STYLE = {  # pyplot.style.use(STYLE)
    "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.titlesize": "medium",
    "grid.alpha": 0.3,
    "legend.fontsize": "small",
    "legend.framealpha": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 150,
    "svg.fonttype": "none",
}


def styles(names):
    """A color and a marker for each of ``names``: {name: {"color": …, "marker": …}}."""
    return {
        name: {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, name in enumerate(names)
    }


METHODS = styles(("DGL", "back-propagation", "DDG", "DNI", "cDNI", "checkpointing"))  # alike in every figure


def curves(axes, frames, column, heads=None, label="head {n}", **style):
    """Draws ``column`` of a frame from read_log by epoch on ``axes``, a line for each head, and labels the axes.

    ``frames`` may be several that differ in the seed only: the line is their mean, the band about it goes from the
    lowest to the highest; epochs that one of them has not reached are left out. ``heads``: numbers, or "last"; all by
    default. ``label`` is formatted with n. Returns the lines.
    """
    frames = [frames] if isinstance(frames, pd.DataFrame) else list(frames)
    rows = pd.concat([frame[["n", "epoch", column]] for frame in frames], ignore_index=True)
    heads = [rows["n"].max()] if isinstance(heads, str) else heads
    lines = []
    for n, of_head in rows.groupby("n"):
        if heads is not None and n not in heads:
            continue
        over = of_head.groupby("epoch")[column].agg(["mean", "min", "max", "size"])
        over = over[over["size"] == over["size"].max()]
        look = {"color": COLORS[(n - 1) % len(COLORS)], "marker": MARKERS[(n - 1) % len(MARKERS)]}
        every = -(-len(over) // 12)  # markers of lines that coincide alternate
        look |= {"markevery": (len(axes.lines) % every, every)}
        lines += axes.plot(over.index, over["mean"], label=label.format(n=n), **look | style)
        if len(frames) > 1:
            axes.fill_between(over.index, over["min"], over["max"], color=lines[-1].get_color(), alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.set_ylabel(LABELS.get(column, column))
    return lines


def reference_curves(axes, frame, column, heads=None, label="authors' log", **style):
    """As curves, wide and grey beneath the others: the curves that ours are compared with."""
    beneath = {"color": "0.75", "linewidth": 3, "marker": "", "zorder": 1}
    return curves(axes, frame, column, heads, label, **beneath | style)


def authors_curves(names):
    """{label: frame} of the authors' published logs, of results/authors_curves.csv; ``names`` without .log."""
    table = pd.read_csv(results_folder() / "authors_curves.csv")
    if missing := [name for name in names if f"{name}.log" not in set(table["log"])]:
        known = ", ".join(name.removesuffix(".log") for name in table["log"].unique())
        raise InputError(f"the authors have no log {missing[0]!r}: choose from {known}")
    return {f"{name}, authors": table[table["log"] == f"{name}.log"] for name in names}


def points(axes, values, **style):
    """Draws the mean, and as a bar the range, of the ``values`` at each place: a Series whose index says the place on
    the x axis, with a row for each seed. Returns matplotlib's container.
    """
    over = values.groupby(level=0, sort=False).agg(["mean", "min", "max"])
    around = [over["mean"] - over["min"], over["max"] - over["mean"]]
    return axes.errorbar(over.index, over["mean"], yerr=around, **{"capsize": 3, "elinewidth": 1} | style)


def legend_below(figure, **style):
    """One legend of all panels of ``figure`` beneath them, each label once."""
    shown = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
    columns = max(1, int(11 * figure.get_figwidth()) // (8 + max(map(len, entries), default=0)))
    return figure.legend(entries.values(), entries, **{"loc": "outside lower center", "ncols": columns} | style)


def learning_curves(runs, heads=None, title="", beneath=None):
    """A figure of ``runs``, {label: frames of its seeds}, of whichever experiment: training loss, where all have one,
    else train top-1, and test top-1 by epoch.

    Of a single run every head is drawn, of several runs the last; ``heads`` (numbers, "all" or "last") says otherwise.
    Several runs' heads have panels of their own. ``beneath``, {label: frame}, are drawn grey.
    """
    from matplotlib import pyplot

    frames = [frame for of_run in runs.values() for frame in of_run]
    columns = ("loss" if all("loss" in frame for frame in frames) else "train_top1", "test_top1")
    heads = heads or ("all" if len(runs) == 1 else "last")
    numbers = sorted({n for frame in frames for n in frame["n"]}) if heads == "all" else heads
    rows = [numbers] if len(runs) == 1 or heads == "last" else [[n] for n in numbers]
    with pyplot.style.context(STYLE):
        size = (10, 3.6 * len(rows) + (0.2 * len(runs) if len(runs) > 1 else 0.4))
        figure, panels = pyplot.subplots(len(rows), 2, figsize=size, squeeze=False, sharex=True)
        for of_row, shown in zip(panels, rows, strict=True):
            for axes, column in zip(of_row, columns, strict=True):
                for (name, frame), line in zip((beneath or {}).items(), LINES, strict=False):
                    reference_curves(axes, frame, column, shown, name, linestyle=line)
                for (name, of_run), style in zip(runs.items(), styles(runs).values(), strict=True):
                    look = {"label": name.replace("{", "{{").replace("}", "}}"), **style} if len(runs) > 1 else {}
                    curves(axes, of_run, column, heads=shown, **look)
                axes.set_title(f"head {shown[0]}" if len(rows) > 1 else "")
        for axes in panels[:-1].flat:
            axes.set_xlabel("")
        legend_below(figure, title="mean and range over seeds" if len(frames) > len(runs) else None)
        figure.suptitle(title.replace("$", r"\$"))
    return figure


def about(frame):
    """What a run is, as text by name, of a frame from read_log: script, images, flags; not where it was made, nor its
    seed.
    """
    arguments = {
        key: value for key, value in frame.attrs["arguments"].items() if key not in (*FLAGS_FREE_ON_RESUME, "device")
    }
    arguments["name"] = without_seed(str(arguments.get("name", "")))
    lines = dict(line.split(": ", 1) for line in frame.attrs["comments"] if ": " in line)
    script = re.search(r"([\w-]+)/(\w+)\.py", lines.get("command", "")) or ("", "", "")
    what = {"experiment": script[1], "script": script[2], "images": lines.get("train", ""), **arguments}
    return {key: str(value) for key, value in what.items() if key != "seed"}


def without_seed(name):
    return re.sub(r"[-_]?seed[-_]?\d+", "", name)


def group_seeds(frames):
    """Groups ``frames``, {path: frame from read_log}, that differ in the seed only: {label: frames of its seeds}.

    Labels name the script, images and flags in which the groups differ; the log, where those are none or many.
    """
    groups = {}  # {what the runs have in common, as pairs: {seed: path}}
    for path, frame in frames.items():
        key, seed = tuple(about(frame).items()), frame.attrs["arguments"].get("seed")
        while seed in groups.setdefault(key, {}):
            key += (("again", ""),)  # the same run twice is not two seeds
        groups[key][seed] = path
    whats = [dict(key) for key in groups]
    flags_of_all = [key for key in whats[0] if all(key in what for what in whats) and key != "name"]
    differ = [key for key in flags_of_all if len({what[key] for what in whats}) > 1]
    labels = [
        ", ".join(f"{key} {what[key]}" if key in frame.attrs["arguments"] else what[key] for key in differ)
        for what in whats
    ]
    named = {}
    for label, seeds in zip(labels, groups.values(), strict=True):
        if len(differ) > 3 or not label or labels.count(label) > 1:
            label = Path(next(iter(seeds.values()))).stem
            label = re.sub(f"-{STAMP.pattern}$", "", without_seed(label) if len(seeds) > 1 else label)
        label += f" ({len(seeds)} seeds)" * (len(seeds) > 1)
        named[label if label not in named else f"{label} [{len(named) + 1}]"] = [
            frames[path] for path in seeds.values()
        ]
    return named


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


def some_heads(text):
    """An argparse type: all, last, or numbers of heads."""
    if text in ("all", "last"):
        return text
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} must be all, last, or numbers such as 1,4")
    return [int(n) for n in text.split(",")]


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("logs", metavar="LOG", nargs="+", type=flags.path, help="a log, or a folder: its newest log")
    which = "all, last, or numbers such as 1,4; by default all of a single run, of several runs the last"
    parser.add_argument("--heads", metavar="HEADS", type=some_heads, help=which)
    beneath = "authors' curves to draw beneath, grey: parallel, sequential, backprop, dgl, cdni, dni"
    parser.add_argument("--authors", nargs="+", default=[], metavar="NAME", help=beneath)
    output = {"metavar": "FILE", "default": "curves.png", "type": flags.path, "help": "where the figure goes"}
    parser.add_argument("--output", **output)
    args = parser.parse_args()
    matplotlib.use("Agg")
    frames = {log: read_log(log) for log in map(newest_log, args.logs)}
    runs = group_seeds(frames)
    for n in args.heads if isinstance(args.heads, list) else []:
        if not any((frame["n"] == n).any() for frame in frames.values()):
            parser.error(f"--heads: no log has head {n}")
    datasets = {frame.attrs["arguments"].get("dataset", "") for frame in frames.values()} - {""}
    title = ", ".join([*(runs if len(runs) == 1 else []), *(datasets if len(datasets) == 1 else [])])
    figure = learning_curves(runs, args.heads, title, authors_curves(args.authors))
    kinds = figure.canvas.get_supported_filetypes()
    if Path(args.output).suffix.lstrip(".").lower() not in kinds:
        parser.error(f"--output {args.output} must end in one of {', '.join(f'.{kind}' for kind in kinds)}")
    with matplotlib.rc_context(STYLE), writing(args.output, "name another --output, or make room or access there"):
        figure.savefig(args.output)
    for log, frame in frames.items():
        if damaged := frame.attrs["damaged"]:
            numbers = ", ".join(map(str, damaged[:10]))
            print(f"left out, because they are damaged: {len(damaged)} lines of {log}, from line {numbers}")
    for name, of_run in runs.items():
        last = pd.concat([final(frame)["test_top1"] for frame in of_run]).groupby("n").mean()
        scores = ", ".join(f"head {n} {top1:.2f} %" for n, top1 in last.items())
        print(f"{name}, test top-1 at the end: {scores}")
    print(f"learning curves: {args.output}")


if __name__ == "__main__":
    flags.start(main)
