"""What a run shows: on a terminal its first lines, bars, epochs, the time to its end; elsewhere the results alone."""

import io
import os
import re
import signal
import sys

import pytest
from running import PARALLEL, SEQUENTIAL
from tqdm import tqdm

from decoupled import InputError
from decoupled.logs import read_log
from decoupled.networks.evaluation import Meter
from decoupled.training import console as consoles
from decoupled.training import run as runs
from decoupled.training.console import Console

TOY = "--dataset digits --train-samples 100 --batch-size 20 --test-batch-size 100 --device cpu --epochs 3"
FLAGS = (*TOY.split(), "--channels", "2")


class Screen(io.StringIO):
    def isatty(self):
        return True


class Eager(tqdm):
    """A bar that is drawn anew after each mini-batch, whatever the clock says."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, mininterval=0, miniters=1)


@pytest.fixture
def open_screen(monkeypatch):
    """open_screen(): from there on stderr is a terminal, which is returned."""

    def begin():
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)  # in the test itself: pytest sets it before
        monkeypatch.setattr(consoles, "tqdm", Eager)
        monkeypatch.setattr(consoles, "READING_DELAY", 3600.0)
        return screen

    return begin


def test_elsewhere_there_are_the_results_alone_and_a_terminal_changes_none_of_them(
    run_script, open_screen, capsys, monkeypatch, tmp_path
):
    read = []
    top = Meter.top
    monkeypatch.setattr(Meter, "top", lambda meter, k: read.append(k) or top(meter, k))
    monkeypatch.setattr(runs, "CHECK_LOSSES_EVERY", 5)  # an epoch's last mini-batch: what is shown is what is logged
    left = run_script(PARALLEL, *FLAGS, folder=tmp_path / "elsewhere")
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines()[:-1] == left.lines and str(left.log) in said.out.splitlines()[-1]
    assert len(read) == 3 * 4 * 2  # epochs, heads, training and test: for the log, so that no step waits

    screen = open_screen()
    shown_run = run_script(PARALLEL, *FLAGS, folder=tmp_path / "terminal")
    assert capsys.readouterr().out.splitlines()[:-1] == left.lines == shown_run.lines
    assert all(value.equal(shown_run.weights[key]) for key, value in left.weights.items())

    shown = screen.getvalue()
    starts = ["device: cpu", "train: 100 images of digits", "test: 359 images of digits", f"log: {shown_run.log}"]
    for line, start in zip(shown.splitlines(), starts, strict=False):
        assert line.startswith(start)
    assert "epoch 2/3:  40%|" in shown and "epoch 2/3, evaluation:  75%|" in shown
    frame = read_log(shown_run.log)
    for epoch in (1, 2, 3):
        (bar,) = re.findall(rf"epoch {epoch}/3: 100%\|[^\r]+? images/s, \d\d:\d\d left, (top-1 [^\r]*?) *\r", shown)
        top1 = frame[frame["epoch"] == epoch].sort_values("n")["train_top1"]
        assert bar == f"top-1 {' '.join(f'{value:.1f}' for value in top1)} %"
    ends = re.findall(r"[\r\n]epoch (\d/3: [\d.]+ s.*)\n", shown)
    ends = [re.sub(r"[\d.]+ s|\d\d:\d\d", "TIME", end) for end in ends]
    assert ends == ["1/3: TIME, TIME left", "2/3: TIME, TIME left", "3/3: TIME"]


def test_modules_in_turn_and_unknown_numbers_of_mini_batches(run_script, open_screen):
    screen = open_screen()
    run_script(SEQUENTIAL, *FLAGS, "--epochs", 1)
    assert "module 2/4, epoch 1/1:  60%|" in screen.getvalue()
    words = [*TOY.split(), "--feature_size", 2, "--ncnn", 3, "--down", "[0]", "--buffer", 2, "--epochs", 1]
    run_script("async_buffer/cifar_buffer.py", *words)
    assert re.search(r"epoch 1/1: 12 mini-batches, +(\?|[\d.]+) mini-batches/s", screen.getvalue())


@pytest.mark.parametrize("moment", [3, 7])  # in the midst of training, of evaluation
def test_last_words_and_what_resumes_have_lines_of_their_own(run_script, open_screen, monkeypatch, moment):
    screen = open_screen()
    calls = []
    real = runs.Run.save_or_stop

    def save_or_stop(run):
        calls.append(run.batch)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        real(run)

    monkeypatch.setattr(runs.Run, "save_or_stop", save_or_stop)
    with pytest.raises(SystemExit):
        run_script(PARALLEL, *FLAGS, "--epochs", 1)
    before, after = screen.getvalue().split(f"{PARALLEL}: stopped")
    assert before[-1] in "\r\n" and after.count("\n") == 1 and ".pt" in after
    screen.truncate(0)
    left = run_script(PARALLEL, *FLAGS, "--epochs", 1, "--resume")
    assert f"log: {left.log}\n" in screen.getvalue() and "device: cpu" in screen.getvalue()


def test_errors_have_a_line_of_their_own(run_script, open_screen, monkeypatch):
    screen = open_screen()

    def fail(run):
        if run.batch == 4:
            raise InputError("this cannot be used")

    monkeypatch.setattr(runs.Run, "check_losses", fail)
    monkeypatch.setattr(runs, "CHECK_LOSSES_EVERY", 2)
    with pytest.raises(SystemExit):
        run_script(PARALLEL, *FLAGS)
    assert re.search(r"epoch 1/3:  \d0%\|.*[\r\n]cifar_dgl\.py: error: this cannot be used\n$", screen.getvalue(), re.S)


def test_the_time_to_the_end_is_that_of_the_latest_epochs_or_else_of_this_one():
    console = Console()
    console.begin_epoch(2, 5, module_index=0, num_modules=2)
    assert console.time_left(0.5) == "" and console.time_left(0.5, 20) == "02:50 left"  # half of it, 3 and 5 more
    for seconds in (1000, 10, 10, 10, 20, 25):
        console.end_epoch(seconds)
    assert console.time_left(0.5, 1000) == "02:07 left"  # 8.5 of 15 s
    console.begin_epoch(5, 5)
    assert console.time_left(1) == "00:00 left"


class Timer:
    """threading.Timer of a clock that has ``passed`` so many seconds when it is started."""

    passed = 0.0

    def __init__(self, seconds, function, args):
        self.seconds = seconds
        self.function = function
        self.args = args

    def start(self):
        if self.passed >= self.seconds:
            self.function(*self.args)

    def cancel(self):
        pass


@pytest.mark.parametrize(("passed", "lines"), [(0.5, 0), (2.0, 1)])
def test_reading_is_said_where_it_takes_time(open_screen, monkeypatch, passed, lines):
    screen = open_screen()
    monkeypatch.setattr(consoles, "READING_DELAY", 1.0)
    monkeypatch.setattr(consoles.threading, "Timer", Timer)
    monkeypatch.setattr(Timer, "passed", passed)
    with Console().reading():
        assert screen.getvalue().count("\n") == lines
    with pytest.raises(InputError), Console(quiet=True).reading():
        raise InputError("no images")
    assert screen.getvalue().count("\n") == lines


class Empty:
    """A meter that has measured nothing."""

    count = 0
    top1 = float("nan")


def test_other_processes_are_quiet_and_empty_meters_are_not_shown(open_screen, capsys):
    screen = open_screen()
    console = Console()
    console.show_accuracies([Empty(), object()])
    assert console.accuracies == ""
    console = Console(quiet=True)
    console.start(["# device: cpu"], "run.log")
    console.write("epoch 1, batch 2")
    console.begin_epoch(1, 1)
    assert list(console.training(iter("abc"), "abc", 0, 8)) == ["a", "b", "c"] and console.evaluation("ab") == "ab"
    console.show_accuracies([Meter()])
    console.end_epoch(1.0)
    console.stopped("script: stopped", None)
    assert screen.getvalue() == "" and capsys.readouterr().out == ""
