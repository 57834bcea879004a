"""One run of one experiment, in one process or in several, that stops and resumes after any mini-batch: seed, device,
precision, log, checkpoint. The algorithm stays in the script.

run = Run(parser(__doc__, epochs=50, batch_size=128).parse_args())
for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters):
    for images, labels in run.progress(train): ...
"""

import sys
import time
from pathlib import Path

import torch

from decoupled import InputError, datasets, logs, provenance
from decoupled.checkpoints import Checkpoint, check
from decoupled.flags import pick_device
from decoupled.images import mix_seed
from decoupled.mesh import Mesh
from decoupled.processes import Processes, launched
from decoupled.signals import Signals
from decoupled.stages import Stage
from decoupled.state import State
from decoupled.steps import Steps, choose_kernels
from decoupled.terminal import Terminal

WATCH_EVERY = 100  # batches between looks at the losses: each look waits for the device
# Flags that may differ on resume; images are compared.
ELSEWHERE = ("resume", "save_every", "log_dir", "data_dir")
ELSEWHERE += ("modules_per_stage", "stages", "queue", "timeout", "backend")
PLACE = ("stage", "epoch", "within", "batch", "seconds")  # of a Run, where it is
SAVE = 1  # what is to be done after a mini-batch: go on (0), save, or the number of a signal (from 2)


