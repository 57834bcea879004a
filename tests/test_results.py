"""results/reproduce.py: which logs are runs of which row, running what is missing, and tables that the logs give."""

import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, load_script

from decoupled import InputError
from decoupled.logs import parse_run_name, read_log
from decoupled.networks.layerwise import layerwise_cnn

reproduce = load_script("results/reproduce.py")
import result_rows  # noqa: E402
import result_tables  # noqa: E402

from decoupled.analysis.costs import costs  # noqa: E402
from decoupled.training.flags import start  # noqa: E402

HEADER = "row,variant,size,script,flags,data,head,seeds,pflop\n"
SMALL = "--dataset digits --train-samples 64 --batch-size 32"
AUX = f"aux_nets/cifar_dgl.py,{SMALL} --channels 2 --depth 2"
PARALLEL = "lc,parallel (DGL),published,learning_curves/cifar_dgl.py,,CIFAR-10,4,1 2,0.866"


@pytest.fixture
def results(tmp_path):
    """results(*lines): makes a folder of results with these lines as its rows.csv, and returns the rows."""
    folder = tmp_path / "results"
    (folder / "learning_curves").mkdir(parents=True)

    def write(*lines):
        (folder / "rows.csv").write_text(HEADER + "\n".join(lines) + "\n")
        return result_rows.read_rows(folder / "rows.csv")

    return write


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*words): runs reproduce.py on these results; returns what it printed."""

    def run(*words):
        folders = ["--results", str(tmp_path / "results")] if words[0] in ("list", "run") else []
        if words[0] == "run":
            folders += ["--log-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["results/reproduce.py", *map(str, words), *folders])
        monkeypatch.chdir(ROOT)  # and back again, at the end
        capsys.readouterr()
        start(reproduce.main)
        return capsys.readouterr().out

    return run


def a_log(path, data="50000 images of cifar10 (PNG)", epochs=50, reached=50, **arguments):
    """Writes a log of learning_curves' parallel script as it would be, with a line of each head per epoch."""
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in arguments.items())
    namespace = result_rows.parse_flags("learning_curves/cifar_dgl.py", flags) | {"epochs": epochs}
    text = ", ".join(f"{key}={value!r}" for key, value in namespace.items())
    lines = [f"Namespace({text})"]
    lines += [f"# command: python learning_curves/cifar_dgl.py {flags} --epochs {epochs}", "# commit: 0123456789ab"]
    lines += ["# device: cpu (x86_64), 1 threads, bf16 mixed", f"# train: {data}"]
    for epoch in range(1, reached + 1):
        for n in range(1, 5):
            lines.append(f"n: {n}, epoch {epoch}, loss: 1.0, train top1:50.0 test top1:{10 * n + epoch / 10} ")
        lines.append(f"# epoch {epoch} took 2.00 s")
    path.write_text("\n".join(lines) + "\n")
    return path


# Rows and logs


def test_a_rows_logs_are_those_of_its_name_and_seeds(results, tmp_path):
    (row,) = results(PARALLEL).values()
    folder = tmp_path / "results/learning_curves"
    a_log(folder / "lc-seed1.log", epochs=300, reached=60)  # its first 50 epochs are the row's
    a_log(folder / "elsewhere.log", seed=2)
    runs = result_rows.read_runs(row, tmp_path / "results")
    assert list(runs) == [1] and result_rows.wall_time(runs[1], row) == 100
    a_log(folder / "lc-seed2.log", seed=2, reached=7)
    runs = result_rows.read_runs(row, tmp_path / "results")
    assert [result_rows.is_finished(log, row) for log in runs.values()] == [True, False]
    a_log(folder / "lc-seed2.log", seed=1)
    with pytest.raises(InputError, match=r"lc-seed2\.log"):
        result_rows.read_runs(row, tmp_path / "results")


@pytest.mark.parametrize(
    "change",
    [{"seed": 3}, {"data": "50000 images of cifar10 (JPEG)"}, {"train_samples": 1000}, {"batch_size": 64}],
    ids=str,
)
def test_a_log_of_another_run_is_refused(results, tmp_path, change):
    (row,) = results(PARALLEL).values()
    result_rows.check_log(row, result_rows.read_run_log(a_log(tmp_path / "own.log", device="cpu")))
    other = result_rows.read_run_log(a_log(tmp_path / "other.log", **change))
    with pytest.raises(InputError, match=r"other\.log"):
        result_rows.check_log(row, other)


