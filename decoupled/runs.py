"""One run of one experiment: common flags, seed, device, precision, log,
checkpoint and resume. The algorithm stays in the script.

run = Run(parser(__doc__, epochs=50, batch_size=128).parse_args()) for epoch in
run.epochs(net=net, optimizers=optimizers, schedules=schedules, train=train,
test=test):
    for images, labels in run.progress(train): ...
"""

import argparse
import contextlib
import ctypes
import io
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from decoupled import InputError, logs
from decoupled.data import DATASETS, load

WATCH_EVERY = 100  # batches between looks at the losses: each look waits for the device
WHEREABOUTS = ("resume", "log_dir", "data_dir")  # flags that may differ on resume; the images themselves are compared
EXIT_BAD_INPUT = 2


def start(main):
    """Runs a script's ``main``: bad input ends in one line on stderr and exit code 2, Ctrl-C in one line and 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(fail(script, str(error)))
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; --resume continues from the last finished epoch", file=sys.stderr)
        sys.exit(130)


def fail(script, message):
    print(f"{script}: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. Inside the name of a flag, - and _ are the same."""

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([*self.spelled(sys.argv[1:] if args is None else args)], namespace)

    def spelled(self, words):
        """Yields ``words`` with every flag as it was declared; words after "--" are no flags."""
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        words = iter(words)
        for word in words:
            flag, equals, value = word.partition("=")
            yield declared.get(flag.replace("_", "-"), flag) + equals + value if word.startswith("--") else word
            if word == "--":
                yield from words

    def dropped(self, *flags, why):
        """Declares flags of the released scripts that have no effect here: using one is an error that says ``why``."""
        for flag in flags:
            self.add_argument(
                flag, action=Dropped, const=why, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )

    def error(self, message):
        sys.exit(fail(self.prog, f"{message} (--help lists the flags)"))


class Dropped(argparse.Action):
    """A flag that ends in an error: its ``const`` says what does its job here."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}, a flag of the released script, has no effect here: {self.const}")


def whole_number(minimum):
    """An argparse type: a whole number of at least ``minimum``."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}")
        return value

    return convert


def parser(doc, *, epochs, batch_size, test_batch_size=1000, seed=1):
    """The parser of a script whose docstring is ``doc``, with the flags all CIFAR experiments have; a script adds its
    own groups.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=whole_number(1), default=epochs, help="passes over the training images (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size", type=whole_number(1), default=batch_size, help="images a step (default: %(default)s)"
    )
    group.add_argument(
        "--test-batch-size",
        type=whole_number(1),
        default=test_batch_size,
        help="images at once in evaluation (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=seed, help="of initialization, order and augmentation (default: %(default)s)"
    )
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="cifar10", help="(default: %(default)s)")
    group.add_argument(
        "--data-dir", default="data", metavar="DIR", help="where it is, or is downloaded to (default: %(default)s)"
    )
    group.add_argument(
        "--train-samples", type=whole_number(1), metavar="N", help="only the first N training images, for quick looks"
    )
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument("--no-cuda", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    group.add_argument(
        "--half",
        action="store_true",
        help="mixed precision: fp16 with a loss scale for each module on CUDA, bf16 elsewhere",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile each module")
    group = parser.add_argument_group("log and checkpoint")
    group.add_argument("--name", default="", help="part of the log's name")
    group.add_argument(
        "--log-dir", default=".", metavar="DIR", help="where log and checkpoint are written (default: %(default)s)"
    )
    resume = "continue this checkpoint, or this script's newest one of that --name in --log-dir"
    group.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=resume)
    return parser


def pick_device(name):
    """The torch.device called ``name``; auto takes CUDA, then MPS, then the CPU. Raises InputError for one that is not
    there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name} is unknown: choose from auto, cpu, cuda, cuda:N, mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= count:
        raise InputError(
            f"--device {name} is not on this machine ({count} such device{'s' * (count != 1)}): "
            "--device cpu always works"
        )
    return device