class Run:
    """A run of the script that is being executed, with its parsed ``args``. Nothing is written before ``epochs``.

    several     whether the script can share its work among the processes of torchrun
    stages      into how many the modules are shared out; None: as many as there are processes
    loss_scale  of fp16: constant; None: as large as gradients allow
    elsewhere   further flags that may differ on resume

    Raises InputError for a device that is not there, a folder that cannot be written to, processes that will not do.
    """

    def __init__(self, args, *, several=False, stages=None, loss_scale=None, elsewhere=()):
        self.args, self.elsewhere = args, (*ELSEWHERE, *elsewhere)
        self.script = "/".join(Path(sys.argv[0]).resolve().parts[-2:])
        self.checkpoint = Checkpoint(args.log_dir, self.script.removesuffix(".py").replace("/", "-"), args.name)
        if not several and (size := launched()[1]) > 1:
            raise InputError(f"{self.script} runs on one process, not on {size}: start it without torchrun")
        how = {name: getattr(args, name) for name in ("backend", "timeout") if hasattr(args, name)}
        self.processes = Processes(pick_device(args.device), **how)
        self.mesh = Mesh(self.processes, stages or self.processes.size)
        self.terminal = Terminal(quiet=self.processes.rank > 0)
        self.line = None  # this process's Stage where modules are shared out
        self.device = self.processes.device
        self.stages, self.header = None, []
        self.stage, self.epoch, self.batch, self.within, self.seconds = 1, 0, 0, False, 0.0
        self.steps = Steps(self.device, args.half, loss_scale)
        self.saves = not getattr(args, "debug", 0)  # checkpoints: not with --debug 1
        self.signals = Signals(quiet=self.processes.rank > 0)
        self.weight = None  # of this process's loss in the mean over replicas, whose shares of a mini-batch may differ
        choose_kernels(self.device, getattr(args, "deterministic", False))
        torch.manual_seed(args.seed)

    def data(self, **options):
        """(train, test, number of classes) of the flags' data set, on the run's device: see decoupled.datasets.load."""
        names = ("dataset", "data_dir", "batch_size", "test_batch_size", "train_samples", "validation", "seed")
        options |= {name: getattr(self.args, name) for name in names} | {"device": self.device}
        with self.terminal.reading():
            return self.mesh.images(lambda: datasets.load(**options))

    def prepare(self, net, graphs=True):
        """``net`` on the run's device in channels-last memory, its modules compiled with --compile: see Steps."""
        return self.steps.prepare(net, self.args.compile, graphs)

    def share(self, net, shape=(3, 32, 32), kind=Stage):
        """This process's modules of ``net``, prepared: a decoupled.stages.Stage, or another ``kind`` of it. ``shape``:
        of an image.
        """
        how = {"lengths": getattr(self.args, "modules_per_stage", None), "queue": getattr(self.args, "queue", 1)}
        stage = kind(self.steps.prepare(net, False), shape, self.mesh, autocast=self.autocast, wish=self.wish, **how)
        self.prepare(stage.modules)
        self.line, self.steps.first = stage if self.mesh.stages > 1 else None, stage.first
        return stage

    def autocast(self):
        """The context for forward passes: mixed precision with --half, no effect otherwise."""
        return self.steps.autocast()

    def scaler(self, optimizer):
        """The loss scale of the module that ``optimizer`` teaches; a no-op except in fp16."""
        return self.steps.learner(optimizer)[1]

    def step(self, loss, optimizer):
        """zero_grad, backward, step of one module, in fp16 by its own loss scale; of the mean loss of all processes."""
        self.steps.step(loss, optimizer, self.batch, self.weight)

    def watch(self, loss, n):
        """Notes the loss of module ``n`` for the check that stops a run whose loss is no longer finite."""
        self.steps.watch(loss, n, self.batch)

    def latest_losses(self):
        """The losses noted in this mini-batch: a list of numbers, read from the device at once."""
        return self.steps.latest(self.batch)

    def check_losses(self):
        """Raises InputError for a loss, of those noted since the last check, that is not finite."""
        self.steps.check(self.epoch, self.checkpoint.path(".pt"))

    # Epochs

    def epochs(self, stages=None, **state):
        """Yields the epochs left to do, from 1; with ``stages``, (stage, epoch) for each stage from 1 to ``stages`` in
        turn, all epochs each.

        ``state`` is all that must survive: objects with state_dict, or lists of them, under names of your choice
        (optimizers under "optimizers", in the modules' order; what is counted on several processes, under "meters").
        An epoch begins by ``begin`` of those that have one, images and meters. State is saved before the first epoch,
        after each, and within, where the run stops or --save-every minutes have passed; --resume restores it.
        """
        self.stages = stages
        self.state = State(state, self.scaler, self.mesh, self.line)
        self.saved_at = time.perf_counter()
        with self.signals:
            try:
                self.resume() if self.args.resume or self.processes.remembered else self.begin()
                while self.within or not self.finished():
                    if not self.within:
                        self.begin_epoch()
                    self.started = time.perf_counter() - self.seconds
                    self.terminal.begin_epoch(self.epoch, self.args.epochs, self.stage, self.stages)
                    yield (self.stage, self.epoch) if stages else self.epoch
                    self.end_epoch()
                    self.pause()
                self.terminal.write(f"finished: {self.checkpoint.path('.log')}")
            finally:
                self.state.each("close")
                self.checkpoint.close()
        self.processes.close()

    def finished(self):
        return (self.stage, self.epoch) == (self.stages or 1, self.args.epochs)

    def begin_epoch(self):
        if self.epoch == self.args.epochs:
            self.stage, self.epoch = self.stage + 1, 0
        self.epoch, self.batch, self.seconds, self.within = self.epoch + 1, 0, 0.0, True
        self.state.each("begin")

    def end_epoch(self):
        self.check_losses()
        self.within = False
        seconds = time.perf_counter() - self.started
        self.write(f"# {self.where()} took {seconds:.2f} s\n")
        self.terminal.end_epoch(seconds)
        self.save()

    def where(self):
        epoch = f"module {self.stage}, epoch {self.epoch}" if self.stages else f"epoch {self.epoch}"
        return f"{epoch}, batch {self.batch}" if self.within else epoch

    def progress(self, batches):
        """Iterates over what is left of an epoch of ``batches``, and shows that on a terminal. After each it may stop
        or save. What a step draws from PyTorch's generator, as dropout does, depends on seed and place alone.
        """
        left = batches.rest() if hasattr(batches, "rest") else batches
        stage = (self.stage,) if self.stages else ()
        for batch in self.terminal.training(left, batches, self.batch, self.args.batch_size):
            self.batch += 1
            self.weight = batches.weight if self.mesh.replicas > 1 else None
            torch.manual_seed(mix_seed(self.args.seed, *stage, self.epoch, self.batch, self.mesh.replica))
            yield batch
            if self.batch % WATCH_EVERY == 0:
                self.check_losses()
                self.terminal.note(self.state)
            self.pause()
        self.check_losses()

    def evaluation(self, batches):
        """Iterates over all of ``batches``; a run that stops meanwhile evaluates again when it resumes."""
        common = len(batches) if self.mesh.replicas == 1 else batches.common  # of which every replica has a share
        for number, batch in enumerate(self.terminal.evaluation(batches), start=1):
            yield batch
            if number <= common:
                self.pause()

    # Stopping

    def wish(self):
        """What is to be done after a mini-batch: nothing (0), save, or the number of a signal."""
        received = self.processes.tell_first(self.signals.received) if self.line else self.signals.received
        due = time.perf_counter() - self.saved_at > 60 * self.args.save_every
        return received or due * SAVE

    def pause(self):
        """Between two mini-batches: saves when it is time to; after a signal to any process leaves, with exit code
        128 + its number. Replicas agree; stages stop or save behind the mini-batch that the lowest has marked.
        """
        asked = self.line.take_mark() if self.line else self.mesh.agree(self.wish())
        if not asked:
            return
        if self.within:
            self.check_losses()
            self.save()
        if asked > SAVE:
            what = f"{self.script}: stopped after {self.where()}"
            self.terminal.stopped(what, self.checkpoint.path(".pt") if self.saves else None)
            self.state.each("close")
            self.processes.wait()  # torchrun ends those that are left when one has ended like this
            self.processes.close()
            sys.exit(128 + asked)

    # Log and checkpoint

    def describe(self, *lines):
        """Adds comments to the first lines of the log, if it is not begun yet."""
        self.header += [f"# {line}" for line in lines]

    def log(self, n, epoch, train, test, line=logs.head_line):
        """Logs head ``n`` after ``epoch``: the Meters of its training and of its evaluation, in a form of ``line``."""
        self.report(line(n, epoch, train.loss, train.top1, test.top1))

    def report(self, line, *comments):
        """Logs and prints ``line``; ``comments`` go to the log alone."""
        self.write("".join(f"{text}\n" for text in (line, *comments)))
        print(line, flush=True)

    def write(self, text):
        """Appends to the log."""
        if self.processes.rank == 0:
            self.checkpoint.append(text)

    def begin(self):
        """Creates the log, with its first lines, and the checkpoint of the untrained state."""
        about = [f"# {key}: {self.state[key][0]}" for key in ("train", "test") if key in self.state]
        header = [repr(self.args), *self.environment(), *about, *self.header, *map(repr, self.state["net"])]
        self.checkpoint.stem = self.processes.from_first(lambda: self.checkpoint.create("\n".join(header) + "\n"))
        self.terminal.start(header, self.checkpoint.path(".log"))
        self.save()
        self.processes.remember(self.checkpoint.path(".pt"))

    def environment(self):
        """The lines that say how and where this run goes."""
        cut = f", modules {self.line}" if self.line else ""
        processes = [f"# processes: {self.processes}{cut}"] if self.processes.size > 1 else []
        return provenance.environment(self.device, self.args.half) + processes

    def save(self):
        """Writes the checkpoint. All processes call this after the same mini-batch."""
        if self.within:
            self.seconds = time.perf_counter() - self.started
        state = self.state.gather()
        if self.processes.rank == 0 and self.saves:
            place = {name: getattr(self, name) for name in PLACE}
            form = getattr(self.state["test"][0], "form", None) if "test" in self.state else None  # for later use
            about = {"script": self.script, "arguments": vars(self.args), "data": form._asdict() if form else {}}
            self.checkpoint.write({**about, **place, "state": state})
        self.saved_at = time.perf_counter()

    def resume(self):
        """Restores the checkpoint that --resume names, and brings the log back to the lines it knows of."""
        asked = None if self.args.resume in ("newest", "auto") else self.args.resume
        asked = self.processes.remembered or asked  # this job's own, where torchrun starts it anew
        if asked is None and self.args.resume == "auto" and self.processes.from_first(self.checkpoint.newest) is None:
            return self.begin()
        expected = (self.script, vars(self.args), self.elsewhere, self.stages or 1)
        found = self.processes.from_first(lambda: self.checkpoint.read(asked, lambda *saved: check(*saved, *expected)))
        saved, self.checkpoint.folder, self.checkpoint.stem = found
        self.state.restore(saved["state"], self.checkpoint.path(".pt"))
        for name in PLACE:
            setattr(self, name, saved[name])
        self.processes.remember(self.checkpoint.path(".pt"))
        if self.processes.rank == 0 and (self.within or not self.finished()):
            self.checkpoint.reopen(saved["log"])
            self.write("\n".join(header := [f"# resumed after {self.where()}", *self.environment()]) + "\n")
            print(f"resuming {self.checkpoint.path('.pt')} after {self.where()}")
            self.terminal.start(header, self.checkpoint.path(".log"))
