"""Where a run and its tools come from: commits, and notebooks opened elsewhere."""

import re
import shutil
import subprocess
import sys

import pytest
from running import PARALLEL, ROOT

from decoupled import InputError
from decoupled.analysis import plots
from decoupled.training import environment


def git(folder, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@x.x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with a script: its folder and commit."""
    folder = tmp_path / "clone"
    (folder / "learning_curves").mkdir(parents=True)
    (folder / "learning_curves" / "script.py").write_text("pass\n")
    git(folder.parent, "init", "-q", folder.name)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder, git(folder, "rev-parse", "--short=12", "HEAD").strip()


def commit_of(monkeypatch, script):
    """What a log says when ``script`` is run."""
    monkeypatch.setattr(sys, "argv", [str(script)])
    return environment.commit()


def test_a_script_and_a_package_of_two_clones_are_both_named(clone, monkeypatch):
    folder, commit = clone
    package = commit_of(monkeypatch, ROOT / PARALLEL)
    assert "script" not in package
    script = folder / "learning_curves" / "script.py"
    both = commit_of(monkeypatch, script)
    assert both.startswith(f"{commit} (script, {folder}), ") and both.endswith(f" (package, {ROOT / 'decoupled'})")
    script.write_text("changed\n")
    assert commit_of(monkeypatch, script).startswith(f"{commit}+ (script, ")


def test_a_script_that_git_does_not_track_is_marked(clone, monkeypatch, tmp_path):
    folder, commit = clone
    new = folder / "learning_curves" / "new.py"
    new.write_text("pass\n")
    assert commit_of(monkeypatch, new).startswith(f"{commit}+ (script, ")
    shutil.copytree(ROOT / "decoupled", folder / "decoupled", ignore=shutil.ignore_patterns("__pycache__"))
    git(folder, "add", "decoupled")
    git(folder, "commit", "-qm", "second")
    commit = git(folder, "rev-parse", "--short=12", "HEAD").strip()
    monkeypatch.setattr(environment, "__file__", str(folder / "decoupled" / "training" / "environment.py"))
    assert commit_of(monkeypatch, folder / "learning_curves" / "script.py") == commit
    assert commit_of(monkeypatch, new) == f"{commit}+"
    (folder / "mine").mkdir()
    assert commit_of(monkeypatch, folder / "mine" / "new.py") == f"{commit}+"


def test_a_repository_around_a_copy_is_not_named(clone, monkeypatch, tmp_path):
    folder, commit = clone
    package = commit_of(monkeypatch, tmp_path / "script.py")  # of no repository
    assert commit not in package
    copy = folder / "copy" / "scripts"
    copy.mkdir(parents=True)
    (copy / "script.py").write_text("pass\n")
    assert commit_of(monkeypatch, copy / "script.py") == package
    monkeypatch.setattr(environment, "__file__", str(folder / "copy" / "decoupled" / "training" / "environment.py"))
    assert commit_of(monkeypatch, copy / "script.py") == "unknown"


def test_a_notebook_opened_elsewhere_finds_the_results_or_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert plots.results_folder() == ROOT / "results"
    monkeypatch.chdir(ROOT / "aux_nets")
    assert plots.results_folder() == ROOT / "results"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "__file__", str(tmp_path / "site-packages" / "decoupled" / "plots.py"))
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        plots.results_folder()


def test_every_notebook_asks_for_the_results_folder():
    notebooks = [path for path in ROOT.glob("*/*.ipynb") if path.parent.name != "examples"]
    assert len(notebooks) >= 6
    for notebook in notebooks:
        assert "RESULTS = results_folder()" in notebook.read_text()
