"""Figures from logs, in one style for the notebooks and the command line:

python -m decoupled plot LOG… [--heads all|last|1,4] [--output curves.png]
python -m decoupled plot DIR --all --table

Logs that differ only in the seed are drawn as one curve: their mean, and a band
from the lowest to the highest. The suffix of --output chooses the format: .png,
.pdf or .svg. --table prints a table of the results instead.
"""

import argparse
import math
import re
from pathlib import Path

import matplotlib
import matplotlib.style
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from decoupled.errors import InputError, writing
from decoupled.logs import final, logs_in, parse_run_name, read_log
from decoupled.training import flags
from decoupled.training.run import FREE_ON_RESUME

LABELS = {
    "loss": "training loss",
    "train_top1": "train top-1 (%)",
    "test_top1": "test top-1 (%)",
    "ensemble_top1": "ensemble test top-1 (%)",
}

# Okabe and Ito's colors, which color-blind readers can tell apart, without the yellow; and markers, for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MARKERS_PER_LINE = 12  # at most
REFERENCE_LINES = ("-", "--", ":", "-.")

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


METHODS = styles(("DGL", "back-propagation", "DDG", "DNI", "cDNI", "checkpointing"))  # the same in every figure


def curves(axes, frames, column, heads=None, label="head {n}", **style):
    """Draws ``column`` by epoch on ``axes``, one line per head, and labels the axes. Returns the lines.

    ``frames`` is a frame from read_log, or several that differ only in the seed. For several, the line is their mean
    and a band shows their range; epochs that not all of them have are left out. ``heads``: numbers, or "last"; default:
    all. ``label`` is formatted with n.
    """
    frames = [frames] if isinstance(frames, pd.DataFrame) else list(frames)
    rows = pd.concat([frame[["n", "epoch", column]] for frame in frames], ignore_index=True)
    if heads == "last":
        heads = [min(frame["n"].max() for frame in frames)]
    lines = []
    for n, rows_of_head in rows.groupby("n"):
        if heads is not None and n not in heads:
            continue
        seeds = rows_of_head.groupby("epoch")[column].agg(["mean", "min", "max", "size"])
        seeds = seeds[seeds["size"] == len(frames)]
        if seeds.empty:
            continue
        marker_distance = math.ceil(len(seeds) / MARKERS_PER_LINE)
        first_marker = (
            len(axes.lines) % marker_distance
        )  # shifted from line to line, so that all are visible where lines coincide
        look = {
            "color": COLORS[(n - 1) % len(COLORS)],
            "marker": MARKERS[(n - 1) % len(MARKERS)],
            "markevery": (first_marker, marker_distance),
        }
        (line,) = axes.plot(seeds.index, seeds["mean"], label=label.format(n=n), **(look | style))
        lines.append(line)
        if len(frames) > 1:
            axes.fill_between(seeds.index, seeds["min"], seeds["max"], color=line.get_color(), alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.set_ylabel(LABELS.get(column, column))
    return lines


def reference_curves(axes, frame, column, heads=None, label="authors' log", **style):
    """Like curves, but wide, gray and behind the other lines, for results to compare with."""
    look = {"color": "0.75", "linewidth": 3, "marker": "", "zorder": 1}
    return curves(axes, frame, column, heads, label, **(look | style))


def authors_curves(names):
    """{label: frame} of the authors' published logs, from results/authors_curves.csv; ``names`` without .log."""
    table = pd.read_csv(results_folder() / "authors_curves.csv")
    known = [log.removesuffix(".log") for log in table["log"].unique()]
    frames = {}
    for name in names:
        if name not in known:
            raise InputError(f"the authors have no log {name!r}: choose from {', '.join(known)}")
        frames[f"{name}, authors"] = table[table["log"] == f"{name}.log"]
    return frames


def points(axes, values, **style):
    """Draws the mean of ``values`` at each x, and their range as a bar. ``values`` is a Series with one row per seed;
    its index is x. Returns matplotlib's container.
    """
    seeds = values.groupby(level=0, sort=False).agg(["mean", "min", "max"])
    ranges = [seeds["mean"] - seeds["min"], seeds["max"] - seeds["mean"]]
    look = {"capsize": 3, "elinewidth": 1}
    return axes.errorbar(seeds.index, seeds["mean"], yerr=ranges, **(look | style))


def legend_below(figure, **style):
    """Adds one legend for all panels of ``figure``, below them, with each label once."""
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    entry_width = 8 + max(map(len, entries), default=0)  # in characters, including the line sample and the gap
    figure_width = int(11 * figure.get_figwidth())  # in characters, about 11 per inch
    layout = {"loc": "outside lower center", "ncols": max(1, figure_width // entry_width)}
    return figure.legend(entries.values(), entries, **(layout | style))


# Figures of whole runs


def learning_curves(runs, heads=None, title="", beneath=None):
    """A figure of ``runs``, {label: frames of its seeds}, of any experiment: training loss and test top-1 by epoch. If
    a run has no loss, train top-1 replaces it.

    ``heads``: numbers, "all" or "last"; default: all heads of a single run, the last of several runs. With several
    runs, each head has its own row of panels. ``beneath``, {label: frame}, is drawn in gray behind them.
    """
    frames = []
    for seeds in runs.values():
        frames += seeds
    if heads is None:
        heads = "all" if len(runs) == 1 else "last"
    if heads == "all":
        heads = known_heads(frames)
    has_loss = all("loss" in frame for frame in frames)
    columns = ("loss" if has_loss else "train_top1", "test_top1")
    if len(runs) == 1:
        heads_of_row = [heads]
        legend_height = 0.4
    else:
        heads_of_row = [heads] if heads == "last" else [[n] for n in heads]
        legend_height = 0.2 * len(runs)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(10, 3.6 * len(heads_of_row) + legend_height))
        panels = figure.subplots(len(heads_of_row), 2, squeeze=False, sharex=True)
        for row, shown in zip(panels, heads_of_row, strict=True):
            for axes, column in zip(row, columns, strict=True):
                draw_panel(axes, runs, column, shown, beneath or {})
                if len(heads_of_row) > 1:
                    axes.set_title(f"head {shown[0]}")
        for axes in panels[:-1].flat:
            axes.set_xlabel("")
        legend_title = "mean and range over seeds" if len(frames) > len(runs) else None
        legend_below(figure, title=legend_title)
        figure.suptitle(title.replace("$", r"\$"))
    return figure


def known_heads(frames):
    """The numbers of the heads that at least one of ``frames`` has, in order."""
    heads = set()
    for frame in frames:
        heads.update(frame["n"])
    return sorted(heads)


def draw_panel(axes, runs, column, heads, beneath):
    """Draws ``column`` of ``runs`` on ``axes``, with the reference curves ``beneath`` behind them."""
    for (name, frame), linestyle in zip(beneath.items(), REFERENCE_LINES, strict=False):
        reference_curves(axes, frame, column, heads, name, linestyle=linestyle)
    if len(runs) == 1:
        (seeds,) = runs.values()
        curves(axes, seeds, column, heads)
        return
    looks = styles(runs)
    for name, seeds in runs.items():
        label = name.replace("{", "{{").replace("}", "}}")
        curves(axes, seeds, column, heads, label, **looks[name])


# Which logs are seeds of the same run

DESCRIPTION = ("experiment", "script", "images")  # what identifies a run besides its flags


def describe_run(frame):
    """What identifies the run of a frame from read_log, {name: text}: script, images, flags and seed, but not where it
    ran.
    """
    comments = dict(line.split(": ", 1) for line in frame.attrs["comments"] if ": " in line)
    run = {"experiment": "", "script": "", "images": comments.get("train", ""), "name": ""}
    if match := re.search(r"([\w-]+)/(\w+)\.py", comments.get("command", "")):
        run["experiment"], run["script"] = match.groups()
    for flag, value in frame.attrs["arguments"].items():
        if flag not in (*FREE_ON_RESUME, "device"):
            run[flag] = str(value)
    run["name"] = without_seed(run["name"])
    return run


def without_seed(name):
    return re.sub(r"[-_]?seed[-_]?\d+", "", name)


def group_seeds(frames):
    """Groups the frames of ``frames``, {path: frame from read_log}, that differ only in the seed: {label: frames}.

    A label names the script, images and flags in which the groups differ or, if there are none or too many, the log.
    """
    runs = pd.DataFrame([{"seed": ""} | describe_run(frame) for frame in frames.values()], index=list(frames))
    compared = [column for column in runs if column != "seed"]
    repetition = runs.groupby([*compared, "seed"], dropna=False).cumcount()  # the same run given twice is not two seeds
    groups = [group for _, group in runs.groupby([*compared, repetition], dropna=False, sort=False)]

    in_all_runs = [column for column in compared if column != "name" and runs[column].notna().all()]
    differing = [column for column in in_all_runs if runs[column].nunique() > 1]
    labels = [label_by_difference(group, differing) for group in groups]
    grouped = {}
    for group, label in zip(groups, labels, strict=True):
        if not label or labels.count(label) > 1:
            label = label_by_name(group)
        if len(group) > 1:
            label = f"{label} ({len(group)} seeds)"
        if label in grouped:
            label = f"{label} [{len(grouped) + 1}]"
        grouped[label] = [frames[path] for path in group.index]
    return grouped


def label_by_difference(group, differing):
    """The label of the runs in ``group`` by the columns ``differing``; empty if there are too many of these for a
    label.
    """
    if len(differing) > 3:
        return ""
    words = []
    for column in differing:
        value = group[column].iloc[0]
        words.append(value if column in DESCRIPTION else f"{column} {value}")
    return ", ".join(words)


def label_by_name(group):
    """The label of the runs in ``group``: the name of the first log without its time and, if there are several runs,
    without its seed.
    """
    path = Path(group.index[0])
    name = parse_run_name(path)
    label = path.stem if name is None else name.prefix
    if len(group) > 1:
        label = without_seed(label)
    return label


# The command


def choose_logs(path, take_all=False):
    """A list of logs: ``path`` itself or, if it is a folder, its newest log, or all with ``take_all``. Says which one
    it is if there are others. Raises InputError if the folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = logs_in(path)
    if take_all or len(found) == 1:
        return found
    print(f"{path} has {len(found)} logs; using the newest, {found[-1].name} (--all: use all)")
    return found[-1:]


def results_table(runs):
    """A Markdown table of ``runs``, {label: frames of its seeds}: test top-1 (%) of each head at the last epoch; for
    several seeds, the mean and the range.
    """
    heads = sorted({n for seeds in runs.values() for frame in seeds for n in frame["n"]})
    lines = [["run", *(f"head {n}" for n in heads), "seeds"], ["---"] * (len(heads) + 2)]
    for label, seeds in runs.items():
        scores = pd.concat([final(frame)["test_top1"] for frame in seeds]).groupby("n").agg(["mean", "min", "max"])
        name = label.removesuffix(f" ({len(seeds)} seeds)").replace("|", r"\|")
        lines.append([name, *(score_cell(scores, n, len(seeds)) for n in heads), str(len(seeds))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_cell(scores, n, seeds):
    """The cell of head ``n`` in results_table; empty if the run has no such head."""
    if n not in scores.index:
        return ""
    mean, lowest, highest = scores.loc[n]
    if seeds == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ({lowest:.2f}–{highest:.2f})"


def results_folder():
    """The repository's results folder, found from the folder where a notebook was opened or from this package.

    Raises InputError if there is none.
    """
    repository = Path(__file__).resolve().parents[2]
    for folder in (Path.cwd(), *Path.cwd().parents, repository):
        if (folder / "results" / "rows.csv").is_file():
            return folder / "results"
    raise InputError(f"no results folder above {Path.cwd()}: open the notebook inside a clone of the repository")


def heads_argument(text):
    """An argparse type: all, last, or numbers of heads."""
    if text in ("all", "last"):
        return text
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} must be all, last, or numbers such as 1,4")
    return [int(n) for n in text.split(",")]


def figure_path(text):
    """An argparse type: a path with the suffix of a format that matplotlib writes."""
    kinds = Figure().canvas.get_supported_filetypes()
    if Path(text).suffix.lstrip(".").lower() not in kinds:
        suffixes = ", ".join(f".{kind}" for kind in kinds)
        raise argparse.ArgumentTypeError(f"{text} must end in one of {suffixes}")
    return flags.path(text)


def parse_args():
    parser = flags.Parser(__doc__)
    parser.prog = "python -m decoupled plot"
    parser.add_argument(
        "logs", metavar="LOG", nargs="+", type=flags.path, help="a log, or a folder, whose newest log is used"
    )
    parser.add_argument("--all", action="store_true", help="use all logs of a folder")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print a Markdown table instead: test top-1 of each head at the last epoch, mean and range over the seeds",
    )
    parser.add_argument(
        "--heads",
        metavar="HEADS",
        type=heads_argument,
        help="all, last, or numbers such as 1,4 (default: all of a single run, the last of several runs)",
    )
    parser.add_argument(
        "--authors",
        nargs="+",
        metavar="NAME",
        help="authors' curves to draw in gray: parallel, sequential, backprop, dgl, cdni, dni",
    )
    parser.add_argument(
        "--output", metavar="FILE", default="curves.png", type=figure_path, help="where the figure is written"
    )
    return parser, parser.parse_args()


def main():
    parser, args = parse_args()
    frames = {}
    for path in args.logs:
        for log in choose_logs(path, args.all):
            frames[log] = read_log(log)
    if isinstance(args.heads, list):
        known = known_heads(frames.values())
        for n in args.heads:
            if n not in known:
                parser.error(f"--heads: no log has head {n}")
    runs = group_seeds(frames)
    if args.table:
        print(results_table(runs))
        return
    figure = learning_curves(runs, args.heads, figure_title(runs, frames), authors_curves(args.authors or ()))
    with (
        matplotlib.rc_context(STYLE),
        writing(args.output, "name another --output, or free some space or get write access there"),
    ):
        figure.savefig(args.output)
    for log, frame in frames.items():
        print_damaged(log, frame)
    for name, seeds in runs.items():
        print(f"{name}, test top-1 at the end: {', '.join(final_scores(seeds))}")
    print(f"learning curves: {args.output}")


def final_scores(seeds):
    """The mean test top-1 of each head over ``seeds``, as text, at the last epoch that all of them have, which is named
    if some have more.
    """
    scores = []
    for n, rows in pd.concat(seeds).groupby("n"):
        epochs = rows.groupby("epoch")["test_top1"].agg(["mean", "size"])
        common = epochs[epochs["size"] == len(seeds)]
        if common.empty:
            continue
        score = f"head {n} {common['mean'].iloc[-1]:.2f} %"
        if common.index[-1] != epochs.index[-1]:
            score += f" (epoch {common.index[-1]}, the last of all seeds)"
        scores.append(score)
    return scores


def figure_title(runs, frames):
    """The label and data set of a single run, or the data set that several runs have in common."""
    datasets = {frame.attrs["arguments"].get("dataset", "") for frame in frames.values()}
    datasets.discard("")
    words = []
    if len(runs) == 1:
        (label,) = runs
        words.append(label)
    if len(datasets) == 1:
        (dataset,) = datasets
        words.append(dataset)
    return ", ".join(words)


def print_damaged(log, frame):
    """Prints which lines of ``log`` were skipped, if any."""
    damaged = frame.attrs["damaged"]
    if damaged:
        numbers = ", ".join(map(str, damaged[:10]))
        more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
        print(f"skipped in {log}, damaged or cut off: line {numbers}{more}")
