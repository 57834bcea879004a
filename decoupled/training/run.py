"""A training run, in one process or several, that can stop and resume after any mini-batch. It takes care of seed,
device, precision, log and checkpoint; the algorithm stays in the script.

run = Run(flags.parser(__doc__, epochs=50, batch_size=128).parse_args())
for epoch in run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train, test=test, meters=meters):
    for images, labels in run.progress(train): ...
"""

import hashlib
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from decoupled import logs
from decoupled.data import datasets
from decoupled.data.batches import mix_seed
from decoupled.errors import InputError
from decoupled.parallel.mesh import Mesh
from decoupled.parallel.processes import Processes, launched
from decoupled.parallel.stages import Stage
from decoupled.training.checkpoint import RunFiles
from decoupled.training.console import Console, Signals
from decoupled.training.device import choose_kernels, pick_device
from decoupled.training.environment import environment
from decoupled.training.state import State
from decoupled.training.steps import Steps, warn_if_half_is_slow

CHECK_LOSSES_EVERY = 100  # in mini-batches; each check waits for the device

FREE_ON_RESUME = (  # arguments of all scripts that may differ when a run resumes
    "resume",
    "save_every",
    "log_dir",
    "data_dir",  # the images themselves are compared instead
    "workers",
    "modules_per_stage",
    "stages",
    "queue",
    "timeout",
    "backend",
)

# A request is what the run should do after a mini-batch: GO_ON, SAVE, or stop for a signal. It is an integer, so that
# processes can send it, and agree on the largest, which is the most urgent.
GO_ON = 0
SAVE = 1
# Any other request is the number of the signal: SIGINT is 2, SIGTERM 15.


@dataclass
class Position:
    """How far a run has progressed."""

    module_index: int = 0  # the module being trained, from 0; always 0 unless modules are trained one after the other
    epoch: int = 0  # the epoch in progress or, between epochs, the last one, from 1; 0 before training
    within_epoch: bool = False  # whether that epoch is still in progress
    batch: int = (
        0  # the number of its latest mini-batch, from 1, counted as soon as its step begins; 0 before the first
    )
    seconds: float = 0.0  # how long that epoch had taken when the checkpoint was saved


