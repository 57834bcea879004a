"""The tables of the pages: Markdown made from the logs, the paper's numbers and the authors' curves, between markers

    <!-- table: NAME -->
    <!-- /table -->

Every value is one of the last epoch, or of the epochs named, never of the best one. With three seeds or more a cell has
mean ± standard deviation, with two the mean (and each), with one its value.
"""

import os
import re
import statistics
from functools import partial
from typing import NamedTuple

import pandas as pd
from result_rows import RESULTS, ROOT, is_finished, wall_time

from decoupled import InputError

PAGES = (RESULTS / "README.md", ROOT / "README.md", ROOT / "ddg_comparison/README.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAPER = pd.read_csv(RESULTS / "paper_numbers.csv", dtype={"value": str, "sd": str})
AUTHORS = pd.read_csv(RESULTS / "authors_curves.csv").set_index(["log", "n", "epoch"])


class Metric(NamedTuple):
    """A column of results: ``title``, the name of the ``metric`` in logs, the ``head`` (None: the row's last one)."""

    title: str
    metric: str
    head: int | None = None
    digits: int = 2


METRICS = {
    "learning_curves": [Metric(f"head {n}", "test_top1", n) for n in (1, 2, 3, 4)],
    "aux_nets": [Metric("test top-1", "test_top1")],
    "dni": [
        Metric("train loss", "loss", 3, digits=3),
        Metric("train top-1", "train_top1", 3),
        Metric("test top-1", "test_top1", 3),
    ],
    "ddg_comparison": [Metric("test top-1", "test_top1")],
    "async_buffer": [Metric("last head", "test_top1"), Metric("ensemble", "ensemble_top1")],
    "imagenet": [Metric("top-1", "test_top1"), Metric("top-5", "test_top5")],
}
HOW = ("epochs", "device", "precision", "wall time", "commit")  # columns that say how a run was made

# Cells


def cell(values, digits=2):
    """The text of a result with one value per seed. Empty without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    if len(values) == 2:
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{mean} ({each})"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def duration(seconds):
    """Seconds in the unit that a reader wants."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def device(log):
    """The device of a run, and its number of threads where the log has one."""
    if not log.threads:
        return log.device
    threads = "thread" if log.threads == "1" else "threads"
    return f"{log.device}, {log.threads} {threads}"


def each_once(values):
    return ", ".join(dict.fromkeys(values))


def markdown(columns, lines):
    """A Markdown table with ``columns`` of ``lines``, dicts {column: value}; a missing value is an empty cell."""
    table = [columns, ["---"] * len(columns)]
    for line in lines:
        table.append([line.get(column, "") for column in columns])
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in table)


# Values


def mean_over(log, metric, head, epochs):
    """The mean of ``metric`` of ``head`` over ``epochs`` in ``log``; None where one of them is missing."""
    frame = log.frame[(log.frame["n"] == head) & log.frame["epoch"].isin(epochs)]
    if metric not in frame or len(frame) != len(epochs):
        return None
    return frame[metric].mean()


def over_seeds(logs, metric, head, epochs):
    """mean_over of each of ``logs`` that has it: a list."""
    means = [mean_over(log, metric, head, epochs) for log in logs]
    return [mean for mean in means if mean is not None]


def authors_log(variant):
    """The name of the authors' log of ``variant``; None where they published none."""
    sources = PAPER.loc[(PAPER["variant"] == variant) & PAPER["source"].str.startswith("authors' log"), "source"]
    if sources.empty:
        return None
    return sources.iloc[0].split()[-1]


def authors_mean_over(variant, metric, head, epochs):
    """mean_over in the authors' log of ``variant``."""
    keys = [(authors_log(variant), head, epoch) for epoch in epochs]
    if metric not in AUTHORS or not all(key in AUTHORS.index for key in keys):
        return None
    mean = AUTHORS.loc[keys, metric].mean()
    return None if pd.isna(mean) else mean


# Tables: functions of (rows, runs, folder), the rows {name: Row}, their logs {name: {seed: Log}}, and the page's folder


