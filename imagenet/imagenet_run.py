"""What a run on ImageNet needs beyond decoupled.runs: several processes, stopping and resuming in the middle of an
epoch, fp16's loss scales, SGD.

torchrun --nproc-per-node N imagenet/imagenet_dgl.py … shares each mini-batch among N processes, one on each GPU (or N
on the CPU). They hold the same network; DistributedDataParallel around each module adds up that module's gradients as
soon as its own backward pass makes them.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import imagenet_folders
import torch
from global_batch_norm import globalize
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from tqdm import tqdm

from decoupled import InputError, runs
from decoupled.metrics import Meter

TOPK = (1, 5)
DEBUG_BATCHES = 50  # an epoch with --debug 1
APEX = "https://github.com/NVIDIA/apex"


def parser(doc, archs, default):
    """The parser of an ImageNet script whose docstring is ``doc``, with the released scripts' flags that both have, and
    ours.
    """
    parser = runs.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DIR", help="folder with train/ and val/, of one folder a class")
    group = parser.add_argument_group("training")
    group.add_argument("-a", "--arch", choices=archs, default=default, help="(default: %(default)s)")
    group.add_argument(
        "--nepochs",
        "--epochs",
        dest="epochs",
        type=runs.whole_number(1),
        default=50,
        help="passes over the images (default: 50)",
    )
    group.add_argument(
        "--epochdecay",
        type=runs.whole_number(1),
        default=10,
        metavar="N",
        help="lr/10 every N epochs (default: %(default)s)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=runs.whole_number(1),
        default=256,
        help="images a step, of all processes (default: %(default)s)",
    )
    group.add_argument("--lr", "--learning-rate", type=float, default=0.1, help="(default: %(default)s)")
    group.add_argument("--momentum", type=float, default=0.9, help="(default: %(default)s)")
    group.add_argument("--wd", "--weight-decay", type=float, default=1e-4, help="weight decay (default: %(default)s)")
    fused = "torch: PyTorch's own fused step; apex: NVIDIA's apex; none: a plain step (default: %(default)s)"
    group.add_argument("--fused-sgd", choices=("torch", "apex", "none"), default="torch", help=fused)
    group.add_argument(
        "--seed",
        type=runs.whole_number(0),
        default=1,
        help="of initialization, order and augmentation (default: %(default)s)",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "-j",
        "--workers",
        type=runs.whole_number(0),
        default=4,
        help="processes that read images, for each that trains (default: 4)",
    )
    group.add_argument("--image-size", type=runs.whole_number(1), metavar="S", help="side of the crops (default: 224)")
    group.add_argument(
        "--large_size_images", type=int, choices=(0, 1), help="0: crops of 112 pixels, as in the released scripts"
    )
    group.add_argument(
        "--train-samples",
        type=runs.whole_number(1),
        metavar="N",
        help="only N training images, evenly spaced, for quick looks",
    )
    group.add_argument("--val-samples", type=runs.whole_number(1), metavar="N", help="only N images of val/, likewise")
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    group.add_argument(
        "--half",
        action="store_true",
        help="mixed precision: fp16 with a loss scale for each module on CUDA, bf16 elsewhere",
    )
    group.add_argument("--static-loss-scale", type=float, metavar="S", help="of fp16, constant (default: 1)")
    dynamic = "of fp16: as large as gradients allow, whatever the static one"
    group.add_argument("--dynamic-loss-scale", action="store_true", help=dynamic)
    group.add_argument("--compile", action="store_true", help="torch.compile each module")
    group = parser.add_argument_group("several processes (torchrun)")
    group.add_argument(
        "--local-batch-norm",
        action="store_true",
        help="normalize each process's share by itself: faster, and another method for each N",
    )
    group.add_argument(
        "--backend", choices=("nccl", "gloo"), help="of torch.distributed (default: nccl on CUDA, else gloo)"
    )
    group = parser.add_argument_group("log and checkpoint")
    group.add_argument(
        "-p",
        "--print-freq",
        type=runs.whole_number(1),
        default=10,
        metavar="N",
        help="batches between printed lines (default: 10)",
    )
    group.add_argument("--name", default="", help="part of the log's name")
    group.add_argument(
        "--save_folder",
        "--log-dir",
        dest="log_dir",
        default=".",
        metavar="DIR",
        help="of log and checkpoint (default: %(default)s)",
    )
    resume = "continue this checkpoint, or (auto) this script's newest one of that --name in --save_folder"
    group.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=resume)
    debug = f"1: {DEBUG_BATCHES} batches an epoch, a log but no checkpoint (default: %(default)s)"
    group.add_argument("--debug", type=int, choices=(0, 1), default=0, help=debug)
    return parser


def parsed(parser):
    """The arguments, after errors for flags that would do nothing. Sets ``static_loss_scale`` and ``image_size``."""
    args = parser.parse_args()
    if args.image_size and args.large_size_images is not None:
        parser.error("--large_size_images and --image-size both set the size: leave one out")
    if args.debug and args.resume:
        parser.error("--debug 1 leaves no checkpoint to --resume: leave one out")
    args.image_size = args.image_size or (112 if args.large_size_images == 0 else 224)
    del args.large_size_images
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not args.half and (args.dynamic_loss_scale or args.static_loss_scale is not None):
        parser.error("a loss scale is for mixed precision: add --half")
    if processes == 1 and (args.local_batch_norm or args.backend):
        flag = "--local-batch-norm" if args.local_batch_norm else "--backend"
        parser.error(f"{flag} is for several processes: start the script with torchrun --nproc-per-node N")
    args.static_loss_scale = None if args.dynamic_loss_scale else args.static_loss_scale or 1.0
    return args


def sgd(args, module):
    """SGD over ``module``'s parameters, fused as --fused-sgd says. Raises InputError where NVIDIA's apex is asked for
    and is not there.
    """
    settings = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.wd}
    if args.fused_sgd != "apex":
        return SGD(module.parameters(), **settings, fused=args.fused_sgd == "torch")
    try:
        from apex.optimizers import FusedSGD
    except (ImportError, AttributeError, SyntaxError) as error:
        raise InputError(
            f"--fused-sgd apex needs NVIDIA's apex from {APEX}: the PyPI package called apex is another one"
        ) from error
    if not next(module.parameters()).is_cuda:
        raise InputError("--fused-sgd apex needs CUDA: choose --fused-sgd torch")
    return FusedSGD(module.parameters(), **settings)


class ImageNetRun(runs.Run):
    """A run of an ImageNet script, alone or as one of several processes: see decoupled.runs.Run. Process 0 alone
    prints, logs and saves.

    rank, processes  this process's number, and how many there are
    done             mini-batches of the epoch that are learned
    """

    whereabouts = (*runs.WHEREABOUTS, "data", "workers", "print_freq", "backend")

    def __init__(self, args):
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.done, self.weight, self.saved_meters, self.train_meters = 0, 1.0, [], []
        self.mid_epoch, self.signal, self.flags = False, None, None
        super().__init__(args)
        if self.processes > 1:
            self.join()

    def join(self):
        """Meets the other processes. Raises InputError when there are more of them than GPUs."""
        local = int(os.environ["LOCAL_RANK"])
        if self.device.index is not None:
            raise InputError(
                f"--device {self.device} is one device, and each process takes its own: choose "
                f"--device {self.device.type}"
            )
        backend = self.args.backend or ("nccl" if self.device.type == "cuda" else "gloo")
        if self.device.type == "cuda":
            count = torch.cuda.device_count()
            if backend == "nccl" and local >= count:
                raise InputError(
                    f"there are more processes than GPUs ({count}): start fewer, or let them share with --backend gloo"
                )
            self.device = torch.device("cuda", local % count)
            torch.cuda.set_device(self.device)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it lives as long as the process
        distributed.init_process_group(backend, timeout=timedelta(minutes=10))
        self.flags = distributed.new_group(
            backend="gloo", timeout=timedelta(minutes=10)
        )  # for what the CPU decides: no wait for the GPU

    def data(self):
        """(train, val, number of classes): see imagenet_folders.load."""
        args = self.args
        sizes = {
            "train_samples": args.train_samples,
            "val_samples": args.val_samples,
            "image_size": args.image_size,
            "batch_size": args.batch_size,
        }
        where = {
            "workers": args.workers,
            "seed": args.seed,
            "device": self.device,
            "rank": self.rank,
            "processes": self.processes,
        }
        train, val, classes = imagenet_folders.load(args.data, **sizes, **where, least=1 + args.local_batch_norm)
        train.share.limit = DEBUG_BATCHES if args.debug else None
        return train, val, classes

    # The network on several processes

    def prepare(self, net):
        if self.processes > 1 and not self.args.local_batch_norm:
            net = globalize(net, self.device)
        return super().prepare(net)

    def parallel(self, net):
        """What the step calls instead of the modules of ``net``: each in its own DistributedDataParallel, or themselves
        without other processes.

        Parameters and batch norm start the same in all processes and stay the same, so none are broadcast; with
        --local-batch-norm running statistics differ, and those of process 0 are evaluated and saved.
        """
        if self.processes == 1:
            return list(net)
        where = {"device_ids": [self.device.index]} if self.device.type == "cuda" else {}
        return [
            DistributedDataParallel(
                module, **where, broadcast_buffers=self.args.local_batch_norm, gradient_as_bucket_view=True
            )
            for module in net
        ]

    def scaler(self):
        scaling = self.args.half and self.device.type == "cuda"
        initial = {} if self.args.static_loss_scale is None else {"init_scale": self.args.static_loss_scale}
        return torch.amp.GradScaler(self.device.type, enabled=scaling, **initial)

    def step(self, loss, optimizer):
        """zero_grad, backward and step of one module through its own loss scale. Gradients are those of the mean over
        all processes' images.
        """
        optimizer.zero_grad()
        scaler = self.scalers[id(optimizer)]
        scaler.scale(loss * self.weight if self.processes > 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update(self.args.static_loss_scale if scaler.is_enabled() else None)
        self.watch(loss, self.module_of[id(optimizer)])

    # Epochs that may begin and end in the middle

    def epochs(self, **state):
        """As decoupled.runs.Run.epochs. Inside, Ctrl-C and SIGTERM let the batch finish, save and leave."""
        with self.stopping_at_signals():
            try:
                yield from super().epochs(**state)
            finally:
                for batches in (state["train"], state["test"]):
                    batches.close()
        self.leave()

    def meters(self, count):
        """The meters of the epoch's training, one a module: new ones, or after a stop in this epoch those of its first
        part.
        """
        self.train_meters = [Meter(TOPK) for _ in range(count)]
        for meter, state in zip(
            self.train_meters, self.saved_meters, strict=False
        ):  # none are saved at the end of an epoch
            if self.rank:  # process 0 has the sum over all
                state = {
                    "count": 0,
                    "losses": torch.zeros_like(state["losses"]),
                    "hits": torch.zeros_like(state["hits"]),
                }
            meter.load_state_dict(state, self.device)
        self.saved_meters = []
        return self.train_meters

    def training(self, batches):
        """Iterates over what is left of an epoch of ``batches``, this process's shares, prints a line every
        --print-freq and watches the losses.
        """
        batches.share.epoch, batches.share.start = self.epoch, self.done
        size, count = batches.share.batch_size, batches.share.count
        bar = tqdm(
            total=len(batches),
            initial=self.done,
            desc=self.where(),
            leave=False,
            disable=self.rank > 0 or not sys.stderr.isatty(),
        )
        last, waited, images_since = time.perf_counter(), 0.0, 0
        asked = last
        for images, labels in batches:
            waited += time.perf_counter() - asked
            whole = min(size, count - self.done * size)  # images in the mini-batch of all processes
            self.weight = (
                len(labels) * self.processes / whole
            )  # DistributedDataParallel takes the mean over processes, whose shares may differ
            self.batch = self.done + 1
            torch.manual_seed(
                imagenet_folders.mixed(self.args.seed, self.epoch, self.batch, self.rank)
            )  # of what a step draws: dropout
            yield images, labels
            self.done, images_since = self.done + 1, images_since + whole
            bar.update()
            if self.done % self.args.print_freq == 0:
                losses = " ".join(
                    f"{loss.item():.4f}" for _, _, loss in self.watched[-len(self.train_meters) :]
                )  # of this process's share
                now = time.perf_counter()
                seconds = now - last
                share = f"{100 * waited / seconds:.0f} % of the time waiting for them"
                speed = f"{images_since / seconds:.1f} images/s, {share}"
                tqdm.write(f"epoch {self.epoch}, batch {self.done} of {len(batches)}: loss {losses}, {speed}")
                last, waited, images_since = now, 0.0, 0
            if self.done % runs.WATCH_EVERY == 0:
                self.check_losses()
            self.stop_if_asked()
            asked = time.perf_counter()
        bar.close()
        self.check_losses()

    def evaluation(self, batches):
        """Iterates over this process's shares of ``batches``; a stop leaves the evaluation to the resumed run."""
        full, rest = divmod(batches.share.count, batches.share.batch_size)
        common = full + (rest >= self.processes)  # batches of which every process has a share
        if self.args.local_batch_norm:  # one network is evaluated, that of process 0, which is saved
            for net in self.state["net"]:
                for buffer in net.buffers():
                    distributed.broadcast(buffer, 0)
        for number, batch in enumerate(batches, start=1):
            yield batch
            if number <= common:
                self.stop_if_asked()

    def summed(self, meters):
        """``meters`` with what all processes have measured; of batches of this process alone, without others."""
        return [self.over_processes(meter) for meter in meters] if self.processes > 1 else list(meters)

    def over_processes(self, meter):
        """A Meter of the sums over processes, batch by batch; a process that had fewer batches adds nothing to the
        last.
        """
        state = meter.state_dict()
        counts = torch.tensor([state["count"], len(state["losses"])])
        every = [torch.zeros_like(counts) for _ in range(self.processes)]
        distributed.all_gather(every, counts, group=self.flags)
        every = torch.stack(every)
        batches = int(every[:, 1].max())
        total = {"count": int(every[:, 0].sum())}
        for key in ("losses", "hits"):
            values = state[key].cpu()
            total[key] = torch.cat([values, values.new_zeros(batches - len(values), *values.shape[1:])])
            distributed.all_reduce(total[key], group=self.flags)
        result = Meter(meter.topk)
        result.load_state_dict(total, self.device)
        return result

    # Stopping

    @contextlib.contextmanager
    def stopping_at_signals(self):
        def note(number, frame):
            if self.signal is None and not self.rank:
                print(
                    f"\n{signal.Signals(number).name}: finishing this batch, then saving", file=sys.stderr, flush=True
                )
            self.signal = self.signal or number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_asked(self):
        """After a signal to any process, saves and leaves with 128 + its number. All processes call this at the same
        batch.
        """
        asked = self.signal or 0
        if self.processes > 1:
            flag = torch.tensor([asked])
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.flags)
            asked = int(flag)
        if asked:
            self.check_losses()
            self.mid_epoch = True
            place = f"epoch {self.epoch}, batch {self.done}"
            self.save()
            self.leave()
            if not self.rank:
                saved = f"saved in {self.path('.pt')}: --resume auto continues there"
                outcome = "nothing is saved with --debug 1" if self.args.debug else saved
                print(f"{self.script}: stopped after {place}, {outcome}", file=sys.stderr)
            sys.exit(128 + asked)

    def leave(self):
        if self.processes > 1:
            distributed.destroy_process_group()

    # Log and checkpoint

    def begin(self, state):
        if self.rank:
            self.stem = self.prefix().rstrip("-")  # for messages
        else:
            super().begin(state)

    def environment(self):
        lines = super().environment()
        if self.processes > 1:
            norm = "of each process" if self.args.local_batch_norm else "over all"
            lines.append(f"# processes: {self.processes}, {distributed.get_backend()}, batch norm {norm}")
        return lines

    def write(self, text):
        if not self.rank:
            super().write(text)

    def reopen_log(self, checkpoint):
        if not self.rank:
            super().reopen_log(checkpoint)

    def save(self):
        """As decoupled.runs.Run.save; in the middle of an epoch with its place and meters."""
        self.saved = [meter.state_dict() for meter in self.summed(self.train_meters)] if self.mid_epoch else []
        if not self.mid_epoch:
            self.done = 0
        if not self.rank and not self.args.debug:
            super().save()

    def snapshot(self):
        return super().snapshot() | {"epoch": self.epoch - self.mid_epoch, "batch": self.done, "meters": self.saved}

    def restore(self, checkpoint):
        super().restore(checkpoint)
        self.done, self.saved_meters = checkpoint["batch"], checkpoint["meters"]

    def where(self):
        return f"epoch {self.epoch + 1}, batch {self.done}" if self.saved_meters else super().where()
