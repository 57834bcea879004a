"""Kills runs of every script at random moments, resumes them, and compares what they leave with a run that was never
stopped. Not a test of the suite: it takes as long as it is given.

    python tests/torture.py [--minutes 10] [--seed 0] [--keep]

A round is one script in a new folder: SIGKILL, SIGTERM or SIGINT after a random part of its time, then --resume auto,
and so on until it is finished. Then its result lines and every tensor of its checkpoint must be those of the whole run,
to the bit. Prints one line per round, and at the end how many kills and signals were survived; the exit code is 1 if a
round was not.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from PIL import Image
from running import ROOT, tensors

DIGITS = "--dataset digits --train-samples 80 --batch-size 16 --test-batch-size 120 --device cpu --save-every 0.01"
IMAGES = "--image-size 32 -b 8 --device cpu --epochdecay 1 --lr 0.01 --save-every 0.01"
RUNS = [  # script and flags: some seconds each
    ("learning_curves/cifar_dgl.py", f"{DIGITS} --epochs 2 --channels 16"),
    ("learning_curves/cifar_sequential_greedy.py", f"{DIGITS} --epochs 1 --half --channels 16"),
    ("aux_nets/cifar_dgl.py", f"{DIGITS} --epochs 4 --channels 8 --lr-step 1"),
    ("dni/cifar_cnn_dni.py", f"{DIGITS} --epochs 4 --channels 8 --dni --context"),
    ("dni/cifar_dgl.py", f"{DIGITS} --epochs 4 --channels 8"),
    ("ddg_comparison/cifar_dgl.py", f"{DIGITS} --epochs 3 --depth 14 --milestones 2"),
    ("ddg_comparison/cifar_ddg.py", f"{DIGITS} --epochs 3 --depth 14 --splits 3 --milestones 2"),
    ("ddg_comparison/cifar_backprop.py", f"{DIGITS} --epochs 3 --depth 14 --checkpointing"),
    ("async_buffer/cifar_buffer.py", f"{DIGITS} --epochs 3 --feature_size 8 --ncnn 4 --down [0] --buffer 3 --noise .3"),
    ("imagenet/imagenet_dgl.py", f"IMAGES {IMAGES} --epochs 2 --arch vgg11 --block_size 4 -j 1"),
    ("imagenet/imagenet.py", f"IMAGES {IMAGES} --epochs 2 --arch resnet18 -j 0"),
]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RESULT = re.compile(r"(# )?(n|lr): |# (head|layer) ")
LIMIT = 600  # seconds: no run here takes so long, however busy the machine


def write_images(root):
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")


def start(script, words, folder, *more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *words, "--log-dir", str(folder), *more]
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)


def end(process, number):
    """Sends the signal; a process that is killed leaves no children that read images."""
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.wait(LIMIT)


class Left(NamedTuple):
    """What a finished run has left: its result lines, and the tensors of its checkpoint."""

    lines: list
    tensors: list


def left(folder):
    """What the one run in ``folder`` has left."""
    (log,) = folder.glob("*.log")
    lines = [line for line in log.read_text().splitlines() if RESULT.match(line)]
    return Left(lines, tensors(torch.load(log.with_suffix(".pt"), weights_only=True)["state"]))


def complaint(folder, whole):
    """What is wrong with a finished run in ``folder``, compared with the ``whole`` one; None if nothing is."""
    names = [path.name for path in folder.iterdir()]
    if sorted(Path(name).suffix for name in names) != ["", ".log", ".pt"]:  # the first one is "output"
        return f"files left behind: {sorted(names)}"
    output = (folder / "output").read_text(errors="replace").splitlines()
    if output.count("Traceback (most recent call last):") > output.count("KeyboardInterrupt"):  # SIGINT while importing
        return "a traceback"
    found = left(folder)
    if found.lines != whole.lines:
        return "other result lines"
    if len(found.tensors) != len(whole.tensors):
        return "another number of tensors in the checkpoint"
    if not all(torch.equal(a, b) for a, b in zip(found.tensors, whole.tensors, strict=True)):
        return "other tensors in the checkpoint"
    return None


def is_expected(code, number):
    """Whether a process that was sent signal ``number`` may end with that exit code."""
    if number == signal.SIGKILL:
        return code in (0, -number)
    return code in (0, -number, 128 + number)  # -number: before Python could hear of it


def torture(script, words, folder, whole, seconds, generator):
    """Runs the script in ``folder``, which takes so many ``seconds``, with interruptions: (how often which signal was
    sent, what is wrong).
    """
    sent = Counter()
    for _ in range(generator.randint(1, 6)):
        process = start(script, words, folder, "--resume", "auto")
        number = generator.choice(SIGNALS)
        try:
            code = process.wait(generator.uniform(0, 1.2) * seconds)
        except subprocess.TimeoutExpired:
            code = end(process, number)
            name = signal.Signals(number).name
            sent[name] += 1
            if not is_expected(code, number):
                return sent, f"exit code {code} after {name}"
        else:
            if code == 0:
                break
            return sent, f"exit code {code} without a signal"
    code = start(script, words, folder, "--resume", "auto").wait(LIMIT)  # to its end, or it is finished already
    if code:
        return sent, f"exit code {code} at last"
    return sent, complaint(folder, whole)


class Torture:
    """The rounds, in the temporary folder ``root``."""

    def __init__(self, root, seed, keep):
        self.root = root
        self.keep = keep
        self.generator = random.Random(seed)
        self.whole = {}  # script → (what it leaves if nothing stops it, its seconds)
        self.sent = Counter()
        self.rounds = 0
        self.failed = 0

    def run_whole(self, script, words):
        folder = self.root / f"whole{len(self.whole)}"
        folder.mkdir()
        begun = time.monotonic()
        code = start(script, words, folder).wait(LIMIT)
        if code:
            sys.exit(f"{script} ended with exit code {code}: {(folder / 'output').read_text()}")
        self.whole[script] = left(folder), time.monotonic() - begun

    def round(self, script, flags):
        words = [str(self.root / "images") if word == "IMAGES" else word for word in flags.split()]
        if script not in self.whole:
            self.run_whole(script, words)
        whole, seconds = self.whole[script]
        folder = self.root / f"round{self.rounds}"
        folder.mkdir()
        sent, wrong = torture(script, words, folder, whole, seconds, self.generator)
        self.rounds += 1
        self.sent += sent
        if wrong:
            self.failed += 1
        print(f"round {self.rounds}, {script}: {summary(sent)}: {wrong or 'to the bit'}", flush=True)
        if not (wrong and self.keep):
            shutil.rmtree(folder)


def summary(sent):
    return ", ".join(f"{count} {name}" for name, count in sorted(sent.items())) or "no signal"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds that were not survived")
    args = parser.parse_args()
    finish = time.monotonic() + 60 * args.minutes
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    write_images(root / "images")
    rounds = Torture(root, args.seed, args.keep)
    try:
        while time.monotonic() < finish:
            for script, flags in rounds.generator.sample(RUNS, len(RUNS)):
                if time.monotonic() < finish:
                    rounds.round(script, flags)
    finally:
        if not (args.keep and rounds.failed):
            shutil.rmtree(root, ignore_errors=True)
    survived = rounds.rounds - rounds.failed
    print(f"{survived} of {rounds.rounds} rounds with {summary(rounds.sent)} survived to the bit (seed {args.seed})")
    sys.exit(1 if rounds.failed else 0)


if __name__ == "__main__":
    main()
