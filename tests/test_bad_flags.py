"""Every flag of every script has its range and says so in one line; names and paths of any kind work or are refused."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from running import PARALLEL, ROOT, load_script, small

from decoupled.training import flags
from decoupled.training.checkpoint import Checkpoint

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*/*.py"), ROOT / "decoupled" / "plots.py")
    if "flags.start(main" in path.read_text() and path.parent.name not in ("tests", "decoupled")
)
NUMBERS = re.compile(r"(integer|number)\.<locals>")
BAD = ("", "x", "nan", "inf", "-inf", "-1", "1e999", "9" * 60, "0x10", "1,5")
TOY = ["--dataset", "digits", "--train-samples", "64", "--batch-size", "32", "--device", "cpu", "--epochs", "1"]


class Caught(Exception):
    pass


def parser_of(script, monkeypatch):
    """The parser of ``script``, as it is when it meets the command line."""

    def catch(self, *args):
        raise Caught(self)

    monkeypatch.setattr(sys, "argv", [script])
    with monkeypatch.context() as patch:
        patch.setattr(flags.Parser, "parse_known_args", catch)
        module = load_script(script)
        with pytest.raises(Caught) as caught:
            getattr(module, "parse_args", module.main)()
    return caught.value.args[0]


def test_there_are_scripts():
    assert len(SCRIPTS) >= 15 and PARALLEL in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_are_none_or_out_of_range(script, monkeypatch, capsys):
    parser = parser_of(script, monkeypatch)
    required = ["DIR"] * sum(not action.option_strings and action.nargs != "*" for action in parser._actions)
    known = [action for action in parser._actions if action.option_strings and action.type]
    numeric = [a for a in known if a.type in (int, float) or NUMBERS.search(getattr(a.type, "__qualname__", ""))]
    assert numeric
    for action in numeric:
        for value in BAD:
            with pytest.raises(SystemExit) as stop:  # not raised: this flag takes this value
                parser.parse_args([*required, f"{action.option_strings[-1]}={value}"])
            message = capsys.readouterr().err
            assert stop.value.code == 2 and message.count("\n") == 1
            assert re.match(r"\S+: error: argument ", message), message
            assert action.option_strings[-1].replace("_", "-") in message.replace("_", "-")


@pytest.mark.parametrize("text", ["0.5", "0", "3.39e38"])
def test_numbers_at_the_ends_of_their_range(text):
    assert flags.number(least=0)(text) == float(text)
    assert flags.integer(0, 2**63 - 1)(str(2**63 - 1)) == 2**63 - 1


def test_what_a_number_must_be_is_said(fails):
    assert "--lr: '0' must be a number > 0 (" in fails("async_buffer/cifar_buffer.py", "--lr", 0)
    assert "--lr: '1e39' must be a number > 0 and < 3.4e+38" in fails("async_buffer/cifar_buffer.py", "--lr", "1e39")
    assert "--seed: '9223372036854775808' must be an integer ≤" in fails(PARALLEL, "--seed", 2**63)
    assert "--channels: '8193' must be an integer ≤ 8192" in fails("aux_nets/cifar_dgl.py", "--channels", 8193)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
@pytest.mark.parametrize("script", [PARALLEL, "async_buffer/cifar_buffer.py"])
def test_every_seed_of_the_range_runs(run_script, script, seed):
    names = {"layerwise_cnn": small(channels=2)} if script == PARALLEL else {}
    words = () if script == PARALLEL else ("--feature_size", 2, "--ncnn", 2, "--down", "[]")
    run_script(script, *TOY, *words, "--seed", seed, **names)


# Names and paths


@pytest.mark.parametrize("name", ["a/b", "/", "a\nb", "\r", "\x1b[2J", "x" * 161, "ü" * 81, os.fsdecode(b"\xff")])
def test_names_that_are_no_part_of_a_files_name_are_refused_before_anything_is_written(fails, name):
    assert "argument --name: " in (message := fails(PARALLEL, *TOY, f"--name={name}"))
    assert "must be printable text without /" in message


@pytest.mark.parametrize(
    "name", ["[a-z]*?", "-x", "--resume", "..", " ", "x" * 160, "日本", "20260101-000000-3", "$HOME"]
)
def test_other_names_work_and_are_found_again(run_script, name):
    tiny = small(channels=1, depth=1, downsample=())
    for again in ((), ("--resume",)):
        left = run_script(PARALLEL, *TOY, f"--name={name}", *again, layerwise_cnn=tiny)
        assert left.log.name.startswith(f"learning_curves-cifar_dgl-{name}-")
        assert len([*left.folder.glob("*.log")]) == 1


def test_a_name_does_not_find_another_names_run(tmp_path):
    for name in ("", "a", "a-b", "20260101-000000"):
        checkpoint = Checkpoint(tmp_path, "script", name)
        checkpoint.path("-20270101-000000.pt").touch()
        assert checkpoint.newest() == checkpoint.path("-20270101-000000.pt")


@pytest.mark.parametrize("kind", ["newline", "bytes"])
def test_paths_of_any_characters_work(run_script, tmp_path, kind):
    folder = tmp_path / {"newline": "a\nn: 1, epoch 9", "bytes": os.fsdecode(b"caf\xe9")}[kind]
    folder.mkdir()
    tiny = small(channels=1, depth=1, downsample=())
    for again in ((), ("--resume",)):
        left = run_script(PARALLEL, *TOY, "--data-dir", folder, *again, folder=folder / "logs", layerwise_cnn=tiny)
    assert len([line for line in left.log.read_text().splitlines() if line.startswith("n: ")]) == 1


def test_the_home_directory_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(ROOT / PARALLEL), *TOY, "--log-dir", "~/runs"])
    module = load_script(PARALLEL)
    module.layerwise_cnn = small(channels=1, depth=1, downsample=())
    flags.start(module.main)
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".log", ".pt"}
    (checkpoint,) = (tmp_path / "runs").glob("*.pt")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "~nobody/runs", "--resume", f"~/runs/{checkpoint.name}"])
    flags.start(module.main)


@pytest.mark.parametrize("what", ["log", "text", "folder", "zip", "pickle", "nothing", "no suffix"])
def test_whatever_resume_is_given_ends_in_one_line(fails, tmp_path, what):
    path = tmp_path / ("RUN.log" if what == "log" else "RUN" if what == "no suffix" else "RUN.pt")
    expected = {
        "log": "is not called .pt",
        "no suffix": "is not called .pt",
        "zip": "is no checkpoint of these scripts",
    }
    expected |= {"pickle": "is no checkpoint of these scripts", "folder": "no checkpoint", "nothing": "no checkpoint"}
    if what == "folder":
        path.mkdir()
    elif what == "zip":
        (tmp_path / "sub").mkdir()
        os.rename(shutil.make_archive(tmp_path / "sub" / "zip", "zip", tmp_path / "sub"), path)
    elif what == "pickle":
        torch.save({"a": torch.nn.Linear(1, 1)}, path)
    elif what != "nothing":
        path.write_text("Namespace()\n")
    before = sorted(tmp_path.iterdir())
    message = fails(PARALLEL, *TOY, "--resume", path, layerwise_cnn=small())
    assert f"{path}" in message and expected.get(what, "is truncated, damaged or no checkpoint") in message
    assert sorted(tmp_path.iterdir()) == before


# Where the machine has too little


@pytest.mark.parametrize("size", [2**60, 2**62])
def test_a_network_that_cannot_be_allocated(fails, size):
    message = fails(PARALLEL, *TOY, layerwise_cnn=lambda **settings: torch.empty(size))
    assert "out of memory (" in message and "choose a smaller batch or network" in message


@pytest.mark.parametrize("flag", ["--data-dir", "--resume", "--log-dir"])
def test_paths_that_are_too_long_or_closed_to_us(fails, monkeypatch, flag):
    long = "x" * 5000
    words = (*TOY[2:], "--dataset", "cifar10") if flag == "--data-dir" else TOY
    value = f"{long}.pt" if flag == "--resume" else long
    if flag == "--log-dir":
        with pytest.raises(SystemExit) as stop:
            monkeypatch.setattr(sys, "argv", [PARALLEL, *words, flag, value])
            flags.start(load_script(PARALLEL).main)
        assert stop.value.code == 2
    else:
        assert "(File name too long)" in fails(PARALLEL, *words, flag, value)
    denied = PermissionError(13, "Permission denied", "/data/train")
    assert flags.shortage(denied).startswith("/data/train cannot be used (Permission denied)")
    assert flags.shortage(RuntimeError("mat1 and mat2")) is flags.shortage(FileNotFoundError(2, "no", "x")) is None


def test_without_a_compiler_nothing_begins(tmp_path):
    """In a process of its own: the compiler remembers for its process that there is none."""
    command = [sys.executable, str(ROOT / PARALLEL), *map(str, TOY), "--compile", "--log-dir", str(tmp_path / "logs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": "/no/compiler"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "--compile does not work here (" in done.stderr
    assert "install a C++ compiler, or leave --compile out" in done.stderr
    assert not (tmp_path / "logs").exists()


# Output that cannot be written

QUICK = f"{sys.executable} {ROOT}/aux_nets/cifar_dgl.py {' '.join(TOY)} --channels 2 --depth 3 --log-dir logs"


@pytest.mark.parametrize("where", ["1>&- 2>&-", "> /dev/full 2> /dev/full", "| true"])
def test_a_run_goes_on_where_its_output_cannot_be_written(tmp_path, where):
    if "full" in where and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = f"set -o pipefail; {QUICK} {where}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "n: 3, epoch 1," in log.read_text() and log.with_suffix(".pt").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_in_any_encoding(monkeypatch, capfd, encoding):
    for script in SCRIPTS:
        with open(1, "w", encoding=encoding, closefd=False) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit) as stop:
                flags.start(load_script(script).main)
        assert not stop.value.code and "usage: " in capfd.readouterr().out
