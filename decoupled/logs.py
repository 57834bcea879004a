"""Per-epoch logs: one text line a head and epoch, in the format of the authors' published logs, which ``read_log``
reads too.

Fields: n, the head (from 1; from 0 in async_buffer); epoch (from 1; the authors' DGL log of the dni experiment counts
from 0); loss, the mean training cross-entropy; accuracies in %. A log starts with the run's arguments as
``Namespace(…)`` and the network's repr. Lines that start with ``#`` say where and how the run was made and how long
each epoch took; the authors' notebooks pass over them, as over every line they do not know.

python -m decoupled export LOG… --csv FILE            rows: log, n, epoch, results
python -m decoupled export LOG… --tensorboard DIR     a run for each log
"""

import ast
import re
from pathlib import Path

import pandas as pd

from decoupled.errors import InputError

STAMP = re.compile(r"(\d{8}-\d{6})(?:-(\d+))?")


EDITED = re.compile(r"\.edited(-\d+)?\.log$")  # the names of logs that were changed, and are kept beside the run's


INTEGERS = ("n", "epoch", "own_epoch")


INTEGER, NUMBER = r"(\d{1,9})", r"(nan|[-+]?inf|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"


def pattern(template, columns):
    """Compiled form of a line in which each ``{}`` is a number, and the columns those numbers fill. Blanks at its end
    do not matter.
    """
    first, *parts = map(re.escape, template.rstrip().split("{}"))
    numbers = (INTEGER if column in INTEGERS else NUMBER for column in columns)
    text = "".join(number + part for number, part in zip(numbers, parts, strict=True))
    return re.compile(first + text + r"\s*", re.ASCII), columns


LOWER_HEAD = "# head {}, epoch {}: loss {}, train top-1 {}, test top-1 {}"


LINES = (
    pattern(
        "n: {}, epoch {}, loss: {}, train top1:{} test top1:{} ", ("n", "epoch", "loss", "train_top1", "test_top1")
    ),
    pattern(
        "n: {}, epoch {}, train top1:{}(top5:{}), test top1:{} (top5:{}), top1ens:{} top5ens:{}",
        ("n", "epoch", "train_top1", "train_top5", "test_top1", "test_top5", "ensemble_top1", "ensemble_top5"),
    ),
    pattern(
        "lr: {}, epoch {}, train top1:{}(top5:{}), test top1:{} (top5:{})",
        ("lr", "epoch", "train_top1", "train_top5", "test_top1", "test_top5"),
    ),
    pattern(
        "n: {}, epoch {},epochtrue {}, train {}, test {},ense {} ",
        ("n", "epoch", "own_epoch", "train_top1", "test_top1", "ensemble_top1"),
    ),
    pattern(LOWER_HEAD, ("n", "epoch", "loss", "train_top1", "test_top1")),
)


RESULT = ("n: ", "lr: ", "# head ")  # how lines of results begin


LOSS = pattern("# n: {}, epoch {}, loss: {}", ("n", "epoch", "loss"))[0]


SECONDS = re.compile(r"# (?:module \d+, )?epoch (\d+) took (\d+(?:\.\d+)?) s", re.ASCII)


def head_line(n, epoch, loss, train, test):
    """The line of head ``n`` in learning_curves, aux_nets, dni and ddg_comparison. Accuracies in %."""
    return f"n: {n}, epoch {epoch}, loss: {loss:.5f}, train top1:{round(train, 4)} test top1:{round(test, 4)} "


def lower_head_line(n, epoch, loss, train, test):
    """The line of head ``n`` where the published log has the last head only: a comment to the authors' notebooks, which
    would take any line of their own form for that head's.
    """
    return LOWER_HEAD.format(n, epoch, f"{loss:.5f}", round(train, 4), round(test, 4))


def async_line(n, epoch, own_epoch, train, test, ensemble):
    """The line of head ``n`` in async_buffer; ``own_epoch``: the epochs its module has finished. Accuracies in %."""
    train, test, ensemble = (round(value, 4) for value in (train, test, ensemble))
    return f"n: {n}, epoch {epoch},epochtrue {own_epoch}, train {train}, test {test},ense {ensemble} "


