"""Logs of runs, and the names of a run's files.

A log has one line per head per epoch, in the format of the authors' published logs, which ``read_log`` reads as well.

n      the head, from 1; from 0 in async_buffer and imagenet_dgl
epoch  from 1; from 0 in the authors' DGL log of the dni experiment
loss   the mean training cross-entropy
top1   and other accuracies, in %

A log starts with the run's arguments as ``Namespace(…)`` and the network's repr. Lines that start with ``#`` say where
and how the run was made and how long each epoch took. The authors' notebooks skip them, as they skip every line they do
not recognize.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from decoupled.errors import InputError

# Names of files


class RunName(NamedTuple):
    """The name of a run's log and checkpoint, PREFIX-TIME[-NUMBER].

    prefix  the script and --name, joined by "-"
    time    when the run started, "20260131-235959"
    number  0, or 1, 2, … for further runs that started in the same second
    """

    prefix: str
    time: str
    number: int


STAMP = re.compile(r"(\d{8}-\d{6})(?:-(\d+))?", re.ASCII)
RUN_NAME = re.compile(rf"(?:(.*)-)?{STAMP.pattern}", re.ASCII | re.DOTALL)
EDITED = re.compile(r"\.edited(-\d+)?\.log$", re.ASCII)


def parse_run_name(path):
    """Parses the file name of a log or checkpoint. Returns a RunName, or None if the name has another form."""
    match = RUN_NAME.fullmatch(Path(path).stem)
    if match is None:
        return None
    prefix, time, number = match.groups()
    return RunName(prefix or "", time, int(number or 0))


def started_at(path):
    """A sort key for logs and checkpoints: (time, number), from the name of ``path``. Files without a time in their
    name come first.
    """
    name = parse_run_name(path)
    if name is None:
        return "", 0
    return name.time, name.number


def newest(paths):
    """The path of the run that started last, by the time in its file name. If no name has a time, the path modified
    last; None if ``paths`` is empty.
    """
    return max(paths, key=lambda path: (started_at(path), path.stat().st_mtime_ns), default=None)


def is_edited(path):
    """Whether ``path`` is an edited log: a resumed run moves it to STEM.edited.log and writes its own log again."""
    return EDITED.search(Path(path).name) is not None


def logs_in(folder):
    """The logs in ``folder``, oldest run first, without edited ones. Raises InputError if there are none."""
    found = [path for path in Path(folder).glob("*.log") if not is_edited(path)]
    if not found:
        raise InputError(f"no log in {folder}")
    return sorted(found, key=lambda path: (started_at(path), path.stat().st_mtime_ns))


# Lines


class LineFormat(NamedTuple):
    """A kind of line: a pattern that matches the whole line, and the column of each of its groups."""

    pattern: re.Pattern
    columns: tuple


INTEGER_COLUMNS = ("n", "epoch", "own_epoch")
INTEGER = r"(\d{1,9})"
NUMBER = r"(nan|[-+]?inf|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"


def compile_line(template, columns):
    """The LineFormat of ``template``, in which each ``{}`` is the number of one of ``columns``, in order. Trailing
    blanks are ignored.
    """
    first, *parts = template.rstrip().split("{}")
    pattern = re.escape(first)
    for column, part in zip(columns, parts, strict=True):
        number = INTEGER if column in INTEGER_COLUMNS else NUMBER
        pattern += number + re.escape(part)
    return LineFormat(re.compile(pattern + r"\s*", re.ASCII), columns)


LOWER_HEAD = "# head {}, epoch {}: loss {}, train top-1 {}, test top-1 {}"

RESULT_LINES = (
    compile_line(
        "n: {}, epoch {}, loss: {}, train top1:{} test top1:{} ",
        ("n", "epoch", "loss", "train_top1", "test_top1"),
    ),
    compile_line(
        "n: {}, epoch {}, train top1:{}(top5:{}), test top1:{} (top5:{}), top1ens:{} top5ens:{}",
        ("n", "epoch", "train_top1", "train_top5", "test_top1", "test_top5", "ensemble_top1", "ensemble_top5"),
    ),
    compile_line(
        "lr: {}, epoch {}, train top1:{}(top5:{}), test top1:{} (top5:{})",
        ("lr", "epoch", "train_top1", "train_top5", "test_top1", "test_top5"),
    ),
    compile_line(
        "n: {}, epoch {},epochtrue {}, train {}, test {},ense {} ",
        ("n", "epoch", "own_epoch", "train_top1", "test_top1", "ensemble_top1"),
    ),
    compile_line(LOWER_HEAD, ("n", "epoch", "loss", "train_top1", "test_top1")),
)
RESULT_STARTS = ("n: ", "lr: ", "# head ")
LOSS_LINE = compile_line("# n: {}, epoch {}, loss: {}", ("n", "epoch", "loss"))
SECONDS = re.compile(r"# (?:module \d+, )?epoch \d+ took (\d+(?:\.\d+)?) s", re.ASCII)


def head_line(n, epoch, loss, train, test):
    """The line of head ``n`` in learning_curves, aux_nets, dni and ddg_comparison. Accuracies in %."""
    return f"n: {n}, epoch {epoch}, loss: {loss:.5f}, train top1:{round(train, 4)} test top1:{round(test, 4)} "


def lower_head_line(n, epoch, loss, train, test):
    """The line of head ``n`` where the published log has the last head only. It is a comment, because the authors'
    notebooks would take a line in their own format for the last head's.
    """
    return LOWER_HEAD.format(n, epoch, f"{loss:.5f}", round(train, 4), round(test, 4))


def async_line(n, epoch, own_epoch, train, test, ensemble):
    """The line of head ``n`` in async_buffer, whose module has finished ``own_epoch`` epochs. Accuracies in %."""
    scores = f"train {round(train, 4)}, test {round(test, 4)},ense {round(ensemble, 4)}"
    return f"n: {n}, epoch {epoch},epochtrue {own_epoch}, {scores} "


def loss_line(n, epoch, loss):
    """The training loss of module ``n`` in imagenet, as a comment: the published lines have no loss."""
    return f"# n: {n}, epoch {epoch}, loss: {loss:.5f}"


def imagenet_line(n, epoch, train, test, ensemble):
    """The line of head ``n`` in imagenet_dgl. ``train``, ``test`` and ``ensemble`` (of heads up to ``n``) are (top-1,
    top-5) in %.
    """
    ensemble_top1, ensemble_top5 = ensemble
    scores = f"top1ens:{round(ensemble_top1, 4)} top5ens:{round(ensemble_top5, 4)}"
    return f"n: {n}, epoch {epoch}, {train_and_test(train, test)}, {scores}"


def imagenet_backprop_line(lr, epoch, train, test):
    """The line of one epoch of back-propagation in imagenet. ``train`` and ``test`` are (top-1, top-5) in %."""
    return f"lr: {lr:g}, epoch {epoch}, {train_and_test(train, test)}"


def train_and_test(train, test):
    """The part that both imagenet lines share. ``train`` and ``test`` are (top-1, top-5) in %."""
    train_top1, train_top5 = train
    test_top1, test_top5 = test
    training = f"train top1:{round(train_top1, 4)}(top5:{round(train_top5, 4)})"
    return f"{training}, test top1:{round(test_top1, 4)} (top5:{round(test_top5, 4)})"


# Reading


def read_log(path, allow_empty=False):
    """Reads the log at ``path`` into a pandas data frame with one row per result line and one column per field.

    Back-propagation counts as n = 1. If the result lines have no loss, it comes from the lines that ``loss_line``
    wrote. ``frame.attrs`` has

    arguments  the run's arguments, a dict
    comments   the lines that start with ``#``, without the ``#``
    seconds    the wall time of each epoch, if logged
    damaged    the numbers of the lines that were skipped: they start like result lines but match no format, or were cut
               off while being written

    Raises InputError if the file cannot be read, contains more than one log, or has no results (unless
    ``allow_empty``).
    """
    lines, damaged_end = read_lines(path)
    results = {}  # (n, epoch): {column: number}
    losses = {}  # (n, epoch): training loss
    arguments = None
    comments = []
    seconds = []
    damaged = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("Namespace("):
            if arguments is not None:
                raise InputError(f"{path} contains two logs, the second from line {number} on: split it")
            arguments = parse_namespace(line)
        result = parse_result(line)
        if result is not None:
            key = result["n"], result["epoch"]
            if key in results:
                raise InputError(f"{path} repeats n {key[0]:g}, epoch {key[1]:g} in line {number}: split the two logs")
            results[key] = result
            continue
        if line.startswith(RESULT_STARTS):
            damaged.append(number)
        if line.startswith("#"):
            comments.append(line[1:].strip())
        if match := SECONDS.match(line):
            seconds.append(float(match[1]))
        if match := LOSS_LINE.pattern.fullmatch(line):
            n, epoch, loss = map(float, match.groups())
            losses[n, epoch] = loss
    if not results and not allow_empty:
        raise InputError(f"the log {path} has no results")
    if losses:
        for key, result in results.items():
            result.setdefault("loss", losses.get(key, float("nan")))
    frame = result_frame(list(results.values()))
    frame.attrs = {
        "arguments": arguments or {},
        "comments": comments,
        "seconds": seconds,
        "damaged": damaged + damaged_end,
    }
    return frame


def read_lines(path):
    """The lines of the log at ``path``, and a list with the number of the last line if that one is left out.

    A last line without a line break is left out: it may have been cut off in the middle of a number. It is kept if it
    ends with a blank, as lines in the published formats do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"the log {path} cannot be read: {error.strerror}") from error
    *lines, last = text.split("\n")
    if last.endswith(" "):
        return [*lines, last], []
    if last:
        return lines, [len(lines) + 1]
    return lines, []


def parse_result(line):
    """Parses a result line. Returns {column: number}, or None for any other line."""
    for kind in RESULT_LINES:
        if match := kind.pattern.fullmatch(line):
            numbers = map(float, match.groups())
            return {"n": 1.0} | dict(zip(kind.columns, numbers, strict=True))
    return None


def parse_namespace(line):
    """Parses a line ``Namespace(k=v, …)``. Returns a dict; values that are not Python literals stay strings."""
    try:
        call = ast.parse(line.strip(), mode="eval").body
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return dict(re.findall(r"(\w+)=([^,)]*)", line))


def result_frame(results):
    """A data frame of ``results``, a list of {column: number}. INTEGER_COLUMNS without gaps have an integer type."""
    if not results:
        return pd.DataFrame(columns=["n", "epoch"], dtype=int)
    frame = pd.DataFrame(results)
    for column in INTEGER_COLUMNS:
        if column in frame and frame[column].notna().all():
            frame[column] = frame[column].astype(int)
    return frame


def final(frame):
    """The final result of each head, indexed by n: its row at the last epoch, not the best one."""
    return frame.sort_values("epoch", kind="stable").groupby("n").tail(1).sort_values("n").set_index("n")
