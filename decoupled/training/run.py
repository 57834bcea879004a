"""A run of an experiment, in one process or several, that can stop and resume after any mini-batch: seed, device,
precision, log, checkpoint. The algorithm stays in the script.

run = Run(flags.parser(__doc__, epochs=50, batch_size=128).parse_args())
for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters):
    for images, labels in run.progress(train): ...
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from decoupled import logs
from decoupled.data import datasets
from decoupled.data.batches import mix_seed
from decoupled.errors import InputError
from decoupled.parallel.mesh import Mesh
from decoupled.parallel.processes import Processes, launched
from decoupled.parallel.stages import Stage
from decoupled.training.checkpoint import Checkpoint
from decoupled.training.console import Console, Signals
from decoupled.training.environment import environment
from decoupled.training.precision import Steps, choose_kernels, pick_device, warn_of_slow_half
from decoupled.training.state import State

CHECK_LOSSES_EVERY = 100  # mini-batches: each check waits for the device

FLAGS_FREE_ON_RESUME = (  # of all scripts: they may differ when a run resumes
    "resume",
    "save_every",
    "log_dir",
    "data_dir",  # the images themselves are compared
    "modules_per_stage",
    "stages",
    "queue",
    "timeout",
    "backend",
)

# What a run is to do after a mini-batch, as one integer, which processes can send and compare: the more urgent is the
# greater. From 2 on, the number of a signal to stop for.
GO_ON = 0
SAVE = 1


@dataclass
class Position:
    """Where a run is."""

    module_index: int = 0  # the module in training, where one is trained after the other
    epoch: int = 0  # in progress, or else finished; the first is 1
    within_epoch: bool = False  # whether that epoch is in progress
    batch: int = 0  # mini-batches of the epoch that were trained on
    seconds: float = 0.0  # that the epoch had taken when it was saved


class Run:
    """A run of the script that is being executed, with its parsed ``args``. Nothing is written before ``epochs``.

    distributed     whether the script can run on the processes of torchrun
    stages          number of stages that share the modules; None: as many as there are processes
    loss_scale      of fp16: a constant, or None for dynamic scaling
    free_on_resume  names of further arguments that may differ on resume

    Raises InputError for a missing device, a folder that cannot be written to, and a wrong number of processes.
    """

    def __init__(self, args, *, distributed=False, stages=None, loss_scale=None, free_on_resume=()):
        self.args = args
        self.free_on_resume = (*FLAGS_FREE_ON_RESUME, *free_on_resume)
        self.script = "/".join(Path(sys.argv[0]).resolve().parts[-2:])
        script_name = self.script.removesuffix(".py").replace("/", "-")
        self.checkpoint = Checkpoint(args.log_dir, script_name, args.name)
        self.saves_checkpoints = not getattr(args, "debug", 0)
        if not distributed:
            require_one_process(self.script)
        self.processes = Processes(pick_device(args.device), **given(args, "backend", "timeout"))
        self.mesh = Mesh(self.processes, stages or self.processes.size)
        self.device = self.processes.device
        self.stage = None  # this process's Stage, where several share the modules
        self.console = Console(quiet=self.processes.rank > 0)
        self.signals = Signals(quiet=self.processes.rank > 0)
        self.header = []  # comments for the first lines of the log
        self.num_modules = None  # where one module is trained after the other
        self.position = Position()
        self.loss_weight = None  # this replica's, as its share of a mini-batch may be smaller than another's
        self.steps = Steps(self.device, args.half, loss_scale)
        if args.half:
            warn_of_slow_half(self.device)
        choose_kernels(self.device, getattr(args, "deterministic", False))
        torch.manual_seed(args.seed)

    @property
    def epoch(self):
        """The epoch in progress, or else the one that has finished; the first is 1."""
        return self.position.epoch

    @property
    def batch(self):
        """The number of this epoch's mini-batch in training; the first is 1."""
        return self.position.batch

    # What a script makes before its epochs

    def data(self, **options):
        """(train, test, number of classes) of the data set that the flags choose, on the run's device.

        ``options`` are those of decoupled.data.datasets.load.
        """
        names = ("dataset", "data_dir", "batch_size", "test_batch_size", "train_samples", "validation", "seed")
        options |= given(self.args, *names)
        options["device"] = self.device
        with self.console.reading():
            return self.mesh.images(lambda: datasets.load(**options))

    def prepare(self, net, graphs=True):
        """Moves ``net`` to the run's device, in channels-last memory, and returns it. Compiles its modules with
        --compile, on CUDA into CUDA graphs unless ``graphs`` is false.
        """
        return self.steps.prepare(net, self.args.compile, graphs)

    def distribute(self, net, shape=(3, 32, 32), kind=Stage):
        """This process's modules of ``net``, prepared: a decoupled.parallel.stages.Stage, or a ``kind`` of it.

        ``shape`` is that of an image.
        """
        stage = kind(
            self.steps.prepare(net, compiled=False),
            shape,
            self.mesh,
            lengths=getattr(self.args, "modules_per_stage", None),
            queue=getattr(self.args, "queue", 1),
            autocast=self.autocast,
            pending_request=self.pending_request,
        )
        self.prepare(stage.modules_here)
        self.steps.first = stage.first
        if self.mesh.stages > 1:
            self.stage = stage
        return stage

    def describe(self, *lines):
        """Adds comments to the first lines of a new log."""
        self.header += [f"# {line}" for line in lines]

    # Steps

    def autocast(self):
        """The context for forward passes: mixed precision with --half, no effect otherwise."""
        return self.steps.autocast()

    def step(self, loss, optimizer):
        """zero_grad, backward and step of one module; in fp16 through its own loss scale."""
        self.steps.step(loss, optimizer, self.batch, self.loss_weight)

    def scaler(self, optimizer):
        """The loss scale of the module that ``optimizer`` trains; a no-op except in fp16."""
        return self.steps.learner(optimizer).scaler

    def watch(self, loss, n):
        """Notes the loss of module ``n``, for a module that learns without ``step``: see ``check_losses``."""
        self.steps.watch(loss, n, self.batch)

    def latest_losses(self):
        """The losses of this mini-batch: a list of numbers. Waits for the device once."""
        return self.steps.latest(self.batch)

    def check_losses(self):
        """Raises InputError where a loss since the last check is not finite."""
        self.steps.check(self.epoch, self.checkpoint.path(".pt"))

    # Epochs

    def epochs(
        self, *, net, optimizers, schedules=(), train=None, test=None, meters=(), num_modules=None, **further_state
    ):
        """Yields the epochs left to do, from 1. With ``num_modules``, yields (module_index, epoch): all epochs for each
        module in turn, module_index from 0.

        What is given is the state of the run, which checkpoints have and --resume restores: objects with state_dict and
        load_state_dict, or lists with one for each module. An epoch begins by calling ``begin`` of those that have it,
        such as ``train`` and ``meters``. Several processes add up their ``meters``.

        Checkpoints are written before the first epoch, after each, within one every --save-every minutes, and when a
        signal stops the run.
        """
        state = {"net": net, "optimizers": optimizers, "schedules": schedules}
        state |= {"train": train, "test": test, "meters": meters, **further_state}
        state = {name: value for name, value in state.items() if value is not None}
        self.state = State(state, self.scaler, self.mesh, self.stage)
        self.num_modules = num_modules
        self.saved_at = time.perf_counter()
        with self.signals:
            try:
                self.begin_or_resume()
                while self.position.within_epoch or not self.finished():
                    if not self.position.within_epoch:
                        self.begin_epoch()
                    self.started_at = time.perf_counter() - self.position.seconds
                    self.console.begin_epoch(self.epoch, self.args.epochs, self.position.module_index, num_modules)
                    yield (self.position.module_index, self.epoch) if num_modules else self.epoch
                    self.end_epoch()
                    self.checkpoint_or_stop()
                self.console.write(f"finished: {self.checkpoint.path('.log')}")
            finally:
                self.state.close()
                self.checkpoint.close()
        self.processes.close()

    def finished(self):
        last_module = (self.num_modules or 1) - 1
        return self.position.module_index == last_module and self.epoch >= self.args.epochs

    def begin_epoch(self):
        module_index = self.position.module_index
        epoch = self.epoch + 1
        if epoch > self.args.epochs:
            module_index += 1
            epoch = 1
        self.position = Position(module_index, epoch, within_epoch=True)
        self.state.begin_epoch()

    def end_epoch(self):
        self.check_losses()
        self.position.within_epoch = False
        seconds = time.perf_counter() - self.started_at
        self.write_log(f"# {self.position_name()} took {seconds:.2f} s\n")
        self.console.end_epoch(seconds)
        self.save()

    def position_name(self):
        name = f"epoch {self.epoch}"
        if self.num_modules:
            name = f"module {self.position.module_index + 1}, {name}"
        if self.position.within_epoch:
            name = f"{name}, batch {self.batch}"
        return name

    def progress(self, batches, resumes=False):
        """Iterates over the rest of this epoch's ``batches`` and shows a bar on a terminal. After each mini-batch, the
        run may save or stop.

        ``batches`` have a method ``rest()`` that iterates over what is left of the epoch, and are part of the run's
        state. ``resumes=True`` is for other iterables that begin where the restored state says. Raises InputError for
        others, as a run that is resumed would silently repeat what it has trained on.

        PyTorch's random numbers in a step, such as those of dropout, depend on the seed and the position alone.
        """
        if hasattr(batches, "rest"):
            rest = batches.rest()
        elif resumes or not self.saves_checkpoints:
            rest = batches
        else:
            raise InputError(
                f"run.progress({type(batches).__name__}) could not resume within an epoch: give it an object with "
                "rest(), state_dict() and load_state_dict(), such as Batches, and give that to run.epochs, too"
            )
        for batch in self.console.training(rest, batches, self.batch, self.args.batch_size):
            self.position.batch += 1
            if self.mesh.replicas > 1:
                self.loss_weight = batches.weight
            torch.manual_seed(self.seed_of_batch())
            yield batch
            if self.batch % CHECK_LOSSES_EVERY == 0:
                self.check_losses()
                self.console.show_accuracies(self.state.get("meters"))
            self.checkpoint_or_stop()
        self.check_losses()

    def seed_of_batch(self):
        position = [self.epoch, self.batch, self.mesh.replica]
        if self.num_modules:
            position.insert(0, self.position.module_index + 1)
        return mix_seed(self.args.seed, *position)

    def evaluation(self, batches):
        """Iterates over all of ``batches``. A run that stops meanwhile evaluates anew when it resumes."""
        for number, batch in enumerate(self.console.evaluation(batches)):
            yield batch
            # Replicas stop together, so only after a mini-batch that each of them has a share of.
            if self.mesh.replicas == 1 or number < batches.common:
                self.checkpoint_or_stop()

    # Saving and stopping

    def pending_request(self):
        """What this process is to do after the mini-batch: GO_ON, SAVE, or the number of a signal to stop for."""
        if self.signals.received:
            return self.signals.received
        if time.perf_counter() - self.saved_at > 60 * self.args.save_every:
            return SAVE
        return GO_ON

    def checkpoint_or_stop(self):
        """Between two mini-batches: saves if that is due; after a signal, saves and ends the process with exit code
        128 + its number.
        """
        request = self.common_request()
        if request == GO_ON:
            return
        if self.position.within_epoch:
            self.check_losses()
            self.save()
        if request != SAVE:
            self.stop(signal_number=request)

    def common_request(self):
        """The same request in all processes, after the same mini-batch: replicas agree on one, and that of the lowest
        stage travels with the mini-batch to the others.
        """
        if self.stage is not None:
            return self.stage.take_tag()
        return self.mesh.agree(self.pending_request())

    def stop(self, signal_number):
        saved_in = self.checkpoint.path(".pt") if self.saves_checkpoints else None
        self.console.stopped(f"{self.script}: stopped after {self.position_name()}", saved_in)
        self.state.close()
        self.processes.wait()  # when one process ends, torchrun ends the others
        self.processes.close()
        sys.exit(128 + signal_number)

    def save(self):
        """Writes the checkpoint. All processes call this after the same mini-batch."""
        if self.position.within_epoch:
            self.position.seconds = time.perf_counter() - self.started_at
        state = self.state.gather()
        if self.processes.rank == 0 and self.saves_checkpoints:
            snapshot = {"script": self.script, "arguments": vars(self.args), "data": self.input_form()}
            self.checkpoint.write({**snapshot, **asdict(self.position), "state": state})
        self.saved_at = time.perf_counter()

    def input_form(self):
        """How the test images become the network's input, for later use: the fields of their InputForm, if any."""
        for test in self.state.get("test"):
            if getattr(test, "form", None) is not None:
                return test.form._asdict()
        return {}

    # Beginning and resuming

    def begin_or_resume(self):
        saved, path = self.processes.from_first(self.read_checkpoint)
        if saved is None:
            self.begin()
        else:
            self.resume(saved, path)

    def read_checkpoint(self):
        """(the checkpoint that this run resumes, its path), (None, None) for a new run. Only process 0 calls this."""
        path = self.checkpoint_to_resume()
        if path is None:
            return None, None
        saved = self.checkpoint.open(path)
        self.check_same_run(saved, path)
        return saved, path

    def checkpoint_to_resume(self):
        """The path of the checkpoint that this run resumes; None for a new run."""
        if self.processes.remembered:  # torchrun has restarted this run
            return Path(self.processes.remembered)
        if self.args.resume not in ("newest", "auto"):
            return self.args.resume
        newest = self.checkpoint.newest()
        if newest is None and self.args.resume == "newest":
            raise InputError(
                f"nothing to resume in {self.checkpoint.folder}: no checkpoint is called {self.checkpoint.prefix}*.pt; "
                "start without --resume"
            )
        return newest

    def check_same_run(self, saved, path):
        """Raises InputError when the checkpoint ``saved`` is another script's, or of a run with other arguments. Only
        ``free_on_resume`` may differ, and --epochs may grow.
        """
        if saved["script"] != self.script:
            raise InputError(
                f"{path} is a checkpoint of {saved['script']}, not of {self.script}: name one of this script"
            )
        before = saved["arguments"]
        now = vars(self.args)
        free = set(self.free_on_resume)
        if saved["module_index"] == 0 and now["epochs"] > before["epochs"]:
            free.add("epochs")
        differing = [
            f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})"
            for name in now | before
            if name not in free and now.get(name) != before.get(name)
        ]
        if differing:
            raise InputError(f"{path} is of a run with {', '.join(differing)}: resume it with the same arguments")

    def begin(self):
        """Creates the log, with its first lines, and the checkpoint of the untrained state."""
        images = [f"# {name}: {value}" for name in ("train", "test") for value in self.state.get(name)]
        networks = [repr(value) for value in self.state.get("net")]
        header = [repr(self.args), *self.environment(), *images, *self.header, *networks]
        text = "\n".join(header) + "\n"
        self.checkpoint.stem = self.processes.from_first(lambda: self.checkpoint.create(text))
        self.console.start(header, self.checkpoint.path(".log"))
        try:
            self.save()
        except BaseException:
            if self.processes.rank == 0:
                self.checkpoint.remove()
            raise
        self.remember_checkpoint()

    def resume(self, saved, path):
        """Continues the run of the checkpoint ``saved``, read from ``path``."""
        self.checkpoint.use(path)
        self.state.restore(saved["state"], path)
        self.position = Position(**{name: saved[name] for name in asdict(Position())})
        self.remember_checkpoint()
        ended = self.finished() and not self.position.within_epoch
        if self.processes.rank > 0:
            return
        if not ended or not self.checkpoint.log_begins_with(saved["log"]):
            self.checkpoint.restore_log(saved["log"])
        if not ended:
            header = [f"# resumed after {self.position_name()}", *self.environment()]
            self.write_log("\n".join(header) + "\n")
            print(f"resuming {path} after {self.position_name()}")
            self.console.start(header, self.checkpoint.path(".log"))

    def remember_checkpoint(self):
        """Lets the processes that torchrun starts after a failure know this run's checkpoint."""
        self.processes.remember(self.checkpoint.path(".pt"))

    def environment(self):
        """The lines that say how and where this run goes."""
        lines = environment(self.device, self.args.half)
        if self.stage is not None:
            lines.append(f"# processes: {self.processes}, modules {self.stage}")
        elif self.processes.size > 1:
            lines.append(f"# processes: {self.processes}")
        return lines

    # The log

    def log(self, n, epoch, train, test, line=logs.head_line):
        """Logs head ``n`` after ``epoch``: the Meters of its training and of its evaluation, in the form of ``line``, a
        function of decoupled.logs.
        """
        self.report(line(n, epoch, train.loss, train.top1, test.top1))

    def report(self, line, *comments):
        """Logs and prints ``line``; ``comments`` are only logged."""
        self.write_log("".join(f"{text}\n" for text in (line, *comments)))
        print(line, flush=True)

    def write_log(self, text):
        if self.processes.rank == 0:
            self.checkpoint.append(text)


def require_one_process(script):
    """Raises InputError where torchrun has started several processes."""
    size = launched()[1]
    if size > 1:
        raise InputError(f"{script} runs on one process, not on {size}: start it without torchrun")


def given(args, *names):
    """{name: value} of those arguments that this script has."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
