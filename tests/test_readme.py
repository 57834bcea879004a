"""README: every command it shows parses, every block of the main page runs, every file it names exists."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import PARALLEL, ROOT, load_script
from torch.nn import functional as F

from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training.flags import start

PAGES = [page for page in (ROOT / "README.md", *ROOT.glob("*/README.md")) if not page.parent.name.startswith(".")]
PAGES += sorted(ROOT.glob("docs/*.md"))
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in page.read_text().splitlines()
        if re.match(r"\s*python [\w/]+\.py", line)
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch):
    _, script, *flags = shlex.split(command.split("  #")[0])
    monkeypatch.setattr(sys, "argv", [script, *flags])
    assert load_script(script).parse_args() is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


# The blocks of the main page


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


SMALL = ("--dataset", "digits", "--train-samples", "16", "--batch-size", "8", "--epochs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with what README's commands name: demo/, as make demo leaves it but of a shorter run."""
    folder = tmp_path_factory.mktemp("readme")
    argv, sys.argv = sys.argv, [str(ROOT / PARALLEL), *SMALL, "--log-dir", str(folder / "demo")]
    try:
        start(load_script(PARALLEL).main)
    finally:
        sys.argv = argv
    return folder


@pytest.fixture
def demo(left, monkeypatch):
    monkeypatch.chdir(left)


def test_python_blocks_run_one_after_the_other(demo, capsys):
    torch.manual_seed(0)
    net = layerwise_cnn(channels=4)
    before = [parameter.clone() for parameter in net.parameters()]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in net]
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    names = {"net": net, "optimizers": optimizers, "images": images, "labels": labels, "F": F}
    algorithm, *others = blocks("python")
    exec(compile(algorithm, "README.md", "exec"), names)
    assert not any(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True) if pair[0].dim() > 1)
    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert "layer1.0" in capsys.readouterr().out
    assert len(names["every_head"]) == 4 and names["first"].shape == (4, 10) and len(others) >= 5


def test_shell_blocks_run(demo, monkeypatch, capsys):
    """Training on a few digits; make without doing what it would; what takes hours only as far as its flags."""
    ran = 0
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            monkeypatch.setattr(sys, "argv", words[2:])
            start(importlib.import_module(words[2]).main)
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] == "python" and words[1].startswith("learning_curves/"):
            validation = ("--validation", "8") if "--validation" in words else ()
            monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:], *SMALL, *validation, "--channels", "4"])
            start(load_script(words[1]).main)
        elif words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            load_script(words[1]).parse_args()
        elif words[0] == "torchrun":
            first = next(place for place, word in enumerate(words) if word.endswith(".py"))
            monkeypatch.setattr(sys, "argv", words[first:])
            load_script(words[first]).parse_args()
        elif words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        else:
            assert words[:2] == ["jupyter", "lab"] and (ROOT / words[2]).is_file(), line
        ran += 1
    said = capsys.readouterr().out
    assert ran >= 12 and said.count("finished: ") >= 5 and "resuming " not in said
    assert len(re.findall(r"4\.png: \d, 0\.\d+, head \d, ", said)) == 1 + 4 + 1
    assert Path("demo/early_exit.csv").is_file()


def test_there_are_commands():
    assert any("learning_curves/cifar_dgl.py" in command for command in COMMANDS)