def test_runs_of_sequential_greedy_learning_and_the_simulation_have_their_rows_number_of_epochs():
    row = result_rows.read_rows()["learning_curves-sequential"]
    log = result_rows.read_run_log(ROOT / "results/learning_curves/learning_curves-sequential-seed1.log")
    result_rows.check_log(row, log)
    with pytest.raises(InputError):
        result_rows.check_log(row, log._replace(epochs=60))


def test_every_committed_log_is_a_run_of_a_row():
    named = set()
    for row in result_rows.read_rows().values():
        for log in result_rows.read_runs(row).values():
            named.add(log.path)
    assert named == set((ROOT / "results").rglob("*.log")) and named


# Running


def test_runs_and_resumes_what_is_missing_and_then_has_nothing_to_do(results, command, run_script, tmp_path):
    results(
        f"t-aux,a,tiny,{AUX} --epochs 2,digits,2,1 2,0.001",
        f"t-buffer,b,tiny,async_buffer/cifar_buffer.py,{SMALL} --feature_size 2 --ncnn 2 --mlp 1 --epochs 1 --down [0],"
        "digits,1,1,0.001",
    )
    script, *flags = AUX.replace(",", " ").split()
    run_script(script, *flags, "--epochs", 1, "--name", "t-aux-seed1", folder=tmp_path / "runs")
    command("run", "t-*", "--seeds", 1, "--jobs", 2)
    log = read_log(tmp_path / "results/aux_nets/t-aux-seed1.log")
    assert list(log["epoch"]) == [1, 1, 2, 2] and any(line.startswith("resumed") for line in log.attrs["comments"])
    assert (tmp_path / "results/async_buffer/t-buffer-seed1.log").is_file()
    assert [parse_run_name(path).prefix for path in (tmp_path / "runs").glob("*.pt")] == [
        "aux_nets-cifar_dgl-t-aux-seed1"
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    command("run", "t-*", "--seeds", 1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before
    listed = [line.split()[:4] for line in command("list").splitlines()[1:]]
    assert listed == [["t-aux", "1", "of", "2"], ["t-buffer", "1", "of", "1"]]


def finished(row, folder, exit_code=0):
    """A job of the row's seed 1 that has ended."""
    output = folder / "a.out"
    output.write_text("its last line\n")
    return reproduce.Job(row, 1, SimpleNamespace(returncode=exit_code), output)


def test_only_finished_runs_of_the_row_are_copied(results, tmp_path):
    (row,) = results(PARALLEL).values()
    args = SimpleNamespace(log_dir=str(tmp_path), results=str(tmp_path / "results"))
    target = tmp_path / "results/learning_curves/lc-seed1.log"
    log = tmp_path / "learning_curves-cifar_dgl-lc-seed1-20260101-000000.log"
    with pytest.raises(InputError, match="its last line"):
        reproduce.finish_run(finished(row, tmp_path, exit_code=2), args)
    with pytest.raises(InputError, match=r"a\.out"):
        reproduce.finish_run(finished(row, tmp_path), args)
    for wrong in ({"reached": 49}, {"data": "50000 images of cifar10 (JPEG)"}):
        a_log(log, **wrong)
        with pytest.raises(InputError):
            reproduce.finish_run(finished(row, tmp_path), args)
    assert not target.exists()
    a_log(log)
    a_log(tmp_path / "learning_curves-cifar_dgl-lc-seed1-20251231-000000.log", reached=1)
    a_log(tmp_path / "learning_curves-cifar_dgl-other-lc-seed1-20260102-000000.log", reached=1)
    reproduce.finish_run(finished(row, tmp_path), args)
    assert target.read_text() == log.read_text()


@pytest.mark.parametrize("way", ["budget", "Ctrl-C"])
def test_the_budgets_end_and_ctrl_c_stop_the_runs(results, command, way):
    results(f"t-long,p,tiny,{AUX} --epochs 9999,digits,2,1,1")
    started = time.monotonic()
    if way == "budget":
        command("run", "t-long", "--budget", 0.02)
    else:
        timer = threading.Timer(1, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(SystemExit) as stop:
            command("run", "t-long")
        assert stop.value.code == 130
    assert time.monotonic() - started < reproduce.GRACE  # it was not waited for in vain and killed


@pytest.mark.parametrize("words", [["run"], ["run", "nothing-*"], ["run", "lc", "--budget", "0"], ["all"]], ids=str)
def test_bad_flags(words, results, command):
    results(PARALLEL)
    with pytest.raises(SystemExit) as stop:
        command(*words)
    assert stop.value.code == 2


# Rows and numbers as committed


def test_the_committed_tables_are_what_the_committed_logs_give(command):
    assert command("check") == ""


def test_a_rows_cost_is_its_networks():
    row = result_rows.read_rows()["learning_curves-parallel"]
    with torch.device("meta"):
        net = layerwise_cnn(channels=64, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=10)
        frame = costs(net, torch.empty(2, 3, 32, 32))
    flops = frame["training_flops"].xs("module", level="part").sum()
    assert row.pflop == pytest.approx(flops * 50000 * row.epochs / 1e15, rel=0.01)


def test_the_authors_curves_end_in_the_numbers_quoted_of_their_logs():
    paper, authors = result_tables.PAPER, result_tables.AUTHORS
    quoted = paper[paper["source"].str.startswith("authors' log")]
    assert len(quoted) == 17
    for figure in quoted.itertuples():
        key = (figure.source.split()[-1], int(figure.head), int(figure.epoch))
        assert authors.loc[key, figure.metric] == float(figure.value), figure
        assert key[2] == authors.loc[key[0]].index.get_level_values("epoch").max()
    assert result_tables.authors_value_at("parallel (DGL)", "test_top1", 4, 16) == 84.30
    assert result_tables.authors_value_at("DGL", "test_top1", 3, 10) == 61.46  # counted from 1


# Tables


def test_cells():
    cells = [result_tables.cell(values) for values in ([], [1], [1, 2], [1, 2, 3])]
    assert cells == ["", "1.00", "1.50 (1.00, 2.00)", "2.00 ± 1.00"]


def test_tables_show_finished_runs_and_unfinished_ones_beside_the_authors_epochs(results, tmp_path):
    rows = results(PARALLEL)
    a_log(tmp_path / "results/learning_curves/lc-seed1.log")
    a_log(tmp_path / "results/learning_curves/lc-seed2.log", seed=2, reached=16)
    runs = {"lc": result_rows.read_runs(rows["lc"], tmp_path / "results")}
    page = tmp_path / "page.md"
    tables = [f"<!-- table: {name} -->\nold\n<!-- /table -->\n" for name in ("summary", "learning_curves_epochs")]
    page.write_text("".join(tables))
    text = result_tables.fill_tables(page, rows, runs)
    link = "[1](results/learning_curves/lc-seed1.log)"
    assert f"| parallel (DGL) | published | ours | 15.00 | 25.00 | 35.00 | 45.00 | CIFAR-10 | {link} |" in text
    assert "| parallel (DGL) | published | authors' log parallel.log | 78.35 | 85.25 | 87.90 | 89.86 |" in text
    assert "| parallel (DGL) | CIFAR-10 | 16 | 11.60 (11.60, 11.60) | 71.59 |" in text
    last = "| parallel (DGL) | CIFAR-10 | 50 | 15.00 | 78.35 | 25.00 | 85.25 | 35.00 | 87.90 | 45.00 | 89.86 | 1 |"
    assert last in text and "old" not in text and text.count("<!-- /table -->") == 2
    page.write_text("<!-- table: nonsense -->\n<!-- /table -->")
    with pytest.raises(InputError, match="nonsense"):
        result_tables.fill_tables(page, rows, runs)


def test_a_value_that_a_log_lacks_is_none(tmp_path):
    log = result_rows.read_run_log(a_log(tmp_path / "a.log", reached=14))
    assert result_tables.value_at(log, "test_top1", 1, 14) == pytest.approx(11.4)
    assert result_tables.value_at(log, "test_top1", 1, 15) is None
    assert result_tables.value_at(log, "ensemble_top1", 1, 14) is None
    assert result_tables.authors_value_at("cDNI", "test_top1", 3, 61) is None  # they have every 50th from there
    assert result_tables.authors_value_at("cDNI", "train_top1", 3, 60) is None


def test_a_result_that_no_table_has_is_found(tmp_path):
    page, tables = tmp_path / "page.md", tmp_path / "tables.md"
    page.write_text("## Results\n12.34 and 56.78\n## Data\n99.99\n")
    tables.write_text("12.35 <!-- table: dni -->\n| 12.34 |\n<!-- /table -->")
    assert result_tables.results_in_no_table(page, tables) == ["56.78"]
