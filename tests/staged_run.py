"""Runs scripts as torchrun does, by its agent, in processes that are forked from this one: each import happens once.
Not a test: running.launch starts it.

    python tests/staged_run.py JSON

JSON: a list of runs, one after the other, each a dict: "processes", "restarts" (torchrun's --max-restarts), "words"
(the script and its flags), "faults": {rank: [call, what, attempt]}, in that process's call number ``call`` of
Stage.send, which each mini-batch ends with: a signal's name, sent to the process by itself in that attempt of torchrun,
by default its first; "error", an InputError; "slow", from there on each takes 50 ms longer. "held": a path; process r
leaves at path.r what it held (see watch).
"""

import collections
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import sklearn.datasets
import torch
import torch._dynamo  # optimizers import it, which takes a second
from running import ROOT, load_script, small
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from decoupled import InputError
from decoupled.data import batches as images
from decoupled.parallel import balance as partition
from decoupled.parallel import processes, stages
from decoupled.training import run as runs  # noqa: F401
from decoupled.training.flags import start

PATIENCE = 10  # seconds after which a process that was stopped is killed, so that nobody waits for it


def fault(kind, call, what, attempt=0):
    """The send of a ``kind`` of Stage that fails in its call number ``call`` of an ``attempt``."""
    real, calls = kind.send, collections.Counter()

    def send(self, *mini_batch):
        calls["send"] += 1
        if what == "slow" and calls["send"] >= call:
            time.sleep(0.05)
        elif calls["send"] == call and what == "error":
            raise InputError("this cannot be used: use something else")
        elif calls["send"] == call and os.environ["TORCHELASTIC_RESTART_COUNT"] == str(attempt):
            if what == "SIGSTOP" and os.fork() == 0:
                stopped = os.getppid()
                time.sleep(PATIENCE)
                os.kill(stopped, signal.SIGKILL)
                os._exit(0)
            os.kill(os.getpid(), getattr(signal, what))
        real(self, *mini_batch)

    return send


def watch():
    """The most tensors of Layout.room (representations that arrive) and of Layout.pack (that leave) alive at once, and
    how many images there are in Batches: a dict that counts from now on.
    """
    most, alive = collections.Counter(room=0, pack=0, images=0), collections.Counter()

    def counted(name, real):
        def make(self, *args):
            tensor = real(self, *args)
            alive[name] += 1
            most[name] = max(most[name], alive[name])
            weakref.finalize(tensor, alive.subtract, {name: 1})
            return tensor

        return make

    for name in ("room", "pack"):
        setattr(partition.Layout, name, counted(name, getattr(partition.Layout, name)))
    real = images.Batches.__init__

    def load(self, pixels, *rest, **options):
        most["images"] += len(pixels)
        real(self, pixels, *rest, **options)

    images.Batches.__init__ = load
    return most


def worker(words, faults, held):
    torch.set_num_threads(1)
    most = watch() if held else None
    rank = os.environ["RANK"]
    script, *flags = words
    sys.argv = [str(ROOT / script), *flags]
    module = load_script(script)
    kind = getattr(module, "ReplayStage", stages.Stage)
    if rank in faults:
        kind.send = fault(kind, *faults[rank])
    if hasattr(module, "layerwise_cnn") and not Path(script).is_absolute():
        module.layerwise_cnn = small()
    start(module.main)
    if held:
        Path(f"{held}.{rank}").write_text(json.dumps(most))


def main():
    digits = sklearn.datasets.load_digits()
    sklearn.datasets.load_digits = lambda: digits
    processes.GRACE = 2.0
    for run in json.loads(sys.argv[1]):
        how = {"max_restarts": run.get("restarts", 0), "monitor_interval": 0.05, "start_method": "fork"}
        where = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
        config = LaunchConfig(1, 1, run["processes"], **how, **where)
        try:
            elastic_launch(config, worker)(run["words"], run.get("faults", {}), run.get("held"))
            outcome = "finished"
        except ChildFailedError as error:
            outcome = sorted({failure.exitcode for failure in error.failures.values()})
        print(f"outcome: {outcome}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
