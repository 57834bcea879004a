"""Runs scripts as torchrun does, by its agent, in processes that are forked from this one: each import happens once.
Not a test: running.launch starts it.

    python tests/staged_run.py JSON

JSON: a list of runs, which are started one after the other. Each is a dict:

processes   how many
restarts    torchrun's --max-restarts (0)
words       the script and its flags
faults      {rank: [call, fault, attempt]}: what process ``rank`` does in that call of Stage.send, or of
            ReplayStage.end_turn, which end each mini-batch, or (0) before the run's first checkpoint, in that attempt
            of torchrun (0): "SIGKILL" or "SIGSTOP", sent to itself; "SIGTERM" or "SIGINT", sent to torchrun; "error",
            an InputError; "slow", from there on each call takes 50 ms longer
held        a path: process ``rank`` writes to held.rank what it held in memory, see watch

After each run a line "outcome: …" on stderr: "finished", the exit codes of the processes that failed, or, after a
signal to torchrun, [128 + its number].
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
from running import ROOT, load_script
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from decoupled import InputError
from decoupled.data.batches import Batches
from decoupled.parallel.balance import TensorFormat
from decoupled.parallel.stages import Stage
from decoupled.training import run as runs  # noqa: F401
from decoupled.training.flags import start
from decoupled.training.state import State

STOPPED_SECONDS = 6  # until a stopped process is killed: torchrun would wait for it for 30


def kill_later(pid):
    """Kills process ``pid`` after STOPPED_SECONDS, from another process."""
    if os.fork() == 0:
        time.sleep(STOPPED_SECONDS)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)


def fail(fault):
    """Does what the ``fault`` says in this process."""
    if fault == "error":
        raise InputError("this cannot be used: use something else")
    if fault == "SIGSTOP":
        kill_later(os.getpid())
    if fault in ("SIGTERM", "SIGINT"):
        signal_torchrun(getattr(signal, fault))
    else:
        os.kill(os.getpid(), getattr(signal, fault))


def signal_torchrun(number):
    """Sends a signal to torchrun, and waits until torchrun has passed it on to this process: under load, for long."""
    received = []

    def noting(handler):
        def note(number, frame):
            received.append(number)
            handler(number, frame)

        return note

    for passed_on in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed_on, noting(signal.getsignal(passed_on)))
    os.kill(os.getppid(), number)
    end = time.monotonic() + 60
    while not received and time.monotonic() < end:
        time.sleep(0.01)


def failing(send, fault_call, fault, attempt=0):
    """The method ``send`` with a ``fault`` in its call number ``fault_call`` of an ``attempt``."""
    calls = 0

    def send_or_fail(self, *mini_batch):
        nonlocal calls
        calls += 1
        if fault == "slow" and calls >= fault_call:
            time.sleep(0.05)
        elif calls == fault_call and os.environ["TORCHELASTIC_RESTART_COUNT"] == str(attempt):
            fail(fault)
        return send(self, *mini_batch)

    return send_or_fail


def watch():
    """Counts from now on, in a dict: the most tensors of TensorFormat.empty (representations that arrive) and of
    TensorFormat.pack (that leave) alive at once, and the images in Batches.
    """
    most = collections.Counter(empty=0, pack=0, images=0)
    alive = collections.Counter()

    def counted(name):
        real = getattr(TensorFormat, name)

        def make(self, *args):
            tensor = real(self, *args)
            if tensor.dim() > 1:  # labels have one dimension
                alive[name] += 1
                most[name] = max(most[name], alive[name])
                weakref.finalize(tensor, alive.subtract, {name: 1})
            return tensor

        return make

    TensorFormat.empty = counted("empty")
    TensorFormat.pack = counted("pack")
    real_init = Batches.__init__

    def init(self, images, *args, **options):
        most["images"] += len(images)
        real_init(self, images, *args, **options)

    Batches.__init__ = init
    return most


def worker(words, faults, held):
    torch.set_num_threads(1)
    most = watch() if held else None
    rank = os.environ["RANK"]
    script, *flags = words
    sys.argv = [str(ROOT / script), *flags]
    module = load_script(script)
    if rank in faults and faults[rank][0] == 0:
        _, *fault = faults[rank]
        State.gather = failing(State.gather, 1, *fault)
    elif rank in faults and hasattr(module, "ReplayStage"):
        module.ReplayStage.end_turn = failing(module.ReplayStage.end_turn, *faults[rank])
    elif rank in faults:
        Stage.send = failing(Stage.send, *faults[rank])
    start(module.main)
    if held:
        Path(f"{held}.{rank}").write_text(json.dumps(most))


def launch(run):
    """Runs one dict of JSON; returns its outcome."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=run["processes"],
        max_restarts=run.get("restarts", 0),
        monitor_interval=0.05,
        start_method="fork",
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    try:
        elastic_launch(config, worker)(run["words"], run.get("faults", {}), run.get("held"))
    except ChildFailedError as error:
        return sorted({failure.exitcode for failure in error.failures.values()})
    except SignalException as error:
        return [128 + error.sigval]
    return "finished"


def main():
    digits = sklearn.datasets.load_digits()
    sklearn.datasets.load_digits = lambda: digits
    for run in json.loads(sys.argv[1]):
        print(f"outcome: {launch(run)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
