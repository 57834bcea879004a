"""Where a run and its tools come from: commits, the wheel, and notebooks opened elsewhere."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from running import ROOT

from decoupled import InputError
from decoupled.analysis import plots
from decoupled.training import environment as provenance


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


def test_a_script_and_a_package_of_two_clones_are_both_named(clone, monkeypatch):
    folder, commit = clone
    monkeypatch.setattr(sys, "argv", [str(ROOT / "learning_curves" / "cifar_dgl.py")])
    assert "script" not in provenance.commit()
    monkeypatch.setattr(sys, "argv", [str(folder / "learning_curves" / "script.py")])
    package = provenance.state(ROOT / "decoupled")
    assert provenance.commit() == f"{commit} (script, {folder}), {package} (package, {ROOT / 'decoupled'})"
    (folder / "learning_curves" / "script.py").write_text("changed\n")
    assert provenance.commit().startswith(f"{commit}+ (script, ")


def test_a_script_of_no_repository_is_the_packages_affair(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    assert provenance.commit() == provenance.state(ROOT / "decoupled")
    assert provenance.state(tmp_path) == "unknown"


def test_the_wheel_has_the_libraries_alone(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("decoupled", "dni"):
        shutil.copytree(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    library = {f"decoupled/{path.name}" for path in (ROOT / "decoupled").glob("*.py")}
    assert names == library | {f"dni/{name}.py" for name in ("__init__", "contexts", "interfaces", "synthesizers")}


def test_a_notebook_opened_elsewhere_finds_the_results_or_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert plots.results_folder() == ROOT / "results"
    monkeypatch.chdir(ROOT / "aux_nets")
    assert plots.results_folder() == ROOT / "results"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "__file__", str(tmp_path / "site-packages" / "decoupled" / "plots.py"))
    with pytest.raises(InputError, match=f"no folder of results is above {tmp_path}: open the notebook from its place"):
        plots.results_folder()


def test_every_notebook_asks_for_the_results_folder():
    notebooks = [path for path in ROOT.glob("*/*.ipynb") if path.parent.name != "examples"]
    assert len(notebooks) >= 6
    for notebook in notebooks:
        assert "RESULTS = results_folder()" in notebook.read_text()
