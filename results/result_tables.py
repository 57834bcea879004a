"""The tables of the pages: Markdown made from the logs, the paper's numbers and the authors' curves, between markers

    <!-- table: NAME -->
    <!-- /table -->

Every value is one of the last epoch, or of the epochs named, never of the best one. Of three seeds or more a cell has
mean ± standard deviation, of two the mean (and each), of one its value.
"""

import os
import re
import statistics

import pandas as pd
from result_rows import RESULTS, ROOT, best, seconds

from decoupled import InputError

PAGES = (RESULTS / "README.md", ROOT / "README.md", ROOT / "ddg_comparison/README.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAPER = pd.read_csv(RESULTS / "paper_numbers.csv", dtype={"value": str, "sd": str})
AUTHORS = pd.read_csv(RESULTS / "authors_curves.csv").set_index(["log", "n", "epoch"])
METRICS = {  # the result columns of an experiment: (metric, head; None: the row's last one) → title
    "learning_curves": {("test_top1", n): f"head {n}" for n in (1, 2, 3, 4)},
    "aux_nets": {("test_top1", None): "test top-1"},
    "dni": {("loss", 3): "train loss", ("train_top1", 3): "train top-1", ("test_top1", 3): "test top-1"},
    "ddg_comparison": {("test_top1", None): "test top-1"},
    "async_buffer": {("test_top1", None): "last head", ("ensemble_top1", None): "ensemble"},
    "imagenet": {("test_top1", None): "top-1", ("test_top5", None): "top-5"},
}


def cell(values, digits=2):
    """The text of a result: one value a seed, most seeds first. Empty without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    if len(values) == 2:
        return f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(header, lines):
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (header, ["---"] * len(header), *lines))


def authors_log(variant):
    """The name of the authors' log of a variant, None where they published none."""
    sources = PAPER.loc[(PAPER["variant"] == variant) & PAPER["source"].str.startswith("authors' log"), "source"]
    return sources.iloc[0].split()[-1] if len(sources) else None


def authors_value(variant, metric, head, epochs):
    """A list of the mean of the authors' ``metric`` over ``epochs``; empty where their log does not have it."""
    wanted = [(authors_log(variant), head, epoch) for epoch in epochs]
    if metric not in AUTHORS or not all(key in AUTHORS.index for key in wanted):
        return []
    value = AUTHORS.loc[wanted, metric].mean()
    return [] if pd.isna(value) else [value]


def value(log, metric, head, epochs):
    """A list of the mean of ``metric`` over ``epochs`` in a log; empty where one of them is not there."""
    frame = log.frame[(log.frame["n"] == head) & log.frame["epoch"].isin(epochs)]
    return [frame[metric].mean()] if len(frame) == len(epochs) and metric in frame else []


def finished(row, logs):
    """The logs that count for ``row`` and have all its epochs, by seed."""
    found = {seed: best(row, seed, logs) for seed in row.seeds}
    return {seed: log for seed, log in found.items() if log is not None and log.reached(row.head) >= row.epochs}


def each(logs, describe):
    """What ``describe`` says of the logs, each answer once."""
    return ", ".join(dict.fromkeys(map(describe, logs)))


def duration(seconds):
    """Seconds as a reader wants them."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def main_table(rows, logs, folder, experiment, brief=()):
    """Every variant's figures in the paper and the authors' logs, then our finished rows of it. ``brief``: the variants
    of a table without what says how its runs were made.
    """
    metrics = METRICS[experiment]
    how = ["epochs", "device", "precision", "wall time", "commit"] * (not brief)
    header = ["run", "size", "from", *metrics.values(), "data", *how, "seeds: logs"]
    lines = []
    ours = [row for row in rows.values() if row.experiment == experiment]
    for variant in dict.fromkeys(row.variant for row in ours if not brief or row.variant in brief):
        its = [row for row in ours if row.variant == variant]
        paper = PAPER[
            (PAPER["experiment"] == experiment)
            & (PAPER["variant"] == variant)
            & PAPER["metric"].isin([m for m, _ in metrics])
        ]
        for (source, epoch), figures in paper.groupby(["source", "epoch"], sort=False):
            said = {
                (f.metric, f.head): f.value + (f" ± {f.sd}" if isinstance(f.sd, str) else "")
                for f in figures.itertuples()
            }
            results = [said.get((metric, head or its[0].head), "") for metric, head in metrics]
            lines.append(
                [
                    variant,
                    "published",
                    source,
                    *results,
                    its[0].data.removesuffix(" (JPEG)"),
                    *[int(epoch), "", "", "", ""][: len(how)],
                    "",
                ]
            )
        for row in its:
            done = finished(row, logs)
            if not done:
                continue
            epochs = [row.epochs]
            results = [
                cell(
                    [v for log in done.values() for v in value(log, metric, head or row.head, epochs)],
                    3 if metric == "loss" else 2,
                )
                for metric, head in metrics
            ]
            made = [
                row.epochs,
                each(
                    done.values(),
                    lambda log: log.device + f", {log.threads} thread{'s' * (log.threads != '1')}" * bool(log.threads),
                ),
                each(done.values(), lambda log: log.precision.removesuffix(" mixed")),
                duration(statistics.mean(seconds(log, row) for log in done.values())),
                ", ".join(dict.fromkeys(commit for log in done.values() for commit in log.commits)),
            ]
            links = " ".join(f"[{seed}]({os.path.relpath(log.path, folder)})" for seed, log in done.items())
            lines.append([variant, row.size, "ours", *results, row.data, *made[: len(how)], links])
    return markdown(header, lines)


def epochs_table(rows, logs, folder, experiment, heads, epochs, metric="test_top1"):
    """Ours, published size, finished or not, beside the authors' log at the same epochs: an epoch, or the mean of a
    range of them.
    """
    title = {head: f"head {head}, " if len(heads) > 1 else "" for head in heads}
    header = [
        "run",
        "data",
        "epoch",
        *(f"{title[head]}{who}" for head in heads for who in ("ours", "authors")),
        "seeds",
    ]
    lines = []
    published = [row for row in rows.values() if row.experiment == experiment and row.size == "published"]
    for variant, data in dict.fromkeys((row.variant, row.data) for row in published):
        runs = {}  # seed → the log that came furthest
        for row in published:
            for seed in row.seeds if (row.variant, row.data) == (variant, data) else ():
                log = best(row, seed, logs)
                if log is not None and (seed not in runs or log.reached(row.head) > runs[seed].reached(row.head)):
                    runs[seed] = log
        for window in epochs:
            span = [window] if isinstance(window, int) else range(window[0], window[1] + 1)
            name = window if isinstance(window, int) else f"mean of {window[0]}–{window[1]}"
            results = {head: [v for log in runs.values() for v in value(log, metric, head, span)] for head in heads}
            if any(results.values()):
                pairs = [
                    text
                    for head in heads
                    for text in (cell(results[head]), cell(authors_value(variant, metric, head, span)))
                ]
                lines.append([variant, data, name, *pairs, max(map(len, results.values()))])
    return markdown(header, lines)


def aux_costs(rows, logs, folder):
    """Peak memory and time of a step of MLP-SR against K, from the cost tables."""
    frames = {
        c: pd.read_csv(RESULTS / f"aux_nets/costs-{c}/decoupling_costs.csv", comment="#", index_col="K")
        for c in (32, 128)
    }
    header = ["K modules", *(f"{c} channels: {what}" for c in frames for what in ("peak MiB", "ms a step"))]
    lines = [
        [
            k,
            *(
                text
                for frame in frames.values()
                for text in (f"{frame['memory'][k] / 2**20:,.0f}", f"{1000 * frame['time'][k]:,.0f}")
            ),
        ]
        for k in frames[32].index
    ]
    return markdown(header, lines)


TABLES = {
    "summary": (main_table, {"experiment": "learning_curves", "brief": ("parallel (DGL)", "sequential")}),
    "learning_curves": (main_table, {"experiment": "learning_curves"}),
    "learning_curves_epochs": (
        epochs_table,
        {"experiment": "learning_curves", "heads": (1, 2, 3, 4), "epochs": (1, 5, 15, 16, 30, 31, 45, 50)},
    ),
    "learning_curves_start": (
        epochs_table,
        {"experiment": "learning_curves", "heads": (1, 4), "epochs": (2, 3, 5), "metric": "train_top1"},
    ),
    "aux_nets": (main_table, {"experiment": "aux_nets"}),
    "aux_nets_costs": (aux_costs, {}),
    "dni": (main_table, {"experiment": "dni"}),
    "dni_epochs": (epochs_table, {"experiment": "dni", "heads": (3,), "epochs": (1, 5, 10, (11, 15), 20, 40, 60)}),
    "ddg_comparison": (main_table, {"experiment": "ddg_comparison"}),
    "async_buffer": (main_table, {"experiment": "async_buffer"}),
    "imagenet": (main_table, {"experiment": "imagenet"}),
}


def filled(page, rows, logs):
    """The text of a page with its tables as the logs have them. Raises InputError for a table that nobody knows."""

    def write(match):
        if match[2] not in TABLES:
            raise InputError(f"{page}: there is no table {match[2]}: choose from {', '.join(TABLES)}")
        make, options = TABLES[match[2]]
        return match[1] + "\n" + make(rows, logs, page.parent, **options) + "\n" + match[3]

    return MARKED.sub(write, page.read_text())


def unfounded():
    """The accuracies (two digits, a point, two digits) in the main page's Results that stand in no table of results."""
    section = re.search(r"^## Results\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    tables = "".join(match[0] for match in MARKED.finditer((RESULTS / "README.md").read_text()))
    return sorted(set(re.findall(r"\b\d\d\.\d\d\b", section)) - set(re.findall(r"\b\d\d\.\d\d\b", tables)))
