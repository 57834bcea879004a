"""Runs scripts as a user does, but in this process: their real main, with real flags, logs and checkpoints."""

import os
import sys
from pathlib import Path

# One thread, here and in the processes started from here: the networks are tiny, and threads would wait for busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from gpu_commands import image_folders, on_gpu, overflow  # noqa: F401  fixtures
from running import ROOT, Finished, load_script

from decoupled.training.flags import start


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """run(script, *flags, folder=…, **names): runs the script and returns a Finished. ``names`` replace module-level
    names of the script: for a network that no flag gives.
    """

    def run(script, *flags, folder=tmp_path / "logs", **names):
        module = load_script(script)
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, flags), "--log-dir", str(folder)])
        start(module.main)
        return Finished(folder)

    return run


@pytest.fixture
def fails(run_script, capsys, tmp_path):
    """fails(script, *flags, folder=…): checks that the script exits with code 2, prints one line besides warnings to
    stderr, and writes no files; returns that line.
    """

    def files(folder):
        if not folder.is_dir():
            return None
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def run_failing(script, *flags, folder=tmp_path / "logs"):
        before = files(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script, *flags, folder=folder)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines(keepends=True)
        script_name = Path(script).name
        lines = [line for line in lines if not line.startswith(f"{script_name}: warning: ")]
        assert len(lines) == 1 and lines[0].startswith(f"{script_name}: error: "), lines
        assert files(folder) == before
        return lines[0]

    return run_failing


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
