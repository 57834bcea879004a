"""What the tests of scripts share: loading a script, what a run leaves, and comparing two runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PARALLEL = "learning_curves/cifar_dgl.py"
SEQUENTIAL = "learning_curves/cifar_sequential_greedy.py"


def load_script(path):
    """The script at ``path`` (from the repository's root) as a module, its own folder importable as when it is run."""
    folder = str((ROOT / path).parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Finished:
    """What a run left in its log folder."""

    def __init__(self, folder):
        self.folder = folder
        self.log = max(folder.glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
        self.checkpoint = self.log.with_suffix(".pt")

    @property
    def lines(self):
        """The log's result lines."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(("n: ", "# head "))]

    @property
    def state(self):
        return torch.load(self.checkpoint, weights_only=True)["state"]

    @property
    def weights(self):
        return self.state["net"][0]


def tensors(tree):
    """All tensors in nested dicts, lists and tuples, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        branches = tree.values()
    elif isinstance(tree, (list, tuple)):
        branches = tree
    else:
        branches = ()
    found = []
    for branch in branches:
        found += tensors(branch)
    return found


def assert_same_run(left, whole):
    """The same result lines, and the same tensors in the checkpoint, to the bit."""
    assert left.lines == whole.lines
    assert len(left.lines) >= 2
    mine = tensors(left.state)
    expected = tensors(whole.state)
    assert len(mine) == len(expected) > 5
    assert all(torch.equal(one, other) for one, other in zip(mine, expected, strict=True))


def published_series(log):
    """{(n, epoch), …} of the lines of ``log`` that the authors' notebooks draw: they search each for this pattern."""
    pattern = re.compile(r"n\: (\d{1,2}), epoch (\d{1,4}), loss: (.*), train top1:(.*) test top1:(.*)")
    series = set()
    for line in log.read_text().splitlines():
        match = pattern.search(line)
        if match:
            assert len([float(number) for number in match.groups()]) == 5
            series.add((int(match[1]), int(match[2])))
    return series


def launch(*runs):
    """(outcome, stderr) of each of the runs under torchrun's agent: see staged_run.py."""
    command = [sys.executable, str(ROOT / "tests/staged_run.py"), json.dumps(runs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    *words, _ = re.split(r"^outcome: (.*)\n", done.stderr, flags=re.MULTILINE)
    assert len(words) == 2 * len(runs), done.stderr
    return [*zip(words[1::2], words[::2], strict=True)]
