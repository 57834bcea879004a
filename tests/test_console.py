"""What a run shows: on a terminal its first lines, bars, epochs, the time to its end; elsewhere the results alone."""

import io
import re
import signal
import sys

import pytest
from running import PARALLEL, SEQUENTIAL, small
from test_stopping import signalled
from tqdm import tqdm

from decoupled import InputError
from decoupled.logs import read_log
from decoupled.networks.evaluation import Meter
from decoupled.training import console as terminal
from decoupled.training import run as runs
from decoupled.training.console import Terminal

TOY = "--dataset digits --train-samples 100 --batch-size 20 --test-batch-size 100 --device cpu"
FLAGS = (*TOY.split(), "--epochs", "3")


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
        monkeypatch.setattr(terminal, "tqdm", Eager)
        return screen

    return begin


def test_a_terminal_shows_the_run_its_bars_and_epochs(run_script, open_screen, monkeypatch):
    screen = open_screen()
    monkeypatch.setattr(terminal, "PATIENCE", 3600.0)
    monkeypatch.setattr(runs, "WATCH_EVERY", 5)  # an epoch's last mini-batch: what is shown then is what is logged
    left = run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    shown = screen.getvalue()
    told = ["device: cpu", "train: 100 images of digits (scikit-learn)", "test: 359 images of digits (scikit-learn)"]
    for line, start in zip(shown.splitlines(), [*told, f"log: {left.log}"], strict=False):
        assert line.startswith(start)
    assert "epoch 2/3:  40%|" in shown and "epoch 2/3, evaluation:  75%|" in shown
    frame = read_log(left.log)
    for epoch in (1, 2, 3):
        (bar,) = re.findall(rf"epoch {epoch}/3: 100%\|[^\r]+? images/s, \d\d:\d\d left, (top-1 [^\r]*?) *\r", shown)
        top1 = frame[frame["epoch"] == epoch].sort_values("n")["train_top1"]
        assert bar == f"top-1 {' '.join(f'{value:.1f}' for value in top1)} %"
    ends = re.findall(r"[\r\n]epoch (\d/3: [\d.]+ s.*)\n", shown)
    ends = [re.sub(r"[\d.]+ s|\d\d:\d\d", "TIME", end) for end in ends]
    assert ends == ["1/3: TIME, TIME left", "2/3: TIME, TIME left", "3/3: TIME"]


def test_stages_and_unknown_numbers_of_mini_batches(run_script, open_screen):
    screen = open_screen()
    run_script(SEQUENTIAL, *FLAGS, "--epochs", 1, layerwise_cnn=small(depth=2))
    assert "module 2/2, epoch 1/1:  60%|" in screen.getvalue()
    flags = [*FLAGS, "--feature_size", 2, "--ncnn", 3, "--down", "[0]", "--buffer", 2, "--epochs", 1]
    run_script("async_buffer/cifar_buffer.py", *flags)
    assert re.search(r"epoch 1/1: 12 mini-batches, +(\?|[\d.]+) mini-batches/s", screen.getvalue())


def test_elsewhere_there_are_the_results_alone_and_no_step_waits(run_script, capsys, monkeypatch):
    read, top = [], Meter.top
    monkeypatch.setattr(runs, "WATCH_EVERY", 1)
    monkeypatch.setattr(Meter, "top", lambda meter, k: read.append(k) or top(meter, k))
    left = run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines() == [*left.lines, f"finished: {left.log}"]
    assert len(read) == 3 * 4 * 2  # epochs, heads, training and test: for the log


