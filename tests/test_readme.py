"""README: every command it shows parses, every block of the main page runs, every file it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import PARALLEL, ROOT, load_script
from torch.nn import functional as F

from decoupled.__main__ import main as command_line
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


# Code blocks


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


SMALL = ("--dataset", "digits", "--train-samples", "16", "--batch-size", "8", "--epochs", "1", "--device", "cpu")
SMALL += ("--channels", "4")


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with demo/, as `make demo` leaves it, but of a shorter run."""
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


def test_readmes_python_blocks_run(capsys):
    torch.manual_seed(0)
    net = layerwise_cnn(channels=4)
    before = [parameter.clone() for parameter in net.parameters()]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in net]
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    names = {"net": net, "optimizers": optimizers, "images": images, "labels": labels, "F": F}
    step, decoupled_model, *_ = blocks("README.md", "python")
    exec(compile(step, "README.md", "exec"), names)
    assert not any(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True) if pair[0].dim() > 1)
    exec(compile(decoupled_model, "README.md", "exec"), names)
    assert "layer1.0" in capsys.readouterr().out and len(names["net"]) == 4
    exec(compile(step, "README.md", "exec"), names)
    model = names["model"].eval()
    assert torch.equal(model(names["images"]), names["net"].eval()(names["images"])[-1])


def test_the_loop_is_that_of_the_script():
    """README's loop, but for autocast, the meter and Run's step, is that of learning_curves/cifar_dgl.py."""
    script = (ROOT / PARALLEL).read_text()
    for line in blocks("README.md", "python")[0].splitlines():
        code = line.split("#")[0].strip()
        if code.startswith(("representation, logits =", "representation = representation", "loss = ")):
            assert code.replace("logits, labels", "logits.float(), labels") in script, code


def test_early_exits_python_block_runs(demo):
    names = {}
    for block in blocks("docs/early_exit.md", "python"):
        exec(compile(block, "docs/early_exit.md", "exec"), names)
    assert len(names["every_head"]) == 4 and names["first"].shape == (4, 10)


@pytest.mark.parametrize("page", ["README.md", "docs/early_exit.md", "docs/several_devices.md"])
def test_shell_blocks_run(demo, monkeypatch, capsys, page):
    """Training on a few digits; make and torchrun without doing what they would."""
    lines = "".join(block for block in blocks(page, "sh") if not block.startswith("#!")).splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "decoupled"]:
            monkeypatch.setattr(sys, "argv", ["decoupled", *words[3:]])
            command_line()
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] == "python" and words[1].startswith("learning_curves/"):
            monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:], *SMALL])
            start(load_script(words[1]).main)
            assert "finished: " in capsys.readouterr().out
        elif words[0] == "torchrun":
            first = next(place for place, word in enumerate(words) if word.endswith(".py"))
            monkeypatch.setattr(sys, "argv", words[first:])
            load_script(words[first]).parse_args()
        else:
            assert words[0] == "make", line
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    said = capsys.readouterr().out
    if page == "docs/early_exit.md":
        assert len(re.findall(r"4\.png: \d, 0\.\d+, head \d, ", said)) == 1 + 4 + 1
        assert Path("demo/early_exit.csv").is_file()


def test_there_are_commands():
    assert any("learning_curves/cifar_dgl.py" in command for command in COMMANDS)


def test_readme_is_two_screens():
    """200 lines of at most 120 columns, tables and links aside."""
    lines = (ROOT / "README.md").read_text().splitlines()
    text = [line for line in lines if not line.startswith("|")]
    assert len(text) <= 200
    assert [line for line in text if len(line) > 120 and "](" not in line] == []