def loss_line(n, epoch, loss):
    """The line of module ``n``'s training loss in imagenet, whose published lines have none: a comment to the authors'
    notebooks.
    """
    return f"# n: {n}, epoch {epoch}, loss: {loss:.5f}"


def imagenet_line(n, epoch, train, test, ensemble):
    """The line of head ``n`` in imagenet_dgl: (top-1, top-5) in % of its training, its evaluation, and the evaluation
    of the ensemble up to it.
    """
    (a, b), (c, d), (e, f) = ((round(value, 4) for value in pair) for pair in (train, test, ensemble))
    return f"n: {n}, epoch {epoch}, train top1:{a}(top5:{b}), test top1:{c} (top5:{d}), top1ens:{e} top5ens:{f}"


def imagenet_backprop_line(lr, epoch, train, test):
    """The line of an epoch of back-propagation in imagenet: its learning rate, (top-1, top-5) in % of training and of
    evaluation.
    """
    (a, b), (c, d) = ((round(value, 4) for value in pair) for pair in (train, test))
    return f"lr: {lr:g}, epoch {epoch}, train top1:{a}(top5:{b}), test top1:{c} (top5:{d})"


def read_log(path, empty=False):
    """A pandas frame with a row for each line of results in the log at ``path``, and columns as the line has fields
    (see the module's text).

    A column "loss" comes from ``loss_line`` where the lines themselves have none; back-propagation counts as n = 1.
    ``frame.attrs`` holds "arguments", the run's (a dict), "comments", its ``#`` lines, "seconds", each epoch's wall
    time where logged, and "damaged", the numbers of lines that begin as results do and are none. A last line that was
    cut off is left out. Raises InputError when the file cannot be read, holds more than one log or, unless ``empty``
    says that this is no error, holds no results.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"the log {path} cannot be read: {error.strerror}") from error
    lines = text.split("\n")
    if not lines[-1].endswith(" "):  # cut off mid-line: its last number may lack digits
        lines.pop()
    rows, comments, arguments, seconds, losses, damaged = {}, [], None, [], {}, []
    for number, line in enumerate(lines, start=1):
        if line.startswith("Namespace("):
            if arguments is not None:
                raise InputError(f"{path} holds two logs, the second from line {number} on: split it")
            arguments = parse_namespace(line)
        if found := next(((m, columns) for form, columns in LINES if (m := form.fullmatch(line))), None):
            match, columns = found
            row = {"n": 1} | dict(zip(columns, map(float, match.groups()), strict=True))
            key = row["n"], row["epoch"]
            if key in rows:
                raise InputError(f"{path} has n {key[0]:g}, epoch {key[1]:g} a second time in line {number}: two logs")
            rows[key] = row
            continue
        if line.startswith(RESULT):
            damaged.append(number)
        if line.startswith("#"):
            comments.append(line[1:].strip())
            seconds += [float(match[2]) for match in [SECONDS.match(line)] if match]
            losses |= {(float(match[1]), float(match[2])): float(match[3]) for match in [LOSS.match(line)] if match}
    if not rows and not empty:
        raise InputError(f"the log {path} holds no line of results")
    for key, row in rows.items() if losses else []:
        row.setdefault("loss", losses.get(key, float("nan")))
    frame = pd.DataFrame([*rows.values()], columns=None if rows else ["n", "epoch"])
    frame = frame.astype({column: int for column in INTEGERS if column in frame and frame[column].notna().all()})
    about = {"comments": comments, "seconds": seconds, "damaged": damaged}
    frame.attrs = {"arguments": arguments or {}, **about}
    return frame


def parse_namespace(line):
    """The arguments in a line ``Namespace(k=v, …)``, as a dict; values that are no Python literals stay text."""
    try:
        call = ast.parse(line.strip(), mode="eval").body
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        return dict(re.findall(r"(\w+)=([^,)]*)", line))


def final(frame):
    """The result of each head: its row at the last epoch, never the best."""
    return frame.sort_values("epoch", kind="stable").groupby("n").tail(1).sort_values("n").set_index("n")
