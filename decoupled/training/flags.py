"""The command line: a parser with the flags that the experiments share, types of numbers, the choice of the device, and
how a script starts and ends.
"""

import argparse
import errno
import math
import os
import sys
import warnings
from pathlib import Path

from decoupled.data.datasets import DATASETS
from decoupled.errors import InputError, one_line
from decoupled.parallel.processes import TIMEOUT
from decoupled.training.console import unfailing_output
from decoupled.training.precision import keep_freed_memory

EXIT_BAD_INPUT = 2


NAME_BYTES = 160  # of a file's 255: the rest is for the script, the time and a suffix


FLOAT_MAX = 3.4e38  # of fp32, in which optimizers compute


MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


WORKERS = ("DataLoader worker", "ancdata", "shared memory", "/dev/shm", "Too many open files")  # ancdata: file numbers


UNUSABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENAMETOOLONG)  # of a file


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)  # what a machine can run out of


def start(main, keep_memory=True):
    """Runs a script's ``main``: what cannot be used, and what the machine has too little of, ends in one line on stderr
    and exit code 2, Ctrl-C in one line and 130. Output that cannot be written ends nothing.

    ``keep_memory``: see decoupled.training.precision.
    """
    if keep_memory:
        keep_freed_memory()
    # A run that resumes in an evaluation steps its schedules before any optimizer, which is right.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step|`broadcast_buffers` is deprecated")
    script = Path(sys.argv[0]).name
    with unfailing_output():
        try:
            main()
        except InputError as error:
            sys.exit(fail(script, str(error)))
        except KeyboardInterrupt:
            print(f"\n{script}: stopped", file=sys.stderr)
            sys.exit(130)
        except (MemoryError, RuntimeError, OSError) as error:
            if (message := shortage(error)) is None:
                raise
            sys.exit(fail(script, message))


def shortage(error):
    """What to say of an exception that means that the machine has too little of something, or a file that cannot be
    used; None for any other.
    """
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any(sign in str(error) for sign in WORKERS):
        why = "the processes that read images were killed, or there is too little memory, /dev/shm or open files"
        return f"{lines[-1]}: {why}: choose fewer -j or a smaller batch, or raise `ulimit -n`, then --resume"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in MEMORY):
        reason = lines[0].split(". You can")[0]
        way_out = "choose a smaller batch or network; --resume goes on from the last checkpoint where there is one"
        return f"out of memory ({reason}): {way_out}"
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        return f"{lines[0]}: make room, or close other programs, then --resume: the last checkpoint stays"
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): give access to it, or name another"
    return None


def fail(script, message):
    """The exit code for bad input, after ``message``."""
    print(f"{script}: error: {one_line(message)}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts end with the flag's default, where it has one."""

    def _get_help_string(self, action):
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == ""
        return action.help if hidden or "default" in action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is its text as it stands and whose errors are one line. Inside the name of a flag,
    - and _ are the same.
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help)

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
            hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            self.add_argument(flag, action=Dropped, const=why, nargs="?", **hidden)

    def error(self, message):
        sys.exit(fail(self.prog, f"{message} (--help lists the flags)"))


class Dropped(argparse.Action):
    """A flag that ends in an error: its ``const`` says what does its job here."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}, a flag of the released script, has no effect here: {self.const}")


def integer(least, most=2**63 - 1):
    """An argparse type: an integer from ``least`` to ``most``."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer ≥ {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer ≤ {most}")
        return value

    return convert


WIDTH = integer(1, 2**13)  # channels: wider ones' weights alone would not fit a machine


LAYERS = integer(0, 1000)


def path(text):
    """An argparse type: a path, in which ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path names nothing")
    return os.path.expanduser(text)


def run_name(text):
    """An argparse type: a part of a file's name."""
    if "/" in text or os.sep in text or not all(map(str.isprintable, text)) or len(os.fsencode(text)) > NAME_BYTES:
        raise argparse.ArgumentTypeError(
            f"{one_line(text)[:80]!r} must be printable text without /, of at most {NAME_BYTES} bytes"
        )
    return text


