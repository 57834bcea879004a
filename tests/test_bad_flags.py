"""Every flag of every script has its range and says so in one line; names and paths of any kind work or are refused."""

import argparse
import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from running import PARALLEL, ROOT, load_script

from decoupled import InputError
from decoupled.training import flags
from decoupled.training.checkpoint import RunFiles

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("*/*.py")
    if "flags.start(main" in path.read_text() and path.parent.name not in ("tests", "decoupled")
)
NUMBERS = re.compile(r"(integer|number)\.<locals>")
BAD = ("", "x", "nan", "inf", "-inf", "-1", "1e999", "9" * 60, "0x10", "1,5")
TOY = (
    *("--dataset", "digits", "--train-samples", "64", "--batch-size", "32", "--test-batch-size", "400"),
    *("--device", "cpu", "--epochs", "1", "--channels", "1"),
)


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


def is_numeric(action):
    if not action.option_strings:
        return False
    return action.type in (int, float) or bool(NUMBERS.search(getattr(action.type, "__qualname__", "")))


def numeric_flags(parser):
    """(words that a command line with the flag needs, the flag's action) of a parser and of its subcommands: a list."""
    required = ["DIR" for action in parser._actions if not action.option_strings and action.nargs not in ("*", "A...")]
    found = []
    for action in parser._actions:
        if is_numeric(action):
            found.append((required, action))
        elif isinstance(action, argparse._SubParsersAction):
            for command, subparser in action.choices.items():
                found += [([command, *words], flag) for words, flag in numeric_flags(subparser)]
    return found


def test_there_are_scripts():
    assert len(SCRIPTS) >= 15 and PARALLEL in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_are_none_or_out_of_range(script, monkeypatch, capsys):
    parser = parser_of(script, monkeypatch)
    numeric = numeric_flags(parser)
    assert numeric
    for words, action in numeric:
        for value in BAD:
            with pytest.raises(SystemExit) as stop:  # not raised: this flag takes this value
                parser.parse_args([*words, f"{action.option_strings[-1]}={value}"])
            message = capsys.readouterr().err
            assert stop.value.code == 2 and message.count("\n") == 1
            assert re.match(r"\S+: error: ", message), message
            assert action.option_strings[-1].replace("_", "-") in message.replace("_", "-")


def test_ranges_include_their_ends_and_are_named():
    for text in ("0.5", "0", "3.39e38"):
        assert flags.number(least=0)(text) == float(text)
    assert flags.integer(0)(str(2**63 - 1)) == 2**63 - 1
    for convert, text, limit in (
        (flags.number(above=0), "0", "> 0"),
        (flags.number(above=0), "1e39", "< 3.4e+38"),
        (flags.number(least=0, below=1), "1", "< 1"),
        (flags.integer(0), str(2**63), str(2**63 - 1)),
        (flags.WIDTH, "8193", "8192"),
    ):
        with pytest.raises(Exception, match=re.escape(limit)) as error:
            convert(text)
        assert text in str(error.value)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_of_the_range_runs(run_script, seed):
    run_script(PARALLEL, *TOY, "--seed", seed)


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), (0, 1), (1, 0)])
def test_of_several_processes_the_first_says_what_is_wrong_with_the_flags(monkeypatch, capsys, rank, lines):
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "argv", [PARALLEL, "--epochs", "x"])
    with pytest.raises(SystemExit) as stop:
        flags.start(load_script(PARALLEL).main)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == lines


# Names and paths


@pytest.mark.parametrize("name", ["a/b", "/", "a\nb", "\r", "\x1b[2J", "x" * 161, "ü" * 81, os.fsdecode(b"\xff")])
def test_names_that_are_no_part_of_a_files_name_are_refused_before_anything_is_written(fails, name):
    assert "--name" in fails(PARALLEL, *TOY, f"--name={name}")


@pytest.mark.parametrize("name", ["[a-z]*?", "--resume", "..", "x" * 160, "日本", "20260101-000000-3"])
def test_other_names_work_and_are_found_again(run_script, name):
    for again in ((), ("--resume",)):
        left = run_script(PARALLEL, *TOY, f"--name={name}", *again)
        assert left.log.name.startswith(f"learning_curves-cifar_dgl-{name}-")
        assert len([*left.folder.glob("*.log")]) == 1


def test_a_name_does_not_find_another_names_run(tmp_path):
    names = ("", "a", "a-b", "20260101-000000")
    paths = {name: tmp_path / f"{RunFiles(tmp_path, 'script', name).prefix}-20270101-000000.pt" for name in names}
    for path in paths.values():
        path.touch()
    for name, path in paths.items():
        assert RunFiles(tmp_path, "script", name).newest_checkpoint() == path


@pytest.mark.parametrize("name", ["a\nn: 1, epoch 9", os.fsdecode(b"caf\xe9")])
def test_paths_of_any_characters_work(run_script, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for again in ((), ("--resume",)):
        left = run_script(PARALLEL, *TOY, "--data-dir", folder, *again, folder=folder / "logs")
    assert len([line for line in left.log.read_text().splitlines() if line.startswith("n: ")]) == 4


def test_the_home_directory_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(ROOT / PARALLEL), *TOY, "--log-dir", "~/runs"])
    main = load_script(PARALLEL).main
    flags.start(main)
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".log", ".pt"}
    (checkpoint,) = (tmp_path / "runs").glob("*.pt")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "~nobody/runs", "--resume", f"~/runs/{checkpoint.name}"])
    flags.start(main)


@pytest.mark.parametrize("what", ["log", "text", "folder", "zip", "pickle", "nothing", "no suffix"])
def test_whatever_resume_is_given_ends_in_one_line(fails, tmp_path, what):
    path = tmp_path / {"log": "RUN.log", "no suffix": "RUN"}.get(what, "RUN.pt")
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
    assert str(path) in fails(PARALLEL, *TOY, "--resume", path)
    assert sorted(tmp_path.iterdir()) == before


# How a script ends


def ends(monkeypatch, capsys, main):
    """(exit code, lines on stderr) of a script's ``main``."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        flags.start(main)
    return stop.value.code, capsys.readouterr().err.splitlines()


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code"),
    [
        (raising(InputError("a\nb")), 2),
        (raising(KeyboardInterrupt()), 130),
        (raising(MemoryError()), 2),
        (lambda: torch.empty(2**60), 2),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0\nhas")), 2),
        (raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")), 2),
    ],
)
def test_what_ends_in_one_line(monkeypatch, capsys, main, code):
    found, lines = ends(monkeypatch, capsys, main)
    assert found == code and len(lines) == 1 and lines[0].startswith("script.py: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), FileNotFoundError(2, "no", "x"), OSError(24, "open files")]
)
def test_anything_else_is_an_ordinary_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)):
        flags.start(raising(error))


def test_torchrun_is_told_why_a_process_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert ends(monkeypatch, capsys, raising(InputError("this cannot be used")))[0] == 2
    assert "this cannot be used" in (tmp_path / "error.json").read_text()


def test_without_a_compiler_nothing_begins(tmp_path):
    """In a process of its own: the compiler remembers for its process that there is one, or none."""
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, ROOT / PARALLEL, *TOY, "--compile", "--log-dir", tmp_path / "logs"]
    ended = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "--compile" in ended.stderr, ended.stderr
    assert not (tmp_path / "logs").exists()


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path):
    words = [sys.executable, str(ROOT / PARALLEL), *TOY, "--log-dir", str(tmp_path / "logs")]
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0 and not done.stderr
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "n: 4, epoch 1," in log.read_text() and log.with_suffix(".pt").exists()
