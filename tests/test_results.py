"""results/reproduce.py: which logs count for which row, running what is missing, and tables that the logs give."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from running import ROOT, load_script

from decoupled import InputError
from decoupled.analysis.costs import costs
from decoupled.logs import read_log
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training.flags import start

reproduce = load_script("results/reproduce.py")
import result_rows  # noqa: E402
import result_tables  # noqa: E402

HEADER = "row,variant,size,script,flags,data,head,seeds,since,before,pflop\n"
SMALL = "--dataset digits --train-samples 64 --batch-size 32"
AUX, BUFFER = (
    f"aux_nets/cifar_dgl.py,{SMALL} --channels 3 --depth 2",
    f"async_buffer/cifar_buffer.py,{SMALL} --feature_size 3",
)
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
            start(reproduce.main)
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
        (a_log(tmp_path, name="another name.log", device="cpu"), "stands"),
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


def test_without_history_no_log_counts_and_tables_are_refused(rows, command, tmp_path, monkeypatch):
    (row,) = rows(PARALLEL.format(since="3b542318e651", before="")).values()
    monkeypatch.setattr(result_rows, "git", lambda *words: (128, ""))
    assert reproduce.state(row, 1, [a_log(tmp_path)], []) == ("unknown", None)
    with pytest.raises(SystemExit) as stop:
        command("--check")
    assert stop.value.code == 2


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


# Running


@pytest.fixture
def started(monkeypatch):
    """The commands that reproduce.py starts; they run as they do for a user."""
    commands, really = [], subprocess.Popen

    def start(words, **options):
        if words[0] == sys.executable:
            commands.append(words[1:])
        return really(words, **options)

    monkeypatch.setattr(reproduce.subprocess, "Popen", start)
    return commands


def test_runs_or_resumes_what_is_missing_harvests_it_and_then_has_nothing_to_do(
    rows, command, started, run_script, tmp_path
):
    rows(
        f"t-aux,a,tiny,{AUX} --epochs 2,digits,2,1 2,,,0.001",
        f"t-buffer,b,tiny,{BUFFER} --ncnn 2 --mlp 1 --epochs 1 --down [0],digits,1,1,,,0.001",
    )
    script, *flags = AUX.replace(",", " ").split()
    run_script(script, *flags, "--epochs", 1, "--name", "begun", folder=tmp_path / "runs")  # the name does not matter
    command("t-*", "--seeds", 1, "--jobs", 2)
    assert [(words[0], words[words.index("--seed") + 1]) for words in started] == [
        ("aux_nets/cifar_dgl.py", "1"),
        ("async_buffer/cifar_buffer.py", "1"),
    ]
    harvested = read_log(tmp_path / "results/aux_nets/t-aux-seed1.log")
    assert list(harvested["epoch"]) == [1, 1, 2, 2] and "resumed after epoch 1" in harvested.attrs["comments"]
    assert (tmp_path / "results/async_buffer/t-buffer-seed1.log").exists()
    assert ["aux_nets" in path.name for path in (tmp_path / "runs").glob("*.pt")] == [True]  # it could go on
    assert "t-aux, seed 1: done" in command("t-aux", "--seeds", 1) and len(started) == 2
    listed = dict(re.findall(r"^(t-\w+) +(.*?)  ", command("--list"), re.MULTILINE))
    assert listed == {"t-aux": "1 done, 1 missing", "t-buffer": "1 done"}


def test_ctrl_c_stops_the_runs(rows, command, started, monkeypatch):
    rows(f"t-long,p,tiny,{AUX} --epochs 9999,digits,2,1,,,1")
    jobs, start = [], reproduce.start

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "start", lambda *words: jobs.append(start(*words)) or jobs[0])
    monkeypatch.setattr(reproduce, "knows_data", interrupted)
    with pytest.raises(SystemExit) as stop:
        command("t-long")
    assert stop.value.code == 130 and jobs[0].process.poll() not in (None, -signal.SIGKILL)


def test_harvest_copies_what_is_finished_and_on_demand_what_is_under_way(rows, command, tmp_path):
    rows(PARALLEL.format(since="", before=""))
    (tmp_path / "runs").mkdir()
    for name, seed, reached in (("one.log", 1, 50), ("two.log", 2, 7)):
        a_log(tmp_path / "runs", name=name, seed=seed, reached=reached).path.with_suffix(".pt").touch()
    harvested = tmp_path / "results/learning_curves"
    command("--harvest")
    assert [path.name for path in harvested.iterdir()] == ["lc-parallel-seed1.log"]
    command("--harvest", "--unfinished")
    assert read_log(harvested / "lc-parallel-seed2.log")["epoch"].max() == 7
    assert command("--harvest") == ""
    a_log(tmp_path / "runs", name="two.log", seed=2)
    command("--harvest")
    assert read_log(harvested / "lc-parallel-seed2.log")["epoch"].max() == 50


def test_one_run_at_a_time_of_rows_that_share_it(rows, tmp_path):
    """Two rows that differ in their number of epochs are one run; two of the sequential script are two."""
    lines = [
        f"{name}{epochs},p,tiny,learning_curves/{script}.py,{SMALL} --epochs {epochs},digits,4,1 2,,,1"
        for name, script in (("parallel", "cifar_dgl"), ("sequential", "cifar_sequential_greedy"))
        for epochs in (1, 2)
    ]
    found, args = rows(*lines), arguments(tmp_path)
    with reproduce.lock(args, found["parallel1"], 1):
        assert reproduce.start(found["parallel2"], 1, None, args) is None
        reproduce.lock(args, found["parallel2"], 2).acquire()
    with reproduce.lock(args, found["sequential1"], 1), reproduce.lock(args, found["sequential2"], 1):
        pass


def test_a_run_on_other_images_than_its_rows_is_refused(rows, tmp_path):
    (row,) = rows(PARALLEL.format(since="", before="")).values()
    job = reproduce.Job(row, 1, None, None, None, 0)
    assert not reproduce.knows_data(job, arguments(tmp_path))
    a_log(tmp_path, name="x-lc-parallel-seed1-20260101-000000.log")
    assert reproduce.knows_data(job, arguments(tmp_path))
    a_log(tmp_path, name="x-lc-parallel-seed1-20260101-000000.log", data="50000 images of cifar10 (JPEG)")
    with pytest.raises(InputError, match="is of CIFAR-10, and data has 50000 images of cifar10"):
        reproduce.knows_data(job, arguments(tmp_path))


@pytest.mark.parametrize(
    "flags", [["--budget", "3"], ["nothing-*"], [], ["--table", "--check"], ["--list", "--unfinished"]], ids=str
)
def test_bad_flags(flags, command):
    with pytest.raises(SystemExit) as stop:
        command(*flags)
    assert stop.value.code == 2


# Rows and numbers as committed


@with_history
def test_the_committed_tables_are_what_the_committed_logs_give(monkeypatch, command):
    assert command("--check") == ""


@with_history
def test_every_committed_log_is_a_run_of_a_row():
    rows, logs = result_rows.read_rows(), result_rows.read_logs(result_rows.RESULTS)
    of_no_row = [
        log.path.name
        for log in logs
        if not any(
            result_rows.is_run_of(log, row, log.arguments["seed"]) and result_rows.standing(log, row) == "stands"
            for row in rows.values()
        )
    ]
    assert logs and of_no_row == []


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("learning_curves-parallel", {"channels": 64, "depth": 4, "auxiliary": "mlp-sr"}),
        ("aux_nets-cnn-64ch", {"channels": 64, "depth": 6, "auxiliary": "cnn"}),
    ],
)
def test_a_rows_cost_is_its_networks(name, network):
    row = result_rows.read_rows()[name]
    with torch.device("meta"):
        net = layerwise_cnn(downsample=(1, 3), classes=10, **network)
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
    assert result_tables.authors_value("parallel (DGL)", "test_top1", 4, [16]) == [84.30]
    assert result_tables.authors_value("DGL", "test_top1", 3, [10]) == [61.46]  # counted from 1


# Tables


def test_cells():
    assert [result_tables.cell(values) for values in ([], [1], [1, 2], [1, 2, 3])] == [
        "",
        "1.00",
        "1.50 (1.00, 2.00)",
        "2.00 ± 1.00",
    ]


def test_tables_show_finished_runs_and_unfinished_ones_beside_the_authors_epochs(rows, tmp_path):
    found = rows(PARALLEL.format(since="", before="").replace("lc-parallel,", "lc,"))
    page = tmp_path / "page.md"
    page.write_text(
        "".join(
            f"{name}\n<!-- table: {name} -->\nold\n<!-- /table -->\n" for name in ("summary", "learning_curves_epochs")
        )
    )
    logs = [a_log(tmp_path), a_log(tmp_path, name="second.log", seed=2, reached=16)]
    text = result_tables.filled(page, found, logs)
    assert "| parallel (DGL) | published | ours | 15.00 | 25.00 | 35.00 | 45.00 | CIFAR-10 | [1](run.log) |" in text
    assert "| parallel (DGL) | published | authors' log parallel.log | 78.35 | 85.25 | 87.90 | 89.86 |" in text
    assert "| parallel (DGL) | CIFAR-10 | 16 | 11.60 (11.60, 11.60) | 71.59 |" in text
    assert (
        "| parallel (DGL) | CIFAR-10 | 50 | 15.00 | 78.35 | 25.00 | 85.25 | 35.00 | 87.90 | 45.00 | 89.86 | 1 |" in text
    )
    assert "old" not in text and text.count("<!-- /table -->") == 2
    page.write_text("<!-- table: nonsense -->\n<!-- /table -->")
    with pytest.raises(InputError, match="there is no table nonsense"):
        result_tables.filled(page, found, logs)


def test_a_mean_over_epochs_needs_them_all(tmp_path):
    log = a_log(tmp_path, reached=14)
    assert result_tables.value(log, "test_top1", 1, range(11, 15)) == [pytest.approx(11.25)]
    assert result_tables.value(log, "test_top1", 1, range(11, 16)) == []
    assert result_tables.authors_value("cDNI", "test_top1", 3, range(11, 16)) == [pytest.approx(51.856)]
    assert result_tables.authors_value("cDNI", "test_top1", 3, [60, 61]) == []  # the file has every 50th from there


def test_a_result_that_no_table_has_is_found(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("## Results\n12.34 and 56.78\n## Data\n99.99\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/README.md").write_text("12.35 <!-- table: dni -->\n| 12.34 |\n<!-- /table -->")
    monkeypatch.setattr(result_tables, "ROOT", tmp_path)
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path / "results")
    assert result_tables.unfounded() == ["56.78"]