def number(*, least=-math.inf, above=-math.inf, below=FLOAT_MAX):
    """An argparse type: a finite number ≥ ``least``, > ``above`` and < ``below``."""

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value >= least and above < value < below):
            limits = {"≥": least, ">": above, "<": below}
            told = math.inf if value >= FLOAT_MAX else FLOAT_MAX
            wanted = " and ".join(f"{sign} {limit:g}" for sign, limit in limits.items() if abs(limit) < told)
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {wanted or 'that is finite'}")
        return value

    return convert


def integers(text):
    """An argparse type: integers ≥ 1 with commas between them, as a list."""
    return [integer(1)(word) for word in text.split(",")]


def parser(doc, *, epochs, batch_size, lr=0.1, test_batch_size=1000, seed=1, distributed=False):
    """The parser of a script whose docstring is ``doc``, with the flags that all CIFAR experiments have; with
    ``distributed``, those of a script whose modules learn in several processes too. A script adds its own groups.
    """
    parser, count = Parser(doc), integer(1)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count, default=epochs, help="passes over the training images")
    group.add_argument("--batch-size", type=count, default=batch_size, help="images a step")
    group.add_argument("--test-batch-size", type=count, default=test_batch_size, help="images at once in evaluation ")
    group.add_argument("--lr", type=number(above=0), default=lr, help="learning rate at first")
    add_seed(group, seed)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="cifar10", help="images")
    group.add_argument("--data-dir", type=path, default="data", metavar="DIR", help="where it is, or is downloaded to")
    group.add_argument("--train-samples", type=count, metavar="N", help="only the first N training images")
    validation = "hold out N training images, and evaluate on these instead of the test set"
    group.add_argument("--validation", type=integer(0), default=0, metavar="N", help=validation)
    add_device(parser)
    if distributed:
        add_stages(add_processes(parser, "several processes: torchrun --nproc-per-node K"))
    add_log(parser)
    return parser


def add_stages(group):
    cut = "modules of each stage, from the image up; by default the FLOPs of the busiest are fewest"
    group.add_argument("--modules-per-stage", type=integers, metavar="N,N,…", help=cut)
    queue = "mini-batches that wait between two processes before the lower one does"
    group.add_argument("--queue", type=integer(1), default=2, metavar="N", help=queue)


def add_processes(parser, title):
    group = parser.add_argument_group(title)
    patience = "until a process that waits for another gives up"
    group.add_argument("--timeout", type=number(above=0, below=1e7), default=TIMEOUT, metavar="SECONDS", help=patience)
    backend = "of torch.distributed (default: nccl on CUDA, else gloo)"
    group.add_argument("--backend", choices=("nccl", "gloo"), help=backend)
    return group


DEVICE = "auto, cpu, cuda, cuda:N or mps "


HALF = "mixed precision: fp16 with a loss scale for each module on CUDA, bf16 elsewhere"


def add_seed(group, seed):
    most = 2**63 - 1
    group.add_argument("--seed", type=integer(0, most), default=seed, help="of initialization, order and crops ")


def add_device(parser):
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help=DEVICE)
    group.add_argument("--no-cuda", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    group.add_argument("--half", action="store_true", help=HALF)
    group.add_argument("--compile", action="store_true", help="torch.compile each module; CUDA graphs on CUDA")
    exact = "on CUDA: the same bits each time, resumed or not, by slower kernels"
    # No default: a run that was begun before this flag existed has none either, and resumes.
    group.add_argument("--deterministic", action="store_true", default=argparse.SUPPRESS, help=exact)
    return group


def add_log(parser, *names):
    """The flags of log and checkpoint; ``names`` are further names of --log-dir, the first of which comes first."""
    group = parser.add_argument_group("log and checkpoint")
    group.add_argument("--name", type=run_name, default="", help="part of the log's name")
    where = {"dest": "log_dir", "type": path, "default": ".", "metavar": "DIR"}
    group.add_argument(*names, "--log-dir", **where, help="where log and checkpoint are written")
    minutes = "minutes between checkpoints within an epoch, which has one at its end too "
    group.add_argument("--save-every", type=number(above=0), default=10.0, metavar="MINUTES", help=minutes)
    resume = "continue this checkpoint; without one, or with auto, this script's newest of that --name in --log-dir"
    group.add_argument("--resume", nargs="?", type=path, const="newest", metavar="CHECKPOINT", help=resume)
    return group
