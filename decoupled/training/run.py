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

from decoupled import logs
from decoupled.data import datasets
from decoupled.data.batches import mix_seed
from decoupled.errors import InputError
from decoupled.parallel.mesh import Mesh
from decoupled.parallel.processes import Processes, launched
from decoupled.parallel.stages import Stage
from decoupled.training import environment as provenance
from decoupled.training.checkpoint import Checkpoint, State, check
from decoupled.training.console import Signals, Terminal
from decoupled.training.precision import Steps, choose_kernels, pick_device

WATCH_EVERY = 100  # batches between looks at the losses: each look waits for the device


# Flags that may differ on resume; images are compared.
FLAGS_FREE_ON_RESUME = ("resume", "save_every", "log_dir", "data_dir")


FLAGS_FREE_ON_RESUME += ("modules_per_stage", "stages", "queue", "timeout", "backend")


PLACE = ("module_index", "epoch", "within", "batch", "seconds")  # of a Run, where it is


SAVE = 1  # what is to be done after a mini-batch: go on (0), save, or the number of a signal (from 2)


class Run:
    """A run of the script that is being executed, with its parsed ``args``. Nothing is written before ``epochs``.

    distributed     whether the script can share its work among the processes of torchrun
    stages      into how many the modules are shared out; None: as many as there are processes
    loss_scale  of fp16: constant; None: as large as gradients allow
    free_on_resume  further flags that may differ on resume

    Raises InputError for a device that is not there, a folder that cannot be written to, processes that will not do.
    """

    def __init__(self, args, *, distributed=False, stages=None, loss_scale=None, free_on_resume=()):
        self.args, self.free_on_resume = args, (*FLAGS_FREE_ON_RESUME, *free_on_resume)
        self.script = "/".join(Path(sys.argv[0]).resolve().parts[-2:])
        self.checkpoint = Checkpoint(args.log_dir, self.script.removesuffix(".py").replace("/", "-"), args.name)
        if not distributed and (size := launched()[1]) > 1:
            raise InputError(f"{self.script} runs on one process, not on {size}: start it without torchrun")
        how = {name: getattr(args, name) for name in ("backend", "timeout") if hasattr(args, name)}
        self.processes = Processes(pick_device(args.device), **how)
        self.mesh = Mesh(self.processes, stages or self.processes.size)
        self.console = Terminal(quiet=self.processes.rank > 0)
        self.stage = None  # this process's Stage where modules are shared out
        self.device = self.processes.device
        self.num_modules, self.header = None, []
        self.module_index, self.epoch, self.batch, self.within, self.seconds = 0, 0, 0, False, 0.0
        self.steps = Steps(self.device, args.half, loss_scale)
        self.saves = not getattr(args, "debug", 0)  # checkpoints: not with --debug 1
        self.signals = Signals(quiet=self.processes.rank > 0)
        self.weight = None  # of this process's loss in the mean over replicas, whose shares of a mini-batch may differ
        choose_kernels(self.device, getattr(args, "deterministic", False))
        torch.manual_seed(args.seed)

    def data(self, **options):
        """(train, test, number of classes) of the flags' data set, on the run's device: see decoupled.data.datasets.load."""
        names = ("dataset", "data_dir", "batch_size", "test_batch_size", "train_samples", "validation", "seed")
        options |= {name: getattr(self.args, name) for name in names} | {"device": self.device}
        with self.console.reading():
            return self.mesh.images(lambda: datasets.load(**options))

    def prepare(self, net, graphs=True):
        """``net`` on the run's device in channels-last memory, its modules compiled with --compile: see Steps."""
        return self.steps.prepare(net, self.args.compile, graphs)

    def distribute(self, net, shape=(3, 32, 32), kind=Stage):
        """This process's modules of ``net``, prepared: a decoupled.parallel.stages.Stage, or another ``kind`` of it. ``shape``:
        of an image.
        """
        how = {"lengths": getattr(self.args, "modules_per_stage", None), "queue": getattr(self.args, "queue", 1)}
        stage = kind(
            self.steps.prepare(net, False),
            shape,
            self.mesh,
            autocast=self.autocast,
            pending_request=self.pending_request,
            **how,
        )
        self.prepare(stage.modules_here)
        self.stage, self.steps.first = stage if self.mesh.stages > 1 else None, stage.first
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

    def epochs(self, num_modules=None, **state):
        """Yields the epochs left to do, from 1; with ``num_modules``, (module_index, epoch): for
        each module in turn, from 0, all epochs.

        ``state`` is all that must survive: objects with state_dict, or lists of them, under names of your choice
        (optimizers under "optimizers", in the modules' order; what is counted on several processes, under "meters").
        An epoch begins by ``begin`` of those that have one, images and meters. State is saved before the first epoch,
        after each, and within, where the run stops or --save-every minutes have passed; --resume restores it.
        """
        self.num_modules = num_modules
        self.state = State(state, self.scaler, self.mesh, self.stage)
        self.saved_at = time.perf_counter()
        with self.signals:
            try:
                self.resume() if self.args.resume or self.processes.remembered else self.begin()
                while self.within or not self.finished():
                    if not self.within:
                        self.begin_epoch()
                    self.started = time.perf_counter() - self.seconds
                    self.console.begin_epoch(self.epoch, self.args.epochs, self.module_index + 1, self.num_modules)
                    yield (self.module_index, self.epoch) if num_modules else self.epoch
                    self.end_epoch()
                    self.checkpoint_or_stop()
                self.console.write(f"finished: {self.checkpoint.path('.log')}")
            finally:
                self.state.each("close")
                self.checkpoint.close()
        self.processes.close()

    def finished(self):
        return (self.module_index, self.epoch) == ((self.num_modules or 1) - 1, self.args.epochs)

    def begin_epoch(self):
        if self.epoch == self.args.epochs:
            self.module_index, self.epoch = self.module_index + 1, 0
        self.epoch, self.batch, self.seconds, self.within = self.epoch + 1, 0, 0.0, True
        self.state.each("begin")

    def end_epoch(self):
        self.check_losses()
        self.within = False
        seconds = time.perf_counter() - self.started
        self.write(f"# {self.where()} took {seconds:.2f} s\n")
        self.console.end_epoch(seconds)
        self.save()

    def where(self):
        epoch = f"module {self.module_index + 1}, epoch {self.epoch}" if self.num_modules else f"epoch {self.epoch}"
        return f"{epoch}, batch {self.batch}" if self.within else epoch

    def progress(self, batches, resumes=False):
        """Iterates over what is left of an epoch of ``batches``, and shows that on a terminal. After each it may stop
        or save. What a step draws from PyTorch's generator, as dropout does, depends on seed and place alone.
        """
        left = batches.rest() if hasattr(batches, "rest") else batches
        stage = (self.module_index + 1,) if self.num_modules else ()
        for batch in self.console.training(left, batches, self.batch, self.args.batch_size):
            self.batch += 1
            self.weight = batches.weight if self.mesh.replicas > 1 else None
            torch.manual_seed(mix_seed(self.args.seed, *stage, self.epoch, self.batch, self.mesh.replica))
            yield batch
            if self.batch % WATCH_EVERY == 0:
                self.check_losses()
                self.console.note(self.state)
            self.checkpoint_or_stop()
        self.check_losses()

    def evaluation(self, batches):
        """Iterates over all of ``batches``; a run that stops meanwhile evaluates again when it resumes."""
        common = len(batches) if self.mesh.replicas == 1 else batches.common  # of which every replica has a share
        for number, batch in enumerate(self.console.evaluation(batches), start=1):
            yield batch
            if number <= common:
                self.checkpoint_or_stop()

    # Stopping

    def pending_request(self):
        """What is to be done after a mini-batch: nothing (0), save, or the number of a signal."""
        received = self.signals.received
        due = time.perf_counter() - self.saved_at > 60 * self.args.save_every
        return received or due * SAVE

    def checkpoint_or_stop(self):
        """Between two mini-batches: saves when it is time to; after a signal to any process leaves, with exit code
        128 + its number. Replicas agree; stages stop or save behind the mini-batch that the lowest has marked.
        """
        asked = self.stage.take_tag() if self.stage else self.mesh.agree(self.pending_request())
        if not asked:
            return
        if self.within:
            self.check_losses()
            self.save()
        if asked > SAVE:
            what = f"{self.script}: stopped after {self.where()}"
            self.console.stopped(what, self.checkpoint.path(".pt") if self.saves else None)
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
        self.console.start(header, self.checkpoint.path(".log"))
        self.save()
        self.processes.remember(self.checkpoint.path(".pt"))

    def environment(self):
        """The lines that say how and where this run goes."""
        cut = f", modules {self.stage}" if self.stage else ""
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
        expected = (self.script, vars(self.args), self.free_on_resume, self.num_modules or 1)
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
            self.console.start(header, self.checkpoint.path(".log"))
