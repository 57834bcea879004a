"""README: every command it shows parses, every file it names exists."""

import re
import shlex
import sys

import pytest
from running import ROOT, load_script

PAGES = [page for page in (ROOT / "README.md", *ROOT.glob("*/README.md")) if not page.parent.name.startswith(".")]
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


def test_your_own_network_runs(capsys):
    section = re.search(r"\n## Your own network\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert "layer1.0" in capsys.readouterr().out
    assert len(names["every_head"]) == len(names["net"]) == 4


def test_there_are_commands():
    assert any("learning_curves/cifar_dgl.py" in command for command in COMMANDS)