def result_lines(rows, runs, folder, experiment, variants=None):
    """A line for each of the paper's and the authors' numbers of an experiment, and one for each of our rows that is
    finished: lists of {column: value}, by variant.
    """
    metrics = METRICS[experiment]
    lines = []
    of_experiment = [row for row in rows.values() if row.experiment == experiment]
    for variant in dict.fromkeys(row.variant for row in of_experiment):
        if variants is not None and variant not in variants:
            continue
        of_variant = [row for row in of_experiment if row.variant == variant]
        lines += published_lines(of_variant[0], metrics)
        for row in of_variant:
            logs = {seed: log for seed, log in runs[row.row].items() if is_finished(log, row)}
            if logs:
                lines.append(our_line(row, logs, metrics, folder))
    return lines


def published_lines(row, metrics):
    """The numbers of the paper, and of the authors' log, that ``row`` stands beside."""
    is_of_row = (PAPER["experiment"] == row.experiment) & (PAPER["variant"] == row.variant)
    of_row = PAPER[is_of_row & PAPER["metric"].isin([metric.metric for metric in metrics])]
    lines = []
    for (source, epoch), figures in of_row.groupby(["source", "epoch"], sort=False):
        texts = {}
        for figure in figures.itertuples():
            has_deviation = isinstance(figure.sd, str)
            texts[figure.metric, figure.head] = f"{figure.value} ± {figure.sd}" if has_deviation else figure.value
        line = {
            "run": row.variant,
            "size": "published",
            "from": source,
            "data": row.data.removesuffix(" (JPEG)"),
            "epochs": int(epoch),
        }
        for metric in metrics:
            line[metric.title] = texts.get((metric.metric, metric.head or row.head), "")
        lines.append(line)
    return lines


def our_line(row, logs, metrics, folder):
    """The results of ``row`` from its finished ``logs``, {seed: Log}."""
    links = [f"[{seed}]({os.path.relpath(log.path, folder)})" for seed, log in logs.items()]
    commits = [commit for log in logs.values() for commit in log.commits]
    line = {
        "run": row.variant,
        "size": row.size,
        "from": "ours",
        "data": row.data,
        "epochs": row.epochs,
        "device": each_once(device(log) for log in logs.values()),
        "precision": each_once(log.precision.removesuffix(" mixed") for log in logs.values()),
        "wall time": duration(statistics.mean(wall_time(log, row) for log in logs.values())),
        "commit": each_once(commits),
        "seeds: logs": " ".join(links),
    }
    for metric in metrics:
        values = over_seeds(logs.values(), metric.metric, metric.head or row.head, [row.epochs])
        line[metric.title] = cell(values, metric.digits)
    return line


def main_table(rows, runs, folder, experiment):
    """The published numbers and our finished rows of an experiment."""
    titles = [metric.title for metric in METRICS[experiment]]
    columns = ["run", "size", "from", *titles, "data", *HOW, "seeds: logs"]
    return markdown(columns, result_lines(rows, runs, folder, experiment))


def summary_table(rows, runs, folder, experiment, variants):
    """main_table of some variants, without how the runs were made."""
    titles = [metric.title for metric in METRICS[experiment]]
    columns = ["run", "size", "from", *titles, "data", "seeds: logs"]
    return markdown(columns, result_lines(rows, runs, folder, experiment, variants))


def epochs_table(rows, runs, folder, experiment, heads, epochs, metric="test_top1"):
    """Our runs of published size, finished or not, beside the authors' log at the same epochs: an epoch, or the mean of
    a range (first, last) of them.
    """
    columns = ["run", "data", "epoch"]
    for head in heads:
        columns += head_columns(head, heads)
    columns.append("seeds")
    lines = []
    published = [row for row in rows.values() if row.experiment == experiment and row.size == "published"]
    for variant, data in dict.fromkeys((row.variant, row.data) for row in published):
        alike = [row for row in published if (row.variant, row.data) == (variant, data)]
        logs = furthest_logs(alike, runs)
        for window in epochs:
            name, span = name_and_span(window)
            line = {"run": variant, "data": data, "epoch": name, "seeds": 0}
            for head in heads:
                ours, theirs = head_columns(head, heads)
                values = over_seeds(logs, metric, head, span)
                authors = authors_mean_over(variant, metric, head, span)
                line[ours] = cell(values)
                line[theirs] = "" if authors is None else cell([authors])
                line["seeds"] = max(line["seeds"], len(values))
            if line["seeds"] > 0:
                lines.append(line)
    return markdown(columns, lines)


