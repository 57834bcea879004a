"""The package's structure: which wing may import which, and what a wheel of it holds."""

import ast
import shutil
import subprocess
import sys
import zipfile

import pytest
from running import ROOT

PACKAGE = ROOT / "decoupled"
# Each wing may import those below it. networks and data are side by side: neither knows the other.
LEVELS = {"errors": 0, "logs": 1, "networks": 2, "data": 2, "parallel": 3, "training": 4, "analysis": 5}
FACE = ("decoupled", "decoupled.__main__")  # what users import and start: nothing inside the package imports them


def dotted_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {dotted_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(name):
    """The modules of the package that the module called ``name`` imports, wherever in its text."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return {module for module in found if module.split(".")[0] == "decoupled"} - {name}


IMPORTS = {name: imported_modules(name) for name in MODULES}


def wing(name):
    return name.split(".")[1]


def test_imports_run_down():
    for name, imports in IMPORTS.items():
        if name in FACE:
            continue
        for imported in imports:
            assert imported not in FACE, f"{name} imports the face {imported}: import from the wing"
            assert imported in MODULES, f"{name} imports {imported}, which does not exist"
            same_wing = wing(imported) == wing(name)
            assert same_wing or LEVELS[wing(imported)] < LEVELS[wing(name)], f"{name} imports {imported}"


def test_no_circles():
    finished = set()

    def visit(name, path):
        assert name not in path, f"a circle of imports: {' → '.join([*path, name])}"
        if name not in finished:
            for imported in IMPORTS[name]:
                visit(imported, [*path, name])
            finished.add(name)

    for name in IMPORTS:
        visit(name, [])


def test_the_resolver_sees_every_kind_of_import(monkeypatch, tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import decoupled.logs\n"
        "from decoupled import errors\n"
        "from decoupled.networks import flops\n"
        "from . import plots\n"
        "from .costs import costs\n"
        "from ..training.run import Run\n"
        "def late():\n    from decoupled.parallel.mesh import Mesh\n"
    )
    monkeypatch.setitem(MODULES, "decoupled.analysis.module", source)
    assert imported_modules("decoupled.analysis.module") == {
        "decoupled.logs",
        "decoupled.errors",
        "decoupled.networks.flops",
        "decoupled.analysis.plots",
        "decoupled.analysis.costs",
        "decoupled.training.run",
        "decoupled.parallel.mesh",
    }


def test_experiments_do_not_import_one_another_nor_results_or_benchmarks():
    experiments = ("learning_curves", "aux_nets", "dni", "ddg_comparison", "imagenet", "async_buffer")
    for experiment in experiments:
        own = {path.stem for path in (ROOT / experiment).glob("*.py")}
        foreign = {
            path.stem
            for folder in (*experiments, "results", "benchmarks")
            if folder != experiment
            for path in (ROOT / folder).glob("*.py")
        } - own
        for path in (ROOT / experiment).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not foreign & {name.split(".")[0] for name in names}, path


# The wheel

TEN_LINES = """
import torch
from torch import nn
from torch.nn import functional as F
import dni
from decoupled import decouple, load, InputError

model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
inputs, labels = torch.randn(16, 8), torch.randint(3, (16,))
net = decouple(model, inputs, splits=2)
optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in net]
for step in range(2):
    representation = inputs
    for module, optimizer in zip(net, optimizers):
        representation, logits = module(representation)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        representation = representation.detach()
assert dni.BackwardInterface
try:
    load("run.pt")
except InputError as error:
    assert "build=" in str(error), error
else:
    raise AssertionError("there is no script here that could build the network")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("decoupled", "dni"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_every_wing(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in MODULES.values()} <= names
    assert {f"dni/{name}.py" for name in ("__init__", "contexts", "interfaces", "synthesizers")} <= names


def test_the_wheel_alone_trains_a_network(wheel, run_script, tmp_path):
    """In a folder with nothing else of the repository; other packages are this environment's."""
    words = ("--dataset", "digits", "--train-samples", "16", "--batch-size", "8", "--epochs", "1", "--device", "cpu")
    left = run_script("learning_curves/cifar_dgl.py", *words)
    alone = tmp_path / "alone"
    zipfile.ZipFile(wheel).extractall(alone)
    shutil.copy(left.checkpoint, alone / "run.pt")
    (alone / "program.py").write_text(TEN_LINES)
    subprocess.run([sys.executable, "program.py"], cwd=alone, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
