"""The tables in the README files: Markdown made from the logs, the paper's numbers and the authors' curves. A table
is placed between these markers:

    <!-- table: NAME -->
    <!-- /table -->

Values are from the last epoch, or from the epoch that the row names, never from the best epoch. A cell has the mean
± standard deviation of three or more seeds, the mean (and both values) of two, or the value of one.
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
    """A column of results.

    title   the column's heading
    metric  the column of read_log
    head    None means the row's last one
    """

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
    """The text of a result with one value per seed. Empty if there are no values."""
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
    """The text of a time in s, min or h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def device(log):
    """The device of a run, with its number of threads if the log has one."""
    if not log.threads:
        return log.device
    threads = "thread" if log.threads == "1" else "threads"
    return f"{log.device}, {log.threads} {threads}"


def join_distinct(values):
    return ", ".join(dict.fromkeys(values))


def markdown(columns, lines):
    """A Markdown table of ``lines``, dicts {column: value}. A missing value gives an empty cell."""
    table = [columns, ["---"] * len(columns)]
    for line in lines:
        table.append([line.get(column, "") for column in columns])
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in table)


# Values


def value_at(log, metric, head, epoch):
    """``metric`` of ``head`` after ``epoch`` in ``log``; None if the log does not have it."""
    frame = log.frame[(log.frame["n"] == head) & (log.frame["epoch"] == epoch)]
    if metric not in frame or frame.empty:
        return None
    return frame[metric].iloc[0]


def values_of_logs(logs, metric, head, epoch):
    """A list: value_at for each of ``logs`` that has it."""
    values = [value_at(log, metric, head, epoch) for log in logs]
    return [value for value in values if value is not None]


def authors_log(variant):
    """The name of the authors' log of ``variant``; None if they published none."""
    sources = PAPER.loc[(PAPER["variant"] == variant) & PAPER["source"].str.startswith("authors' log"), "source"]
    if sources.empty:
        return None
    return sources.iloc[0].split()[-1]


def authors_value_at(variant, metric, head, epoch):
    """value_at in the authors' log of ``variant``."""
    key = (authors_log(variant), head, epoch)
    if metric not in AUTHORS or key not in AUTHORS.index:
        return None
    value = AUTHORS.loc[key, metric]
    return None if pd.isna(value) else value


# Tables: functions of (rows, runs, folder): rows is {name: Row}, runs their logs {name: {seed: Log}}, folder the page's


def result_lines(rows, runs, folder, experiment, variants=None):
    """The lines of an experiment's table, {column: value}: for each variant, the published numbers, then our rows with
    finished logs.
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
            logs = {seed: log for seed, log in runs[row.name].items() if is_finished(log, row)}
            if logs:
                lines.append(our_line(row, logs, metrics, folder))
    return lines


def published_lines(row, metrics):
    """The numbers of the paper and of the authors' log that ``row`` is compared with."""
    is_of_row = (PAPER["experiment"] == row.experiment) & (PAPER["variant"] == row.variant)
    of_row = PAPER[is_of_row & PAPER["metric"].isin([metric.metric for metric in metrics])]
    lines = []
    for (source, epoch), numbers in of_row.groupby(["source", "epoch"], sort=False):
        texts = {}
        for number in numbers.itertuples():
            has_deviation = isinstance(number.sd, str)
            texts[number.metric, number.head] = f"{number.value} ± {number.sd}" if has_deviation else number.value
        line = {
            "run": row.variant,
            "size": "published",
            "source": source,
            "data": row.data,
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
        "source": "ours",
        "data": row.data,
        "epochs": row.epochs,
        "device": join_distinct(device(log) for log in logs.values()),
        "precision": join_distinct(log.precision.removesuffix(" mixed") for log in logs.values()),
        "wall time": duration(statistics.mean(wall_time(log, row) for log in logs.values())),
        "commit": join_distinct(commits),
        "log of seed": " ".join(links),
    }
    for metric in metrics:
        values = values_of_logs(logs.values(), metric.metric, metric.head or row.head, row.epochs)
        line[metric.title] = cell(values, metric.digits)
    return line


def main_table(rows, runs, folder, experiment):
    """The published numbers and our finished rows of an experiment, or a sentence if there are neither."""
    lines = result_lines(rows, runs, folder, experiment)
    if not lines:
        return "No run has finished yet, and the paper has no table.\n"
    titles = [metric.title for metric in METRICS[experiment]]
    columns = ["run", "size", "source", *titles, "data", *HOW, "log of seed"]
    return markdown(columns, lines)


def summary_table(rows, runs, folder, experiment, variants):
    """main_table of some variants, without the columns about how the runs were made."""
    titles = [metric.title for metric in METRICS[experiment]]
    columns = ["run", "size", "source", *titles, "data", "log of seed"]
    return markdown(columns, result_lines(rows, runs, folder, experiment, variants))


