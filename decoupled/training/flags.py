"""The command line of a script: how it starts and ends, a parser with the flags that all experiments share, and types
of flags.
"""

import argparse
import errno
import math
import os
import sys
import warnings
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from decoupled.data.datasets import DATASETS
from decoupled.errors import EXIT_BAD_INPUT, InputError, one_line
from decoupled.parallel.processes import TIMEOUT
from decoupled.training.console import broken_pipes_ignored, is_first_process
from decoupled.training.device import keep_freed_memory

EXIT_CTRL_C = 130

MAX_NAME_BYTES = 160  # file names have at most 255 bytes; script, time and suffix need the rest
FLOAT_MAX = 3.4e38  # the largest fp32 number: optimizers compute in fp32
INTEGER_MAX = 2**63 - 1

# The messages of PyTorch's allocators when memory runs out. On the CPU they are in an ordinary RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")

# How a script starts and ends


def start(main, keep_memory=True):
    """Runs the function ``main`` of a script. InputError, too little memory or a full disk end the script with a
    one-line message and exit code 2, Ctrl-C with a one-line message and exit code 130. Other errors show a
    traceback.

    ``keep_memory``: see decoupled.training.device.keep_freed_memory.
    """
    if keep_memory:
        keep_freed_memory()
    # A run that resumes during an evaluation correctly steps its schedules before any optimizer.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # by DistributedDataParallel
    with broken_pipes_ignored():
        try:
            record(main)()  # so that torchrun shows the exception of the process that failed first
        except InputError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
            sys.exit(EXIT_CTRL_C)
        except (MemoryError, RuntimeError, OSError) as error:
            message = shortage(error)
            if message is None:
                raise
            fail(message)


def fail(message):
    """Exits with one line on stderr and the exit code for bad input."""
    print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def shortage(error):
    """The message for an exception caused by too little memory or a full disk; None for any other exception."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: free some space, then --resume: the last checkpoint is intact"
    out_of_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if out_of_memory or any(text in str(error) for text in OUT_OF_MEMORY):
        first_line = str(error).strip().partition("\n")[0]
        reason = first_line.partition(". You can")[0] or type(error).__name__
        return f"out of memory ({reason}): choose a smaller batch or network, then --resume if there is a checkpoint"
    return None


# The parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default of a flag, if there is one, to its help text."""

    def _get_help_string(self, action):
        has_default = not (
            action.default is None
            or action.default is False
            or action.default == ""
            or action.default is argparse.SUPPRESS
        )
        if "default" in action.help or not has_default:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps line breaks in its description and prints errors in one line. Flags may be spelled
    with "-" or "_".
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.as_declared(words), namespace)

    def as_declared(self, words):
        """``words`` with each flag spelled as declared. Words after "--" are not flags."""
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled = []
        for position, word in enumerate(words):
            if word == "--":
                return spelled + list(words[position:])
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                flag = declared.get(flag.replace("_", "-"), flag)
                word = flag + equals + value
            spelled.append(word)
        return spelled

    def add_dropped(self, *flags, why):
        """Adds flags of the released scripts that have no effect here. Using one is an error that says ``why``."""
        for flag in flags:
            self.add_argument(
                flag, action=DroppedFlag, const=why, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )

    def error(self, message):
        if not is_first_process():  # all processes of torchrun have the same error
            sys.exit(EXIT_BAD_INPUT)
        fail(f"{message} (--help lists the flags)")


class DroppedFlag(argparse.Action):
    """A flag that is always an error; its ``const`` says why."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}, a flag of the released script, has no effect here: {self.const}")


# Types of flags


def integer(least, most=INTEGER_MAX):
    """An argparse type: an integer between ``least`` and ``most``."""

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


WIDTH = integer(1, 2**13)  # number of channels; the weights of wider layers would not fit into memory
LAYERS = integer(0, 1000)


def integers(text):
    """An argparse type: integers ≥ 1 separated by commas, as a list."""
    return [integer(1)(word) for word in text.split(",")]


def number(*, least=-math.inf, above=-math.inf, below=FLOAT_MAX):
    """An argparse type: a finite number ≥ ``least``, > ``above`` and < ``below``."""

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value >= least and above < value < below:
            return value
        limits = []  # the message has the limits that were set, and the largest float only if it is exceeded
        if least > -math.inf:
            limits.append(f"≥ {least:g}")
        if above > -math.inf:
            limits.append(f"> {above:g}")
        if below < FLOAT_MAX or value >= FLOAT_MAX:
            limits.append(f"< {below:g}")
        raise argparse.ArgumentTypeError(f"{text!r} must be a number {' and '.join(limits) or 'that is finite'}")

    return convert


def path(text):
    """An argparse type: a path, in which ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("path must not be empty")
    return os.path.expanduser(text)