def keep_freed_memory():
    """Lets the process keep the memory of freed CPU tensors, in huge pages, for the next step's.

    glibc gives the largest blocks back to the kernel at once, and each step then pays for mapping and clearing them
    again. On two cores the DGL step of learning_curves deals with 465 images/s with this and 407 without in fp32, and
    with as many in bf16, whose blocks are half as large (benchmarks/throughput.py, with and without --plain-malloc). No
    effect on results, nor on other C libraries.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first large allocation
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)


def momentum_from_zeros(optimizer):
    """Gives ``optimizer``, where it is SGD with momentum, buffers of zeros: its first step is the same, bit for bit.

    PyTorch's fused SGD otherwise allocates them in that step without a value, and where fp16's loss scale finds an
    overflow there, the step that would fill them is skipped: the next one adds whatever the memory held.
    """
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class Run:
    """A run of the script that is being executed, with its parsed ``args``: seeds PyTorch, picks device and precision,
    writes log and checkpoint.

    Nothing is written before ``epochs`` starts. Raises InputError for a device that is not there or a folder that
    cannot be written to.
    """

    whereabouts = WHEREABOUTS

    def __init__(self, args):
        self.args = args
        script = Path(sys.argv[0]).resolve()
        self.script = f"{script.parent.name}/{script.name}"
        self.device = pick_device(args.device)
        self.folder = writable_folder(args.log_dir)
        self.epoch = self.stage = self.batch = 0
        self.stages = None
        self.watched = []
        self.scalers = {}
        self.module_of = {}
        keep_freed_memory()
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(args.seed)

    def data(self, **options):
        """(train, test, number of classes) of the data set that the flags name, on the run's device: see
        decoupled.data.load, also for options.
        """
        args = self.args
        sizes = {
            "batch_size": args.batch_size,
            "test_batch_size": args.test_batch_size,
            "train_samples": args.train_samples,
        }
        return load(args.dataset, args.data_dir, **sizes, seed=args.seed, device=self.device, **options)

    # Precision and the step

    def autocast(self):
        """The context for forward passes: mixed precision with --half, no effect otherwise."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.args.half)

    def prepare(self, net):
        """``net`` on the run's device in channels-last memory, its modules compiled with --compile."""
        net.to(self.device, memory_format=torch.channels_last)
        if self.args.compile:
            for module in net:
                module.compile()
        return net

    def scaler(self):
        """A new loss scale for one module, which does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.args.half and self.device.type == "cuda")

    def step(self, loss, optimizer):
        """zero_grad, backward and step of one module; with fp16 through that module's own loss scale."""
        optimizer.zero_grad()
        scaler = self.scalers[id(optimizer)]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        self.watch(loss, self.module_of[id(optimizer)])

    def watch(self, loss, n):
        """Notes the loss of module ``n`` for the check that stops a run whose loss is no longer finite."""
        self.watched.append((self.batch, n, loss.detach()))

    def check_losses(self):
        """Raises InputError, naming module, epoch and batch, for the first loss noted since the last check that is not
        finite.
        """
        if not self.watched:
            return
        finite = torch.stack([loss for _, _, loss in self.watched]).isfinite().tolist()
        if not all(finite):
            batch, n, loss = self.watched[finite.index(False)]
            raise InputError(
                f"the loss of module {n} became {loss.item()} in epoch {self.epoch}, batch {batch}: "
                f"the last good checkpoint stays in {self.path('.pt')}"
            )
        self.watched.clear()

    def progress(self, batches):
        """Iterates over ``batches``, with a progress bar on a terminal, and watches the losses."""
        bar = tqdm(batches, desc=self.where(), leave=False, disable=not sys.stderr.isatty())
        for self.batch, batch in enumerate(bar, start=1):
            yield batch
            if self.batch % WATCH_EVERY == 0:
                self.check_losses()
        self.check_losses()

    def where(self):
        return f"module {self.stage}, epoch {self.epoch}" if self.stages else f"epoch {self.epoch}"

    # Epochs, log and checkpoint

    def epochs(self, stages=None, **state):
        """Yields the epochs left to do, from 1; with ``stages``, (stage, epoch) for each stage from 1 to ``stages`` in
        turn, all epochs each.

        ``state`` is all that must survive: objects with state_dict, or lists of them, under names of your choice
        (optimizers under "optimizers", in the modules' order). It is saved before the first epoch and after each;
        --resume restores it.
        """
        self.stages = stages
        self.state = {key: list(value) if isinstance(value, (list, tuple)) else [value] for key, value in state.items()}
        optimizers = [o for objects in self.state.values() for o in objects if isinstance(o, Optimizer)]
        self.module_of = {id(optimizer): n for n, optimizer in enumerate(optimizers, start=1)}
        self.scalers = {id(optimizer): self.scaler() for optimizer in optimizers}
        for optimizer in optimizers:
            momentum_from_zeros(optimizer)
        self.state["scalers"] = list(self.scalers.values())
        self.stage, self.epoch = 1, 0
        if self.args.resume:
            self.load()
        else:
            self.begin(state)
        while not self.finished():
            if self.epoch == self.args.epochs:
                self.stage, self.epoch = self.stage + 1, 0
            self.epoch += 1
            started = time.perf_counter()
            yield (self.stage, self.epoch) if stages else self.epoch
            self.check_losses()
            self.write(f"# {self.where()} took {time.perf_counter() - started:.2f} s\n")
            self.save()
        print(f"finished: {self.path('.log')}")

    def finished(self):
        return (self.stage, self.epoch) == (self.stages or 1, self.args.epochs)

    def log(self, n, epoch, train, test, line=logs.head_line):
        """Logs head ``n`` after ``epoch``: the Meters of its training and of its evaluation, in a form of ``line``."""
        line = line(n, epoch, train.loss, train.top1, test.top1)
        self.write(line + "\n")
        print(line, flush=True)

    def path(self, suffix):
        return self.folder / (self.stem + suffix)

    def begin(self, state):
        """Creates the log, with its first lines, and the checkpoint of the untrained state."""
        prefix = self.prefix() + datetime.now().strftime("%Y%m%d-%H%M%S")
        header = [
            repr(self.args),
            *self.environment(),
            *(f"# {key}: {state[key]}" for key in ("train", "test") if key in state),
        ]
        header.append(repr(state["net"]) + "\n")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for attempt in range(100):
                self.stem = prefix + (f"-{attempt}" if attempt else "")
                with contextlib.suppress(FileExistsError):
                    self.path(".log").open("x").close()
                    break
        self.write("\n".join(header))
        self.save()

    def prefix(self):
        return "-".join(filter(None, (self.script.removesuffix(".py").replace("/", "-"), self.args.name))) + "-"

    def environment(self):
        """The lines that say how and where this run goes."""
        return environment(self.device, self.args.half)

    def write(self, text):
        """Appends to the log; when that fails (a full disk), the log ends where it did before."""
        with writing(self.path(".log")), open(self.path(".log"), "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            data = text.encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

    def snapshot(self):
        """All that a checkpoint holds, as a dict."""
        return {
            "script": self.script,
            "arguments": vars(self.args),
            "stage": self.stage,
            "epoch": self.epoch,
            "log_bytes": self.path(".log").stat().st_size,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "state": {key: [value.state_dict() for value in values] for key, values in self.state.items()},
        }

    def save(self):
        """Writes the checkpoint under a temporary name, then renames it: at any moment one whole checkpoint is on the
        disk.
        """
        log, buffer = self.path(".log"), io.BytesIO()
        torch.save(self.snapshot(), buffer)
        temporary, target = self.path(".pt.tmp"), self.path(".pt")
        with writing(target):
            try:
                with open(log, "rb") as file:  # the log's lines first: a checkpoint never claims lines that are lost
                    os.fsync(file.fileno())
                with open(temporary, "wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def load(self):
        """Restores the checkpoint that --resume names, and cuts the log back to the lines it knows of."""
        path = Path(self.args.resume) if self.args.resume != "auto" else self.newest()
        checkpoint = read_checkpoint(path)
        if checkpoint["script"] != self.script:
            raise InputError(
                f"{path} is a checkpoint of {checkpoint['script']}, not of {self.script}: name one of this script's"
            )
        self.compare_arguments(path, checkpoint)
        self.folder, self.stem = path.parent, path.name.removesuffix(".pt")
        log = self.path(".log")
        if not log.is_file() or log.stat().st_size < checkpoint["log_bytes"]:
            raise InputError(
                f"{log}, the log of {path.name}, is missing or shortened: put it back beside the checkpoint"
            )
        try:
            for key, objects in self.state.items():
                for value, saved in zip(objects, checkpoint["state"][key], strict=True):
                    value.load_state_dict(saved)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[-1].strip()
            raise InputError(
                f"{path} is a checkpoint of another network ({reason}): name one of this network's"
            ) from error
        torch.set_rng_state(checkpoint["random"])
        if checkpoint["random_cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["random_cuda"], self.device)
        self.restore(checkpoint)
        if not self.finished():
            self.reopen_log(checkpoint)
            print(f"resuming {path} after {self.where()}")

    def reopen_log(self, checkpoint):
        """Cuts the log back to the lines that ``checkpoint`` knows of, and says where the run goes on."""
        log = self.path(".log")
        with writing(log):
            os.truncate(log, checkpoint["log_bytes"])
        self.write("\n".join([f"# resumed after {self.where()}", *self.environment()]) + "\n")

    def restore(self, checkpoint):
        """Goes to the place in training that ``checkpoint`` was saved at."""
        self.stage, self.epoch = checkpoint["stage"], checkpoint["epoch"]

    def newest(self):
        """The newest checkpoint of this script and --name in --log-dir."""
        stamp = "[0-9]" * 8 + "-" + "[0-9]" * 6
        found = [*self.folder.glob(f"{self.prefix()}{stamp}.pt"), *self.folder.glob(f"{self.prefix()}{stamp}-*.pt")]
        if not found:
            raise InputError(
                f"nothing to resume in {self.folder}: no checkpoint is called {self.prefix()}*.pt; "
                "start without --resume"
            )
        return max(found, key=lambda path: path.stat().st_mtime)

    def compare_arguments(self, path, checkpoint):
        """Raises InputError, naming them, when arguments differ from the saved run's in more than a larger --epochs."""
        before, now = checkpoint["arguments"], vars(self.args)
        differing = [key for key in now | before if key not in self.whereabouts and now.get(key) != before.get(key)]
        if "epochs" in differing and now["epochs"] > before["epochs"] and checkpoint["stage"] == 1:
            differing.remove("epochs")
        if differing:
            what = ", ".join(f"--{key.replace('_', '-')} {before.get(key)} (now {now.get(key)})" for key in differing)
            raise InputError(f"{path} is of a run with {what}: resume it with the same arguments")


def read_checkpoint(path):
    """The checkpoint at ``path``. Raises InputError for a file that is missing, truncated or no checkpoint."""
    if not path.is_file():
        raise InputError(f"no checkpoint {path}: --resume without a name takes the newest in --log-dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError, ValueError) as error:
        raise InputError(
            f"{path} is truncated or no checkpoint: resume another one, or start without --resume"
        ) from error
    if not isinstance(checkpoint, dict) or "log_bytes" not in checkpoint:
        raise InputError(f"{path} is no checkpoint of these scripts: name one that a run has left")
    return checkpoint


def writable_folder(name):
    """The folder called ``name``, which may not exist yet. Raises InputError when nothing can be written there."""
    folder = Path(name)
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--log-dir {name} cannot be written to: name a folder that can")
    return folder


@contextlib.contextmanager
def writing(path):
    """Turns a failure to write ``path`` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room or access there, then --resume"
        ) from error


def environment(device, half):
    """The lines that say how and where a command runs: command, versions, commit, device and precision."""
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "numpy"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    precision = {"cuda": "fp16 mixed", "cpu": "bf16 mixed", "mps": "bf16 mixed"}[device.type] if half else "fp32"
    return [
        f"# command: {shlex.join(['python', *sys.argv])}",
        f"# versions: python {platform.python_version()} {packages}",
        f"# commit: {commit()}",
        f"# device: {device.type} ({name}), {torch.get_num_threads()} threads, {precision}",
    ]


def commit():
    """The repository's git commit, with "+" when files differ from it; "unknown" outside a checkout."""

    def git(*words):
        return subprocess.run(
            ("git", "-C", Path(__file__).parent, *words), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