def epochs_table(rows, runs, folder, experiment, heads, epochs):
    """Test top-1 of our runs at the published size, finished or not, beside the authors' log at the same ``epochs``."""
    columns = ["run", "data", "epoch"]
    for head in heads:
        columns += head_columns(head, heads)
    columns.append("seeds")
    lines = []
    published = [row for row in rows.values() if row.experiment == experiment and row.size == "published"]
    for variant, data in dict.fromkeys((row.variant, row.data) for row in published):
        alike = [row for row in published if (row.variant, row.data) == (variant, data)]
        logs = furthest_logs(alike, runs)
        for epoch in epochs:
            line = {"run": variant, "data": data, "epoch": epoch, "seeds": 0}
            for head in heads:
                ours, theirs = head_columns(head, heads)
                values = values_of_logs(logs, "test_top1", head, epoch)
                authors = authors_value_at(variant, "test_top1", head, epoch)
                line[ours] = cell(values)
                line[theirs] = "" if authors is None else cell([authors])
                line["seeds"] = max(line["seeds"], len(values))
            if line["seeds"] > 0:
                lines.append(line)
    return markdown(columns, lines)


def head_columns(head, heads):
    """(title of our column, title of the authors' column) for ``head`` in a table of ``heads``."""
    if len(heads) == 1:
        return "ours", "authors"
    return f"head {head}, ours", f"head {head}, authors"


def furthest_logs(rows, runs):
    """Of the logs of ``rows`` that differ only in the number of epochs, the one with the most epochs for each seed."""
    furthest = {}
    for row in rows:
        for seed, log in runs[row.name].items():
            if seed not in furthest or log.last_epoch(row.head) > furthest[seed].last_epoch(row.head):
                furthest[seed] = log
    return furthest.values()


def auxiliary_costs_table(rows, runs, folder):
    """Peak memory and time of a training step with MLP-SR auxiliaries for each K, from the cost tables."""
    columns = ["modules K"]
    lines = {}  # K: {column: value}
    for channels in (32, 128):
        frame = pd.read_csv(RESULTS / f"aux_nets/costs-{channels}/decoupling_costs.csv", comment="#", index_col="K")
        memory_column = f"{channels} channels: peak MiB"
        time_column = f"{channels} channels: ms per step"
        columns += [memory_column, time_column]
        for k in frame.index:
            line = lines.setdefault(k, {"modules K": k})
            line[memory_column] = f"{frame['memory'][k] / 2**20:,.0f}"
            line[time_column] = f"{1000 * frame['time'][k]:,.0f}"
    return markdown(columns, lines.values())


TABLES = {
    "summary": partial(summary_table, experiment="learning_curves", variants=("parallel (DGL)", "sequential")),
    "learning_curves": partial(main_table, experiment="learning_curves"),
    "learning_curves_epochs": partial(
        epochs_table, experiment="learning_curves", heads=(1, 2, 3, 4), epochs=(1, 15, 16, 31, 50)
    ),
    "aux_nets": partial(main_table, experiment="aux_nets"),
    "aux_nets_costs": auxiliary_costs_table,
    "dni": partial(main_table, experiment="dni"),
    "dni_epochs": partial(epochs_table, experiment="dni", heads=(3,), epochs=(1, 5, 20, 60)),
    "ddg_comparison": partial(main_table, experiment="ddg_comparison"),
    "async_buffer": partial(main_table, experiment="async_buffer"),
    "imagenet": partial(main_table, experiment="imagenet"),
}

# Pages


def fill_tables(page, rows, runs):
    """The text of ``page`` with its tables made from the logs. Raises InputError for an unknown table."""

    def fill(match):
        start, name, end = match.groups()
        if name not in TABLES:
            raise InputError(f"{page}: there is no table {name}: choose from {', '.join(TABLES)}")
        table = TABLES[name](rows, runs, page.parent)
        return f"{start}\n{table}\n{end}"

    return MARKED.sub(fill, page.read_text())


def results_in_no_table(page=ROOT / "README.md", tables=RESULTS / "README.md"):
    """The accuracies (two digits, a point, two digits) in the section "Results" of ``page`` that are in no table of the
    page ``tables``.
    """
    accuracy = re.compile(r"\b\d\d\.\d\d\b")
    section = re.search(r"^## Results\n(.*?)^## ", page.read_text(), re.DOTALL | re.MULTILINE)[1]
    in_tables = set()
    for match in MARKED.finditer(tables.read_text()):
        in_tables.update(accuracy.findall(match[0]))
    return sorted(set(accuracy.findall(section)) - in_tables)
