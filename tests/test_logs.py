"""Logs: what is written can be read back, and so can the authors' published formats, whole or cut off."""

import re
import sys

import pandas as pd
import pytest
from running import PARALLEL, SEQUENTIAL, published_series

from decoupled import InputError
from decoupled.analysis import export
from decoupled.logs import final, head_line, newest, parse_run_name, read_log, started_at
from decoupled.training.flags import start

# The expression of the authors' notebooks.
AUTHORS = re.compile(r"n\: (\d{1,2}), epoch (\d{1,4}), loss: (.*), train top1:(.*) test top1:(.*)")


def test_lines_are_what_the_authors_notebooks_read():
    line = head_line(3, 12, 0.123456, 98.76, 54.321987)
    assert line == "n: 3, epoch 12, loss: 0.12346, train top1:98.76 test top1:54.322 "
    assert [float(group) for group in AUTHORS.match(line).groups()] == [3, 12, 0.12346, 98.76, 54.322]


def test_round_trip(tmp_path):
    path = tmp_path / "run.log"
    rows = [(n, epoch, 1 / (n + epoch), 10.0 * n + epoch, 33.3333 * epoch) for epoch in (1, 2, 3) for n in (1, 2)]
    lines = [head_line(*row) for row in rows]
    text = [
        "Namespace(epochs=3, dataset='digits', half=False, name='a, b')",
        "# device: cpu",
        "Net(",
        "  (0): Conv2d(3, 4)",
        ")",
    ]
    path.write_text(
        "\n".join([*text, *lines[:2], "# epoch 1 took 2.50 s", *lines[2:4], "# epoch 2 took 2.00 s", *lines[4:]]) + "\n"
    )
    frame = read_log(path)
    assert [(row.n, row.epoch) for row in frame.itertuples()] == [row[:2] for row in rows]
    for row, expected in zip(frame.itertuples(), rows, strict=True):
        assert (row.loss, row.train_top1, row.test_top1) == pytest.approx(expected[2:], abs=1e-4)
    assert frame.attrs["arguments"] == {"epochs": 3, "dataset": "digits", "half": False, "name": "a, b"}
    assert frame.attrs["comments"][0] == "device: cpu" and frame.attrs["seconds"] == [2.5, 2.0]
    assert final(frame)["test_top1"].tolist() == pytest.approx([99.9999, 99.9999])