def test_log_checkpoint_and_stdout_are_the_same_with_a_terminal_and_without(run_script, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "WATCH_EVERY", 1)
    outputs, logs, states = [], [], []
    for name in ("elsewhere", "terminal"):
        with monkeypatch.context() as patch:
            if name == "terminal":
                patch.setattr(sys, "stderr", Screen())
            left = run_script(PARALLEL, *FLAGS, folder=tmp_path / name, layerwise_cnn=small())
        outputs.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("finished: ")])
        text = left.log.read_text().replace(str(tmp_path / name), "FOLDER")
        logs.append(re.sub(r"took [\d.]+ s", "took TIME", text))
        states.append(left.weights)
    assert outputs[0] == outputs[1] and logs[0] == logs[1] and len(outputs[0]) == 12
    assert all(value.equal(states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("moment", [3, 7])  # in the midst of training, of evaluation
def test_last_words_and_what_resumes_have_lines_of_their_own(run_script, open_screen, moment):
    screen = open_screen()
    with pytest.raises(SystemExit):
        run_script(PARALLEL, *FLAGS, layerwise_cnn=small(), Run=signalled(moment, signal.SIGTERM))
    before, after = screen.getvalue().split("learning_curves/cifar_dgl.py: stopped after epoch 1, batch ")
    assert before[-1] in "\r\n" and re.fullmatch(r"\d, saved in \S+\.pt: --resume continues there\n", after)
    screen.truncate(0)
    left = run_script(PARALLEL, *FLAGS, "--resume", layerwise_cnn=small())
    assert f"log: {left.log}\n" in screen.getvalue() and "device: cpu" in screen.getvalue()


def test_errors_have_a_line_of_their_own(run_script, open_screen, monkeypatch):
    screen = open_screen()

    def fail(run):
        if run.batch == 4:
            raise InputError("this cannot be used")

    monkeypatch.setattr(runs.Run, "check_losses", fail)
    monkeypatch.setattr(runs, "WATCH_EVERY", 2)
    with pytest.raises(SystemExit):
        run_script(PARALLEL, *FLAGS, layerwise_cnn=small())
    assert re.search(r"epoch 1/3:  \d0%\|.*[\r\n]cifar_dgl\.py: error: this cannot be used\n$", screen.getvalue(), re.S)


def test_the_time_to_the_end_is_that_of_the_latest_epochs_or_else_of_this_one():
    shows = Terminal()
    shows.begin_epoch(2, 5, stage=1, stages=2)
    assert shows.left(0.5) == "" and shows.left(0.5, 20) == "02:50 left"  # half of this epoch, 3 and 5 more
    for seconds in (1000, 10, 10, 10, 20, 25):
        shows.end_epoch(seconds)
    assert shows.left(0.5, 1000) == "02:07 left"  # 8.5 of 15 s
    shows.begin_epoch(5, 5)
    assert shows.left(1) == "00:00 left"


class Timer:
    """threading.Timer of a clock that has ``passed`` so many seconds when it is started."""

    passed = 0.0

    def __init__(self, seconds, function, args):
        self.seconds, self.function, self.args = seconds, function, args

    def start(self):
        if self.passed >= self.seconds:
            self.function(*self.args)

    def cancel(self):
        pass


@pytest.mark.parametrize(("passed", "shown"), [(0.5, ""), (2.0, "reading images\n")])
def test_reading_is_said_where_it_takes_time(open_screen, monkeypatch, passed, shown):
    screen = open_screen()
    monkeypatch.setattr(terminal.threading, "Timer", Timer)
    monkeypatch.setattr(Timer, "passed", passed)
    with Terminal().reading():
        assert screen.getvalue() == shown
    with pytest.raises(InputError), Terminal(quiet=True).reading():
        raise InputError("no images")
    assert screen.getvalue() == shown


def test_other_processes_are_quiet(open_screen, capsys):
    screen, shows = open_screen(), Terminal(quiet=True)
    shows.start(["# device: cpu"], "run.log")
    shows.write("epoch 1, batch 2")
    shows.begin_epoch(1, 1)
    assert list(shows.training(iter("abc"), "abc", 0, 8)) == ["a", "b", "c"] and shows.evaluation("ab") == "ab"
    shows.note([Meter()])
    shows.end_epoch(1.0)
    shows.stopped("script: stopped", None)
    assert screen.getvalue() == "" and capsys.readouterr().out == ""