class Run:
    """One run of the current script, with its parsed ``args``. Nothing is written before ``epochs``.

    distributed     whether the script supports torchrun
    stages          number of stages that share the modules; None for one in each process
    loss_scale      a constant loss scale for fp16; None for dynamic scaling
    free_on_resume  names of further arguments that may differ when a run resumes

    Raises InputError for a missing device, a folder that cannot be written to, and a wrong number of processes.
    """

    def __init__(self, args, *, distributed=False, stages=None, loss_scale=None, free_on_resume=()):
        self.args = args
        self.free_on_resume = (*FREE_ON_RESUME, *free_on_resume)
        self.script = "/".join(Path(sys.argv[0]).resolve().parts[-2:])
        self.script_sha256 = file_sha256(sys.argv[0])
        script_name = self.script.removesuffix(".py").replace("/", "-")
        self.files = RunFiles(args.log_dir, script_name, args.name)
        self.saves_checkpoints = not getattr(args, "debug", 0)
        if not distributed:
            require_one_process(self.script)
        self.processes = Processes(pick_device(args.device), **existing(args, "backend", "timeout"))
        self.mesh = Mesh(self.processes, stages or self.processes.size)
        self.device = self.processes.device
        self.stage = None  # this process's Stage, if the modules are spread over several processes
        self.train = None  # the training mini-batches that `data` returned, or their Outline
        self.console = Console(quiet=self.processes.rank > 0)
        self.signals = Signals(quiet=self.processes.rank > 0)
        self.described = []  # comments of the script for the first lines of the log
        self.num_modules = None  # a number if modules are trained one after the other
        self.position = Position()
        # Factor for this replica's loss, because shares of a mini-batch differ in size; None with one replica
        self.loss_weight = None
        self.steps = Steps(self.device, args.half, loss_scale)
        if args.half:
            warn_if_half_is_slow(self.device)
        choose_kernels(self.device, getattr(args, "deterministic", False))
        torch.manual_seed(args.seed)

    @property
    def epoch(self):
        """The epoch in progress or, between epochs, the last one, from 1."""
        return self.position.epoch

    @property
    def batch(self):
        """The number of the current mini-batch within its epoch, from 1."""
        return self.position.batch

    # Before the epochs

    def data(self, load=None, **options):
        """(train, test, number of classes) of the data set that the flags choose, on the run's device; ``options`` are
        those of decoupled.data.datasets.load.

        For your own data, ``load`` is a function that returns these three: see decoupled.data.batches. If the modules
        are spread over several processes, those above the lowest stage get Outlines instead of train and test.
        """
        if load is None:
            names = ("dataset", "data_dir", "batch_size", "test_batch_size", "train_samples", "validation", "seed")
            options |= existing(self.args, *names)
            load = partial(datasets.load, **options, device=self.device)
        with self.console.reading():
            self.train, test, classes = self.mesh.load_data(load)
        return self.train, test, classes

    def prepare(self, net, cuda_graphs=True):
        """Moves ``net`` to the run's device, in channels-last memory, and returns it. With --compile, compiles each
        module, on CUDA to CUDA graphs unless ``cuda_graphs`` is False.
        """
        return self.steps.prepare(net, self.args.compile, cuda_graphs)

    def distribute(self, net, example=None, kind=Stage):
        """Keeps the modules of ``net`` that this process trains, and prepares them. Returns a Stage, or an object of
        its subclass ``kind``.

        ``example`` is a batch of the network's inputs, of any shape and dtype, from which stages learn what they send
        to each other. By default, it comes from the training data that ``data`` returned.
        """
        net = self.steps.prepare(net, compiled=False)  # with --compile, only the modules that stay are compiled, below
        if self.mesh.stages > 1:
            example = self.example_input(example)
        stage = kind(
            net,
            example,
            self.mesh,
            autocast=self.autocast,
            pending_request=self.pending_request,
            **existing(self.args, "modules_per_stage", "queue"),
        )
        self.prepare(stage.modules_here)
        self.steps.modules_below = stage.first_module
        if self.mesh.stages > 1:
            self.stage = stage
        return stage

    def example_input(self, example):
        """``example``, or by default that of the training data, on the run's device."""
        if example is None:
            if self.train is None or self.train.example is None:
                raise InputError("several stages need an example of the network's inputs: run.distribute(net, example)")
            example, _ = self.train.example
        memory_format = torch.channels_last if example.dim() == 4 else torch.preserve_format
        return example.to(self.device, memory_format=memory_format)

    def describe(self, *lines):
        """Adds comments to the first lines of a new log."""
        self.described += [f"# {line}" for line in lines]

    # Steps

    def autocast(self):
        """The context manager for forward passes: mixed precision with --half, else no effect."""
        return self.steps.autocast()

    def step(self, loss, optimizer, clip=None):
        """zero_grad, backward and step of one module, with its own loss scale in fp16.

        With ``clip``, a gradient with a larger norm is scaled down to it. Does nothing if all parameters of the module
        are frozen. Raises InputError for an optimizer that was not passed to ``epochs``: a resumed run would silently
        continue without its state.
        """
        if not self.state.has(optimizer):
            raise InputError(
                "run.step got an optimizer that run.epochs does not know: pass it to run.epochs as well (optimizers=…)"
            )
        self.steps.step(loss, optimizer, self.batch, self.loss_weight, clip)

    def scaler(self, optimizer):
        """The loss scale of the module that ``optimizer`` trains; it has no effect except in fp16. The first call
        numbers the module.
        """
        return self.steps.learner(optimizer).scaler

    def watch(self, loss, n):
        """Records the loss of module ``n`` for ``check_losses``. For modules that are trained without ``step``."""
        self.steps.watch(loss, n, self.batch)

    def latest_losses(self):
        """The losses of this mini-batch: a list of numbers. Waits for the device once."""
        return self.steps.latest(self.batch)

    def check_losses(self):
        """Raises InputError if any loss since the last check is not finite."""
        self.steps.check(self.epoch, self.files.path(".pt"))

    # Epochs

    def epochs(
        self,
        *,
        net,
        optimizers,
        schedules=(),
        train=None,
        test=None,
        meters=(),
        num_modules=None,
        **further_state,
    ):
        """Yields the remaining epochs, from 1. With ``num_modules``, a number, trains that many modules one after the
        other, each for all epochs, and yields (module_index, epoch), with module_index from 0.

        The arguments are the state of the run, saved in checkpoints and restored by --resume. Each is an object with
        state_dict and load_state_dict, or a list of them, one for each module. If they have a method ``begin``, as
        ``train`` and ``meters`` do, it is called at the start of each epoch. The counts of ``meters`` are summed over
        all processes.

        Checkpoints are written before the first epoch, after each epoch, every --save-every minutes within an epoch,
        and when a signal stops the run.

        With several replicas, raises InputError if their gradients are not averaged, because each would silently train
        a network of its own, or if a mini-batch is too small to be shared.
        """
        objects = {"net": net, "optimizers": optimizers, "schedules": schedules}
        objects |= {"train": train, "test": test, "meters": meters, **further_state}
        objects = {name: value for name, value in objects.items() if value is not None}
        self.state = State(objects, self.scaler, self.mesh, self.stage)
        if self.mesh.replicas > 1:
            self.check_replicas()
        self.num_modules = num_modules
        self.saved_at = time.perf_counter()
        with self.signals:
            try:
                self.begin_or_resume()
                while not self.finished():
                    if not self.position.within_epoch:
                        self.begin_epoch()
                    self.epoch_started_at = time.perf_counter() - self.position.seconds
                    module_index = self.position.module_index
                    self.console.begin_epoch(self.epoch, self.args.epochs, module_index, num_modules)
                    yield (module_index, self.epoch) if num_modules else self.epoch
                    self.end_epoch()
                    self.save_or_stop()
                self.console.write(f"finished: {self.files.path('.log')}")
            finally:
                self.state.close()
                self.files.close()
        self.processes.close()

    def check_replicas(self):
        """Raises InputError if the replicas cannot train one network together."""
        if not self.mesh.is_data_parallel:
            raise InputError(
                "each replica would train a network of its own: train the modules that "
                "run.mesh.data_parallel(stage.modules_here) returns"
            )
        for batches in self.state.get("train"):
            if batches.common < len(batches):
                raise InputError(
                    f"the last mini-batch is too small to give each of {self.mesh.replicas} replicas a share: choose "
                    "another batch size, or leave it out with drop_last=True"
                )

    def finished(self):
        if self.position.within_epoch:
            return False
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
        seconds = time.perf_counter() - self.epoch_started_at
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
        """Iterates over the rest of this epoch's ``batches``, with a progress bar on a terminal. After each mini-batch,
        the run may save or stop.

        ``batches`` need a method ``rest()``, which iterates over the remaining mini-batches of the epoch, and must be
        passed to ``epochs``, which starts their epochs and saves their position. For iterables without ``rest()``,
        ``resumes=True`` asserts that they continue from the restored state themselves. Otherwise raises InputError,
        because a resumed run would silently train on some images twice.

        PyTorch's random numbers in a step, such as those of dropout, depend only on the seed and the position.
        """
        if hasattr(batches, "rest"):
            self.check_is_saved(batches)
            rest = batches.rest()
        elif resumes or not self.saves_checkpoints:
            rest = batches
        else:
            raise InputError(
                f"run.progress({type(batches).__name__}) could not resume within an epoch: give it an object with "
                "rest(), state_dict() and load_state_dict(), such as Batches, and give that to run.epochs, too"
            )
        for mini_batch in self.console.training(rest, batches, self.batch, self.args.batch_size):
            self.position.batch += 1
            if self.mesh.replicas > 1:
                self.loss_weight = batches.weight
            torch.manual_seed(self.seed_of_batch())
            yield mini_batch
            if self.batch % CHECK_LOSSES_EVERY == 0:
                self.check_losses()
                self.console.show_accuracies(self.state.get("meters"))
            self.save_or_stop()
        self.check_losses()

    def check_is_saved(self, batches):
        """Raises InputError if ``batches`` are not part of the run's state: their epochs would never begin, and a
        resumed run would not find its place in them.
        """
        images = images_of(batches)
        if not self.state.has(images):
            raise InputError(
                f"run.progress({type(images).__name__}) got mini-batches that run.epochs does not know: "
                "pass them to run.epochs as well (train=…)"
            )

    def seed_of_batch(self):
        position = [self.epoch, self.batch, self.mesh.replica_index]
        if self.num_modules:
            position.insert(0, self.position.module_index + 1)
        return mix_seed(self.args.seed, *position)

    def evaluation(self, batches):
        """Iterates over all of ``batches``. A run that stops here repeats the whole evaluation when it resumes. Raises
        InputError for the images in training, whose position would be lost.
        """
        if any(images_of(batches) is images for images in self.state.get("train")):
            raise InputError(
                "run.evaluation cannot iterate over the images in training: use train.without_augmentation()"
            )
        for number, mini_batch in enumerate(self.console.evaluation(batches)):
            yield mini_batch
            # Replicas agree on whether to stop, so all must ask: not after a last mini-batch that is too small to give
            # every replica a share. (For training, check_replicas refuses one.)
            if self.mesh.replicas == 1 or number < batches.common:
                self.save_or_stop()

    # Saving and stopping

    def pending_request(self):
        """What this process wants the run to do: GO_ON, SAVE, or the number of the signal to stop for."""
        if self.signals.received:
            return self.signals.received
        if time.perf_counter() - self.saved_at > 60 * self.args.save_every:
            return SAVE
        return GO_ON

    def save_or_stop(self):
        """Called after every mini-batch and every epoch. Saves if a checkpoint is due. After a signal, saves and exits
        with code 128 + its number.
        """
        request = self.common_request()
        if request == GO_ON:
            return
        if self.position.within_epoch:  # otherwise, end_epoch has just saved
            self.check_losses()
            self.save()
        if request != SAVE:
            self.stop(signal_number=request)

    def common_request(self):
        """The request that all processes follow after this mini-batch. Replicas agree on one; between stages, the
        lowest stage's request travels up with the mini-batch.
        """
        if self.stage is not None:
            return self.stage.take_request()
        return self.mesh.max(self.pending_request())

    def stop(self, signal_number):
        saved_in = self.files.path(".pt") if self.saves_checkpoints else None
        self.console.stopped(f"{self.script}: stopped after {self.position_name()}", saved_in)
        self.state.close()
        self.processes.wait()  # torchrun ends the other processes as soon as one has ended
        self.processes.close()
        sys.exit(128 + signal_number)

    def save(self):
        """Writes the checkpoint. All processes call this after the same mini-batch."""
        if self.position.within_epoch:
            self.position.seconds = time.perf_counter() - self.epoch_started_at
        state = self.state.gather()
        if self.processes.rank == 0 and self.saves_checkpoints:
            snapshot = {"script": self.script, "script_sha256": self.script_sha256, "arguments": vars(self.args)}
            snapshot |= {"data": self.input_form(), **asdict(self.position), "state": state}
            snapshot["finished"] = self.finished()
            self.files.write_checkpoint(snapshot)
        self.saved_at = time.perf_counter()

    def input_form(self):
        """The fields of the test images' InputForm, which describe how to prepare images for the network; {} without
        one.
        """
        for test in self.state.get("test"):
            if getattr(test, "form", None) is not None:
                return test.form._asdict()
        return {}

    # Beginning and resuming

    def begin_or_resume(self):
        saved, path = self.processes.from_first(self.open_checkpoint)
        if saved is None:
            self.begin()
        else:
            self.resume(saved, path)

    def open_checkpoint(self):
        """(checkpoint, path) to resume, checked and locked; (None, None) for a new run. Only process 0 calls this."""
        path = self.checkpoint_to_resume()
        if path is None:
            return None, None
        saved = self.files.open_checkpoint(path)
        self.check_same_run(saved, path)
        return saved, path

    def checkpoint_to_resume(self):
        """The path of the checkpoint to resume; None for a new run."""
        if self.processes.earlier_checkpoint:  # torchrun has restarted this run
            return Path(self.processes.earlier_checkpoint)
        if self.args.resume not in ("newest", "auto"):
            return self.args.resume
        newest = self.files.newest_checkpoint()
        if newest is None and self.args.resume == "newest":
            raise InputError(
                f"nothing to resume in {self.files.folder}: no checkpoint is called {self.files.prefix}-*.pt; "
                "start without --resume"
            )
        return newest

    def check_same_run(self, saved, path):
        """Raises InputError if the checkpoint ``saved`` is from another script, or from a run with other arguments.
        Only those in ``free_on_resume`` may differ, and --epochs may grow.
        """
        if saved["script"] != self.script:
            raise InputError(
                f"{path} is a checkpoint of {saved['script']}, not of {self.script}: choose one of this script"
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
            raise InputError(f"{path} was written with {', '.join(differing)}: resume with the same arguments")

    def begin(self):
        """Creates the log, with its first lines, and the checkpoint of the untrained network."""
        header = [repr(self.args), *self.environment_lines()]
        header += [f"# train: {images}" for images in self.state.get("train")]
        header += [f"# test: {images}" for images in self.state.get("test")]
        header += self.described
        header += [repr(net) for net in self.state.get("net")]
        text = "\n".join(header) + "\n"
        self.files.stem = self.processes.from_first(lambda: self.files.create_log(text))
        self.console.start(header, self.files.path(".log"))
        try:
            self.save()
        except BaseException:
            if self.processes.rank == 0:
                self.files.remove_log()
            raise
        self.remember_checkpoint()

    def resume(self, saved, path):
        """Continues the run of the checkpoint ``saved``, read from ``path``."""
        self.files.select(path)
        self.state.restore(saved["state"], path)
        self.position = Position(**{name: saved[name] for name in asdict(Position())})
        self.remember_checkpoint()
        if self.processes.rank > 0:
            return
        if not self.finished() or not self.files.log_begins_with(saved["log"]):
            self.files.restore_log(saved["log"])
        if not self.finished():
            header = [f"# resumed after {self.position_name()}", *self.environment_lines()]
            self.write_log("\n".join(header) + "\n")
            print(f"resuming {path} after {self.position_name()}")
            self.console.start(header, self.files.path(".log"))

    def remember_checkpoint(self):
        """If a process fails and torchrun restarts all of them, they resume this run's checkpoint."""
        self.processes.remember_checkpoint(self.files.path(".pt"))

    def environment_lines(self):
        """The lines of the log that describe how and where this run was made."""
        lines = environment(self.device, self.args.half)
        if self.stage is not None:
            lines.append(f"# processes: {self.processes}, modules {self.stage}")
        elif self.processes.size > 1:
            lines.append(f"# processes: {self.processes}")
        return lines

    # The log

    def log(self, n, epoch, train, test, line=logs.head_line):
        """Logs and prints the result of head ``n`` after ``epoch``. ``train`` and ``test`` are Meters; ``line``, a
        function in decoupled.logs, formats them.
        """
        self.report(line(n, epoch, train.loss, train.top1, test.top1))

    def report(self, line, *comments):
        """Logs and prints ``line``. Logs ``comments`` without printing them."""
        self.write_log("".join(f"{text}\n" for text in (line, *comments)))
        print(line, flush=True)

    def write_log(self, text):
        if self.processes.rank == 0:
            self.files.append_to_log(text)


def file_sha256(path):
    """The SHA-256 of the file at ``path``, in hexadecimal; "" if it does not exist, as in a notebook."""
    if not Path(path).is_file():
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def images_of(batches):
    """The images that ``batches``, possibly a stage's inputs, come from."""
    return getattr(batches, "batches", batches)


def require_one_process(script):
    """Raises InputError if torchrun has started several processes."""
    size = launched().size
    if size > 1:
        raise InputError(f"{script} runs on one process, not on {size}: start it without torchrun")


def existing(args, *names):
    """{name: value} of the arguments called ``names`` that this script has."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