# Each published format, a few lines written out in its shape (the logs themselves are not part of this repository).
FORMATS = {
    "learning curves": (
        "Namespace(batch_size=128, cuda=True, epochs=50, name='parallel_step', no_cuda=False, "
        "seed=1, test_batch_size=1000)\n"
        "Net(\n  (blocks): ModuleList(\n    (0): Conv2d(3, 64)\n  )\n)\n"
        "n: 1, epoch 1, loss: 1.67285, train top1:38.198 test top1:39.36000061035156 \n"
        "n: 4, epoch 50, loss: 0.08464, train top1:97.26 test top1:89.86000213623046 \n",
        [(1, 1, 39.36000061035156), (4, 50, 89.86000213623046)],
    ),
    "dni": (
        "Namespace(batch_size=256, context=False, cuda=True, dni=False, epochs=2000)\n"
        "n: 3, epoch 1, loss: 1.99395, train top1:0 test top1:42.07 \nn: 3, epoch 2000, loss: 0.0, "
        "train top1:0 test top1:84.47 \n",
        [(3, 1, 42.07), (3, 2000, 84.47)],
    ),
    "dgl of dni, from epoch 0": (
        "Namespace(batch_size=256, name='')\nn: 3, epoch 0, loss: 2.0, train top1:20.5 test top1:39.11 \n",
        [(3, 0, 39.11)],
    ),
    "imagenet_dgl": (
        "n: 0, epoch 1, train top1:10.5(top5:25.25), test top1:12.5 (top5:30.75), top1ens:13.5 top5ens:31.5\n",
        [(0, 1, 12.5)],
    ),
    "async_buffer": (
        "n: 5, epoch 7,epochtrue 9, train 71.25, test 70.5,ense 72.75 \n",
        [(5, 7, 70.5)],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_authors_formats(name, tmp_path):
    text, expected = FORMATS[name]
    (tmp_path / "log").write_text(text)
    frame = read_log(tmp_path / "log")
    assert [(row.n, row.epoch, row.test_top1) for row in frame.itertuples()] == expected


def test_other_fields_of_the_formats(tmp_path):
    (tmp_path / "log").write_text(FORMATS["imagenet_dgl"][0])
    row = read_log(tmp_path / "log").iloc[0]
    assert (row.train_top1, row.train_top5, row.test_top5, row.ensemble_top1, row.ensemble_top5) == (
        10.5,
        25.25,
        30.75,
        13.5,
        31.5,
    )
    (tmp_path / "log").write_text("lr: 0.01, epoch 12, train top1:1.5(top5:2.5), test top1:3.5 (top5:4.5)\n")
    row = read_log(tmp_path / "log").iloc[0]
    assert (row.lr, row.epoch, row.train_top1, row.train_top5, row.test_top1, row.test_top5) == (
        0.01,
        12,
        1.5,
        2.5,
        3.5,
        4.5,
    )
    (tmp_path / "log").write_text(FORMATS["async_buffer"][0])
    row = read_log(tmp_path / "log").iloc[0]
    assert (row.own_epoch, row.train_top1, row.ensemble_top1) == (9, 71.25, 72.75)


@pytest.mark.parametrize("name", ["learning curves", "imagenet_dgl"])
def test_a_log_cut_off_anywhere_gives_its_whole_lines_and_says_what_it_leaves_out(name, tmp_path):
    whole, expected = FORMATS[name]
    last = re.sub(r"epoch \d+", "epoch 77", whole.splitlines()[-1])
    for length in range(1, len(last) + 1):
        (tmp_path / "log").write_text(whole + last[:length])
        frame = read_log(tmp_path / "log")
        found = [(row.n, row.epoch, row.test_top1) for row in frame.itertuples()]
        if length == len(last) and name == "learning curves":  # whose lines end with a blank
            assert found == [*expected, (expected[-1][0], 77, expected[-1][2])] and frame.attrs["damaged"] == []
        else:
            assert found == expected and frame.attrs["damaged"] == [whole.count("\n") + 1]


def test_runs_are_in_the_order_of_the_times_in_their_names(tmp_path):
    assert parse_run_name("a/b-c-20260102-030405.log") == ("b-c", "20260102-030405", 0)
    assert parse_run_name("20260102-030405-7.pt") == ("", "20260102-030405", 7)
    assert parse_run_name("a-20260101-000000-2-20260102-000000.pt") == ("a-20260101-000000-2", "20260102-000000", 0)
    assert parse_run_name("notes.log") is None and parse_run_name("a-20260102-030405.edited.log") is None
    paths = [
        tmp_path / f"{name}.pt" for name in ("z", "b-20260101-000000", "a-20260101-000000-2", "a-20260101-000000-10")
    ]
    assert sorted(paths, key=started_at) == paths
    for path in reversed(paths):
        path.touch()
    assert newest(paths) == paths[-1] and newest([]) is None


def test_non_finite_and_tiny_numbers(tmp_path):
    (tmp_path / "log").write_text(
        head_line(1, 1, float("nan"), 1e-05, 0.0) + "\n" + head_line(1, 2, float("inf"), 0.0, 100.0) + "\n"
    )
    frame = read_log(tmp_path / "log")
    assert frame.loss.isna().tolist() == [True, False] and frame.loss[1] == float("inf")


def test_what_is_no_log(tmp_path):
    with pytest.raises(InputError, match="nothing cannot be read"):
        read_log(tmp_path / "nothing")
    (tmp_path / "empty").write_text("Namespace(a=1)\n")
    with pytest.raises(InputError, match=r"empty\b"):
        read_log(tmp_path / "empty")
    frame = read_log(tmp_path / "empty", allow_empty=True)  # a run in its first epoch
    assert frame.empty and "epoch" in frame and frame.attrs["arguments"] == {"a": 1}


@pytest.fixture
def two_logs(tmp_path):
    (tmp_path / "a.log").write_text(FORMATS["learning curves"][0])
    (tmp_path / "b.log").write_text(FORMATS["async_buffer"][0])
    return [tmp_path / "a.log", tmp_path / "b.log"]


def export_logs(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
    start(export.main)


def test_csv_export_is_what_read_log_reads(two_logs, tmp_path, monkeypatch, capsys):
    export_logs(monkeypatch, *two_logs, "--csv", tmp_path / "all.csv")
    table = pd.read_csv(tmp_path / "all.csv")
    assert list(table.columns[:3]) == ["log", "n", "epoch"] and list(table["log"].unique()) == ["a.log", "b.log"]
    for log in two_logs:
        rows = table[table["log"] == log.name].drop(columns="log").dropna(axis=1).reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, read_log(log), check_like=True, check_dtype=False)
    export_logs(monkeypatch, tmp_path, "--csv", tmp_path / "folder.csv")
    assert pd.read_csv(tmp_path / "folder.csv").equals(table)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.log").write_text(two_logs[0].read_text())
    (tmp_path / "a.txt").write_text(two_logs[0].read_text())
    for words, named in (
        ((two_logs[0], tmp_path / "c" / "a.log", "--csv", tmp_path / "c.csv"), "a.log"),
        ((two_logs[0], tmp_path / "a.txt", "--tensorboard", tmp_path / "board"), "a.txt"),
        ((two_logs[0], "--csv", tmp_path / "no" / "c.csv"), "no/c.csv"),
        ((two_logs[0],), "--csv"),
        (("--csv", *two_logs), "a.log"),
    ):
        with pytest.raises(SystemExit) as stop:
            export_logs(monkeypatch, *words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and named in error and error.count("\n") == 1
    assert two_logs[0].read_text() == FORMATS["learning curves"][0]


def test_export_names_the_lines_that_it_leaves_out(two_logs, tmp_path, monkeypatch, capsys):
    text = two_logs[0].read_text()
    two_logs[0].write_text(text + "n: 1, epoch 99, loss: 0.1")
    export_logs(monkeypatch, *two_logs, "--csv", tmp_path / "all.csv")
    assert f"{two_logs[0]}, damaged or cut off: line {text.count(chr(10)) + 1}\n" in capsys.readouterr().out


def test_tensorboard_export_can_be_read_back(two_logs, tmp_path, monkeypatch, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    export_logs(monkeypatch, *two_logs, "--tensorboard", tmp_path / "board")
    for log in two_logs:
        events = accumulator.EventAccumulator(str(tmp_path / "board" / log.stem)).Reload()
        found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
        expected = {
            (f"{column}/head {row['n']}", row["epoch"]): pytest.approx(row[column])
            for row in read_log(log).to_dict("records")
            for column in row.keys() - {"n", "epoch"}
        }
        assert found == expected
    with pytest.raises(SystemExit) as stop:
        export_logs(monkeypatch, *two_logs, "--tensorboard", tmp_path / "board")
    assert stop.value.code == 2 and "board/a" in capsys.readouterr().err


def test_without_tensorboard_the_export_says_what_to_do(two_logs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        export_logs(monkeypatch, *two_logs, "--tensorboard", tmp_path / "board")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--csv" in error and error.count("\n") == 1
    assert not (tmp_path / "board").exists()


TOY = "--dataset digits --train-samples 64 --batch-size 32 --device cpu --epochs 1"
RESNET = f"{TOY} --depth 8 --splits"
PUBLISHED = [  # script, flags, heads that the published log of it has
    (PARALLEL, f"{TOY} --channels 2", {1, 2, 3, 4}),
    (SEQUENTIAL, f"{TOY} --channels 2", {1, 2, 3, 4}),
    ("aux_nets/cifar_dgl.py", f"{TOY} --channels 2", {1, 2, 3, 4, 5, 6}),
    ("dni/cifar_cnn_dni.py", f"{TOY} --channels 2 --dni --context", {3}),
    ("dni/cifar_dgl.py", f"{TOY} --channels 2", {3}),
    ("ddg_comparison/cifar_dgl.py", f"{RESNET} 3", {1, 2, 3}),
    ("ddg_comparison/cifar_ddg.py", f"{RESNET} 3", {3}),
    ("ddg_comparison/cifar_backprop.py", f"{TOY} --depth 8", {1}),
    ("async_buffer/cifar_buffer.py", f"{TOY} --feature_size 2 --buffer 2", set()),  # its lines have a form of their own
]


@pytest.mark.parametrize(("script", "flags", "heads"), PUBLISHED)
def test_the_authors_notebooks_find_the_published_series_and_nothing_else(run_script, script, flags, heads):
    assert published_series(run_script(script, *flags.split()).log) == {(n, 1) for n in heads}