def name_and_span(window):
    """What a table calls an epoch, or a range (first, last) of epochs, and the epochs in it."""
    if isinstance(window, int):
        return window, [window]
    first, last = window
    return f"mean of {first}–{last}", range(first, last + 1)


def head_columns(head, heads):
    """The titles of the two columns of ``head`` in a table of ``heads``: ours, the authors'."""
    if len(heads) == 1:
        return "ours", "authors"
    return f"head {head}, ours", f"head {head}, authors"


def furthest_logs(rows, runs):
    """The log of each seed that got furthest, of ``rows`` that differ in their number of epochs."""
    furthest = {}
    for row in rows:
        for seed, log in runs[row.row].items():
            if seed not in furthest or log.reached(row.head) > furthest[seed].reached(row.head):
                furthest[seed] = log
    return furthest.values()


def auxiliary_costs_table(rows, runs, folder):
    """Peak memory and time of a step of MLP-SR against K, from the cost tables."""
    columns = ["K modules"]
    lines = {}  # K: {column: value}
    for channels in (32, 128):
        frame = pd.read_csv(RESULTS / f"aux_nets/costs-{channels}/decoupling_costs.csv", comment="#", index_col="K")
        memory_column = f"{channels} channels: peak MiB"
        time_column = f"{channels} channels: ms a step"
        columns += [memory_column, time_column]
        for k in frame.index:
            line = lines.setdefault(k, {"K modules": k})
            line[memory_column] = f"{frame['memory'][k] / 2**20:,.0f}"
            line[time_column] = f"{1000 * frame['time'][k]:,.0f}"
    return markdown(columns, lines.values())


TABLES = {
    "summary": partial(summary_table, experiment="learning_curves", variants=("parallel (DGL)", "sequential")),
    "learning_curves": partial(main_table, experiment="learning_curves"),
    "learning_curves_epochs": partial(
        epochs_table, experiment="learning_curves", heads=(1, 2, 3, 4), epochs=(1, 5, 15, 16, 30, 31, 45, 50)
    ),
    "learning_curves_start": partial(
        epochs_table, experiment="learning_curves", heads=(1, 4), epochs=(2, 3, 5), metric="train_top1"
    ),
    "aux_nets": partial(main_table, experiment="aux_nets"),
    "aux_nets_costs": auxiliary_costs_table,
    "dni": partial(main_table, experiment="dni"),
    "dni_epochs": partial(epochs_table, experiment="dni", heads=(3,), epochs=(1, 5, 10, (11, 15), 20, 40, 60)),
    "ddg_comparison": partial(main_table, experiment="ddg_comparison"),
    "async_buffer": partial(main_table, experiment="async_buffer"),
    "imagenet": partial(main_table, experiment="imagenet"),
}

# Pages


def filled(page, rows, runs):
    """The text of ``page`` with its tables as the logs give them. Raises InputError for an unknown table."""

    def write(match):
        start, name, end = match.groups()
        if name not in TABLES:
            raise InputError(f"{page}: there is no table {name}: choose from {', '.join(TABLES)}")
        table = TABLES[name](rows, runs, page.parent)
        return f"{start}\n{table}\n{end}"

    return MARKED.sub(write, page.read_text())


def unfounded(page=ROOT / "README.md", tables=RESULTS / "README.md"):
    """The accuracies (two digits, a point, two digits) in the section Results of ``page`` that no table in ``tables``
    has.
    """
    accuracy = re.compile(r"\b\d\d\.\d\d\b")
    section = re.search(r"^## Results\n(.*?)^## ", page.read_text(), re.DOTALL | re.MULTILINE)[1]
    founded = set()
    for match in MARKED.finditer(tables.read_text()):
        founded.update(accuracy.findall(match[0]))
    return sorted(set(accuracy.findall(section)) - founded)