def run_name(text):
    """An argparse type: text that can be part of a file name."""
    if "/" in text or os.sep in text or not text.isprintable() or len(os.fsencode(text)) > MAX_NAME_BYTES:
        raise argparse.ArgumentTypeError(
            f"{one_line(text)[:80]!r} must be printable text without /, of at most {MAX_NAME_BYTES} bytes"
        )
    return text


# The shared flags


def parser(doc, *, epochs, batch_size, lr=0.1, test_batch_size=1000, seed=1, distributed=False, own_data=False):
    """A parser with the flags that all CIFAR experiments share. ``doc`` is the docstring of the script, which adds its
    own groups of flags.

    With ``distributed``, there are also the flags for training modules in several processes. With ``own_data``,
    --workers replaces the flags that choose a data set.
    """
    parser = Parser(doc)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=integer(1), default=epochs, help="passes over the training data")
    group.add_argument("--batch-size", type=integer(1), default=batch_size, help="samples per step")
    group.add_argument(
        "--test-batch-size", type=integer(1), default=test_batch_size, help="samples per batch in evaluation"
    )
    group.add_argument("--lr", type=number(above=0), default=lr, help="initial learning rate")
    add_seed(group, seed)
    if own_data:
        add_workers(parser)
    else:
        add_datasets(parser)
    add_device(parser)
    if distributed:
        group = add_processes(parser, "several processes: torchrun --nproc-per-node K")
        add_stages(group)
    add_log(parser)
    return parser


def add_workers(parser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--workers",
        type=integer(0, 1024),
        default=0,
        metavar="N",
        help="processes that read samples; 0: the training process reads them",
    )


def add_datasets(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set; folder: your own images")
    group.add_argument(
        "--data-dir", type=path, default="data", metavar="DIR", help="where the data set is, or is downloaded to"
    )
    group.add_argument("--train-samples", type=integer(1), metavar="N", help="use only the first N training images")
    group.add_argument(
        "--validation",
        type=integer(0),
        default=0,
        metavar="N",
        help="hold out N training images and evaluate on them instead of the test set",
    )


def add_seed(group, seed):
    group.add_argument("--seed", type=integer(0), default=seed, help="random seed")


def add_device(parser):
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--no-cuda", dest="device", action="store_const", const="cpu", help="same as --device cpu")
    group.add_argument(
        "--half",
        action="store_true",
        help="mixed precision: fp16 with a loss scale for each module on CUDA, bf16 elsewhere",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile each module with torch.compile; on CUDA, to CUDA graphs"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        default=argparse.SUPPRESS,  # in the log only if given, because logs of earlier versions do not have it
        help="deterministic CUDA kernels (slower)",
    )
    return group


def add_processes(parser, title):
    group = parser.add_argument_group(title)
    group.add_argument(
        "--timeout",
        type=number(above=0, below=1e7),
        default=TIMEOUT,
        metavar="SECONDS",
        help="seconds to wait for another process before giving up",
    )
    group.add_argument(
        "--backend", choices=("nccl", "gloo"), help="backend of torch.distributed (default: nccl on CUDA, else gloo)"
    )
    return group


def add_stages(group):
    group.add_argument(
        "--modules-per-stage",
        type=integers,
        metavar="N,N,…",
        help="number of modules of each stage, lowest first (default: balanced by FLOPs)",
    )
    group.add_argument(
        "--queue",
        type=integer(1),
        default=2,
        metavar="N",
        help="max mini-batches in flight between stages",
    )


def add_log(parser, *names):
    """Adds the flags for log and checkpoint. ``names`` are other names for --log-dir, listed first by --help."""
    group = parser.add_argument_group("log and checkpoint")
    group.add_argument("--name", type=run_name, default="", help="added to the names of log and checkpoint")
    group.add_argument(
        *names,
        "--log-dir",
        dest="log_dir",
        type=path,
        default=".",
        metavar="DIR",
        help="where log and checkpoint are written",
    )
    group.add_argument(
        "--save-every",
        type=number(above=0),
        default=10.0,
        metavar="MINUTES",
        help="minutes between checkpoints within an epoch; there is always one at its end",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        type=path,
        const="newest",
        metavar="CHECKPOINT",
        help="resume this checkpoint; without a name, the newest of this script and --name in --log-dir; with auto, "
        "the same, or a new run if there is none",
    )
    return group
