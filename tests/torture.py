"""Kills runs of every script at random moments, resumes them, and compares what they leave with a run that was never
stopped. Not a test of the suite: it takes as long as it is given.

    python tests/torture.py [--minutes 10] [--seed 0] [--keep]

A round is one script in a new folder: SIGKILL, SIGTERM or SIGINT after a random part of its time, --resume auto, and so
on until it is finished. Then its lines of results and every tensor of its checkpoint must be those of the whole run, to
the bit. It prints a line a round, and at the end how many kills and signals were survived; exit code 1 when a round was
not.
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

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from PIL import Image
from running import ROOT

DIGITS = "--dataset digits --train-samples 80 --batch-size 16 --test-batch-size 120 --device cpu --save-every 0.01"
IMAGES = "--image-size 32 -b 8 --device cpu --epochdecay 1 --lr 0.01 --save-every 0.01"
RUNS = [  # script and flags: some seconds each
    ("learning_curves/cifar_dgl.py", f"{DIGITS} --epochs 2"),
    ("learning_curves/cifar_sequential_greedy.py", f"{DIGITS} --epochs 1 --half"),
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


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in branches for leaf in tensors(branch)]


def left(folder):
    """(lines of results, tensors of the checkpoint) of the one run in ``folder``."""
    (log,) = folder.glob("*.log")
    lines = [line for line in log.read_text().splitlines() if re.match(r"(# )?(n|lr): |# (head|layer) ", line)]
    return lines, tensors(torch.load(log.with_suffix(".pt"), weights_only=True)["state"])


def complaint(folder, whole):
    """What of a finished run is not as it must be; None when all is."""
    strangers = [path.name for path in folder.iterdir() if path.suffix not in (".log", ".pt") and path.name != "output"]
    if strangers or len([*folder.iterdir()]) != 3:
        return f"files left behind: {sorted(path.name for path in folder.iterdir())}"
    if "Traceback" in (folder / "output").read_text(errors="replace"):
        return "a traceback"
    (lines, mine), (expected, its) = left(folder), whole
    if lines != expected:
        return "other lines of results"
    if len(mine) != len(its) or not all(torch.equal(a, b) for a, b in zip(mine, its, strict=True)):
        return "other tensors in the checkpoint"
    return None


def torture(script, words, folder, whole, seconds, generator):
    """(kills and signals by name, complaint) of one round."""
    done = Counter()
    for _ in range(generator.randint(1, 6)):
        process, number = start(script, words, folder, "--resume", "auto"), generator.choice(SIGNALS)
        try:
            code = process.wait(generator.uniform(0, 1.2) * seconds)
        except subprocess.TimeoutExpired:
            code = end(process, number)
            done[signal.Signals(number).name] += 1
            early = number != signal.SIGKILL and code == -number  # before Python could hear of it
            if code not in (0, -number, 128 + number) or (code == -number and not early and number != signal.SIGKILL):
                return done, f"exit code {code} after {signal.Signals(number).name}"
        else:
            if code == 0:
                break
            return done, f"exit code {code} without a signal"
    code = start(script, words, folder, "--resume", "auto").wait(LIMIT)  # to the end, or of what is finished already
    return done, f"exit code {code} at last" if code else complaint(folder, whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds that were not survived")
    args = parser.parse_args()
    finish, generator = time.monotonic() + 60 * args.minutes, random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    write_images(root / "images")
    whole, total, failed, rounds = {}, Counter(), 0, 0
    try:
        while time.monotonic() < finish:
            if rounds % len(RUNS) == 0:
                order = generator.sample(RUNS, len(RUNS))
            script, flags = order[rounds % len(RUNS)]
            words = [str(root / "images") if word == "IMAGES" else word for word in flags.split()]
            if script not in whole:
                (folder := root / f"whole{len(whole)}").mkdir()
                before = time.monotonic()
                if code := start(script, words, folder).wait(LIMIT):
                    sys.exit(f"{script} ended with exit code {code}: {(folder / 'output').read_text()}")
                whole[script] = left(folder), time.monotonic() - before
            expected, seconds = whole[script]
            (folder := root / f"round{rounds}").mkdir()
            done, wrong = torture(script, words, folder, expected, seconds, generator)
            rounds, failed, total = rounds + 1, failed + (wrong is not None), total + done
            told = ", ".join(f"{count} {name}" for name, count in done.items()) or "no signal"
            print(f"round {rounds}, {script}: {told}: {wrong or 'to the bit'}", flush=True)
            if wrong is None or not args.keep:
                shutil.rmtree(folder)
    finally:
        if not (args.keep and failed):
            shutil.rmtree(root, ignore_errors=True)
    told = ", ".join(f"{count} {name}" for name, count in sorted(total.items())) or "no signals"
    print(f"{rounds - failed} of {rounds} rounds with {told} survived to the bit (seed {args.seed})")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
