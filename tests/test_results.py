"""results/reproduce.py: which logs count for which row, running what is missing, and tables that the logs give."""

import sys

import pytest
from running import ROOT, load_script

from decoupled import runs

reproduce = load_script("results/reproduce.py")
import result_rows  # noqa: E402

HEADER = "row,variant,size,script,flags,data,head,seeds,since,before,pflop\n"
SMALL = "--dataset digits --train-samples 128 --epochs 2"
NOW = result_rows.git("rev-parse", "--short=12", "HEAD")[1]
with_history = pytest.mark.skipif(not result_rows.has_history(), reason="the history of commits is not here")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(*lines): makes these lines the rows.csv, and an empty folder the results."""

    def write(*lines):
        file = tmp_path / "rows.csv"
        file.write_text(HEADER + "\n".join(lines) + "\n")
        found = result_rows.read_rows(file)
        monkeypatch.setattr(reproduce, "read_rows", lambda: found)
        return found

    (tmp_path / "results").mkdir()
    for module in (reproduce, result_rows):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return write


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*flags): runs reproduce.py with a log folder of its own; returns what it printed."""

    def run(*flags):
        where = [] if {"--table", "--check"} & set(flags) else ["--log-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["results/reproduce.py", *map(str, flags), *where])
        try:
            runs.start(reproduce.main)
        finally:
            shown = capsys.readouterr()
        return shown.out + shown.err

    return run


def a_log(folder, name="run.log", commit=NOW, data="50000 images of cifar10 (PNG)", epochs=50, reached=50, **arguments):
    """A log of learning_curves' parallel script as it would be, with a line of each head an epoch."""
    flags = " ".join(f"--{key} {value}" for key, value in arguments.items())
    its = result_rows.parse("learning_curves/cifar_dgl.py", flags) | {"epochs": epochs}
    lines = [f"Namespace({', '.join(f'{key}={value!r}' for key, value in its.items())})"]
    lines += [f"# command: python learning_curves/cifar_dgl.py {flags} --epochs {epochs}", f"# commit: {commit}"]
    lines += ["# device: cpu (x86_64), 1 threads, bf16 mixed", f"# train: {data}"]
    for epoch in range(1, reached + 1):
        lines += [
            f"n: {n}, epoch {epoch}, loss: 1.0, train top1:50.0 test top1:{10 * n + epoch / 10} " for n in range(1, 5)
        ]
        lines += [f"# epoch {epoch} took 2.00 s"]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return result_rows.as_log(path)


PARALLEL = "lc-parallel,parallel (DGL),published,learning_curves/cifar_dgl.py,,CIFAR-10,4,1 2,{since},{before},0.866"


@with_history
def test_a_log_counts_by_its_arguments_data_and_commits(rows, tmp_path):
    (row,) = rows(PARALLEL.format(since="3b542318e651", before="")).values()
    old, new = "136d18d", NOW
    for log, standing in (
        (a_log(tmp_path, commit=new), "stands"),
        (a_log(tmp_path, commit=new + "+"), "stands"),
        (a_log(tmp_path, commit=old), "superseded"),
        (a_log(tmp_path, commit="0123456789ab"), "unknown"),
        (a_log(tmp_path, half="") if False else a_log(tmp_path, name="else.log", device="cpu"), "stands"),
        (a_log(tmp_path, epochs=300), "stands"),  # its first 50 epochs are the row's
    ):
        assert list(result_rows.runs_of(row, 1, [log])) == [standing], log
    for log in (
        a_log(tmp_path, seed=3),
        a_log(tmp_path, data="50000 images of cifar10 (JPEG)"),
        a_log(tmp_path, **{"train-samples": 1000}),
        a_log(tmp_path, **{"batch-size": 64}),
    ):
        assert result_rows.runs_of(row, 1, [log]) == {}
    (earlier,) = rows(PARALLEL.format(since="", before="3b542318e651")).values()
    assert result_rows.standing(a_log(tmp_path, commit=old), earlier) == "stands"
    assert result_rows.standing(a_log(tmp_path, commit=new), earlier) == "another"


def test_the_sequential_script_and_the_simulation_count_with_their_own_number_of_epochs_only():
    rows = result_rows.read_rows(ROOT / "results/rows.csv")
    (log,) = [
        log for log in result_rows.read_logs(ROOT / "results/learning_curves") if log.path.name == "sequential.log"
    ]
    row = rows["learning_curves-sequential-jpeg"]
    assert result_rows.is_run_of(log, row, 1)
    assert not result_rows.is_run_of(log._replace(epochs=60), row, 1)


def test_states_of_a_row(rows, tmp_path):
    (row,) = rows(PARALLEL.format(since="", before="")).values()
    whole, part = a_log(tmp_path, name="whole.log"), a_log(tmp_path, name="part.log", reached=7)
    words = ["python", "learning_curves/cifar_dgl.py", "--epochs", "50"]
    assert reproduce.state(row, 2, [whole, part], []) == ("missing", None)
    assert reproduce.state(row, 1, [part, whole], [])[0] == "done"
    assert reproduce.state(row, 1, [part], []) == ("missing", None)  # no checkpoint to go on from
    assert reproduce.state(row, 1, [part], [(words, tmp_path)])[0] == "running"
    assert reproduce.state(row, 1, [part], [(words, ROOT)])[0] == "missing"
    part.path.with_suffix(".pt").touch()
    assert reproduce.state(row, 1, [part], []) == ("missing", part)
    assert "--resume" in reproduce.command(row, 1, part, arguments(tmp_path))


def arguments(folder):
    return reproduce.argparse.Namespace(half=True, device="auto", data_dir="data", log_dir=str(folder))
