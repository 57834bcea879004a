"""Classifies images with a trained network, and measures early exits:

python -m decoupled predict CHECKPOINT cat.png dog.png --early-exit 0.9
python -m decoupled predict CHECKPOINT DIR
python -m decoupled predict CHECKPOINT

CHECKPOINT is a run's .pt file, or a folder, whose newest run is used (by the
time in its name). For each image, this prints the class, the confidence (the
softmax of the head's logits), the head, and the FLOPs saved, in % of the FLOPs
of all bodies and the last head. With --early-exit, an image leaves at the first
head that is confident enough. It passes the lower heads as well, so an image
that leaves at the last head costs more than without early exit.

With a folder of labeled images, DIR/<class>/<image>, or without images, when the
run's own test set is used, this prints the top-1 accuracy and the average FLOPs
if all images leave at the same head, and if they leave at different confidences.
--output draws them, and writes the numbers beside the figure.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import pandas as pd
import torch
from matplotlib.figure import Figure

from decoupled.analysis.plots import STYLE, figure_path, styles
from decoupled.data.batches import Batches
from decoupled.data.datasets import load as load_images
from decoupled.data.folders import list_images
from decoupled.errors import InputError, writing
from decoupled.logs import newest
from decoupled.networks.flops import count_flops
from decoupled.networks.modules import DecoupledNetwork, eval_mode
from decoupled.training import flags, loading
from decoupled.training.device import pick_device

CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
BATCH_SIZE = 100


def parse_args():
    parser = flags.Parser(__doc__)
    parser.prog = "python -m decoupled predict"
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=flags.path,
        help="a run's .pt file, or a folder, whose newest run is used",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", type=flags.path, help="image files, or one folder DIR/<class>/<image>"
    )
    parser.add_argument(
        "--heads", metavar="all|N", help="the head that classifies, counted from 1, or all (default: the last)"
    )
    parser.add_argument(
        "--early-exit",
        type=flags.number(least=0),
        metavar="CONFIDENCE",
        help="let each image leave at the first head with at least this confidence, from 0 to 1",
    )
    parser.add_argument("--data-dir", type=flags.path, metavar="DIR", help="the folder that has the run's data set now")
    parser.add_argument(
        "--output",
        type=figure_path,
        metavar="PNG",
        help="draw accuracy against FLOPs; the numbers are written to a .csv file beside the figure",
    )
    parser.add_argument(
        "--script", type=flags.path, metavar="PY", help="the run's script, if it is not in this repository"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args()
    if args.early_exit is not None and args.heads:
        parser.error("--early-exit chooses each image's head: leave out --heads")
    if args.early_exit is not None and args.early_exit > 1:
        parser.error(f"--early-exit {args.early_exit:g}: a confidence is at most 1")
    folders = [name for name in args.images if Path(name).is_dir()]
    if folders and len(args.images) > 1:
        parser.error(f"{folders[0]} is a folder: name only this folder, or only image files")
    args.labeled = bool(folders) or not args.images
    if args.output and not args.labeled:
        parser.error(
            "--output is for labeled images: name a folder DIR/<class>/<image>, or nothing for the run's test set"
        )
    if args.heads and args.labeled:
        parser.error("--heads is for image files: with labeled images every head's accuracy is printed")
    return args


# Early exits


@torch.inference_mode()
def early_exit(net, images, confidence):
    """Lets each image leave the DecoupledNetwork ``net`` at the first head whose softmax has a probability of at least
    ``confidence``, or else at the last head. Each module runs only on the images that have not left yet.

    images (B, C, h, w) → logits (B, classes), heads (B,) counted from 0.
    """
    last = len(net) - 1
    staying = torch.arange(len(images), device=images.device)
    heads = torch.full((len(images),), last, device=images.device)
    logits = None
    representation = images
    with eval_mode(net):
        for index, module in enumerate(net):
            representation, logits_here = module(representation)
            if logits is None:
                logits = logits_here.new_empty(len(images), logits_here.shape[1])
            logits[staying] = logits_here
            leaving = is_confident(logits_here, confidence)
            heads[staying[leaving]] = index
            staying = staying[~leaving]
            representation = representation[~leaving]
            if len(staying) == 0:
                break
    return logits, heads


def is_confident(logits, confidence):
    """Whether the softmax of ``logits`` (B, classes) has a probability of at least ``confidence``: (B,) bool."""
    return logits.float().softmax(1).amax(1) >= confidence


def exit_heads(every_logits, confidence):
    """The heads (B,), counted from 0, at which images leave. ``every_logits``: a list of all heads' logits (B,
    classes).
    """
    heads = torch.full((len(every_logits[-1]),), len(every_logits) - 1)
    for index in reversed(range(len(every_logits) - 1)):
        heads[is_confident(every_logits[index], confidence)] = index
    return heads


class ExitFlops(NamedTuple):
    """FLOPs of one image that leaves at each head.

    alone  of the bodies up to that head, and of that head alone
    early  of the bodies up to that head and all heads on the way, which an image that may leave early passes
    """

    alone: list
    early: list


@torch.no_grad()
def exit_flops(net, image):
    """The ExitFlops of ``image`` (1, C, h, w)."""
    with eval_mode(net), without_attention_fast_path():
        if not isinstance(net, DecoupledNetwork):
            flops = [count_flops(lambda: net(image))]
            return ExitFlops(flops, flops)
        alone = [count_flops(lambda n=n: net(image, heads=[n])) for n in range(len(net))]
        early = [count_flops(lambda n=n: net(image, heads=range(n + 1))) for n in range(len(net))]
    return ExitFlops(alone, early)


@contextmanager
def without_attention_fast_path():
    """Turns off nn.MultiheadAttention's fused operation for evaluation, whose FLOPs PyTorch does not count."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def count_heads(net):
    """The number of heads of ``net``: one per module of a DecoupledNetwork, otherwise one."""
    return len(net) if isinstance(net, DecoupledNetwork) else 1


def every_head(net, images):
    """A list of the logits (B, classes) of every head of ``net``, which may return a list or one tensor."""
    logits = net(images)
    return [logits] if isinstance(logits, torch.Tensor) else logits


# Image files


def predict_images(net, form, args):
    """Prints a line for each image and each head in --heads."""
    heads = chosen_heads(args.heads, count_heads(net))
    images = [as_batch(form.read(path)[None], form, args.device) for path in args.images]
    flops = exit_flops(net, images[0])
    for path, image in zip(args.images, images, strict=True):
        if args.early_exit is not None:
            logits, head_of_image = early_exit(net, image, args.early_exit)
            head = head_of_image.item()
            print_prediction(path, form, logits, head, flops.early[head] / flops.alone[-1])
            continue
        with torch.inference_mode():
            every_logits = every_head(net, image)
        for head in heads:
            print_prediction(path, form, every_logits[head], head, flops.alone[head] / flops.alone[-1])


def print_prediction(path, form, logits, head, cost):
    """Prints what ``head`` predicts for the image at ``path``. ``cost``: its FLOPs as a fraction of the last head's."""
    confidence, label = logits.float().softmax(1)[0].max(0)
    saved = 100 * (1 - cost)
    print(f"{path}: {form.classes[label]}, {confidence:.3f}, head {head + 1}, {saved:.1f} % of FLOPs saved")


def chosen_heads(heads, count):
    """The heads, counted from 0, that --heads names; without --heads, the last."""
    if heads is None:
        return [count - 1]
    if heads == "all":
        return list(range(count))
    if not heads.isdecimal() or not 1 <= int(heads) <= count:
        raise InputError(f"--heads {heads}: choose all, or one from 1 to {count}")
    return [int(heads) - 1]


def as_batch(images, form, device):
    """uint8 (B, s, s, 3) → the network's input (B, 3, s, s) on ``device``."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    ((batch, _),) = Batches(images, labels, len(images), mean=form.mean, std=form.std, device=device)
    return batch


# Labeled images


def evaluate_labeled(net, form, saved, args):
    """Prints top-1 and FLOPs at each head and each confidence, and draws them with --output."""
    if args.images:
        folder = Path(args.images[0])
        listing = list_images(folder, f"labeled images are {folder}/<class>/<image>")
        batches = labeled_batches(match_classes(listing, folder, form), form, args.device)
        description = f"{folder}{listing.describe_left_out(folder)}"
    else:
        batches = own_test_set(saved, form, args.data_dir, args.device)
        description = batches.description
    confidences = CONFIDENCES if args.early_exit is None else [args.early_exit]
    frame = evaluate_exits(net, batches, confidences)
    title = f"{saved['script']}, {frame.attrs['images']} images of {description}"
    print(title)
    print(frame.to_string(index=False, float_format="{:.4g}".format))
    if args.output:
        figure = Path(args.output)
        table = figure.with_suffix(".csv")
        with writing(figure, "name another --output, or make room or access there"):
            exits_figure(frame, title).savefig(figure, dpi=110)
            frame.to_csv(table, index=False, float_format="%.6g")
        print(f"figure: {figure}, numbers: {table}")


def match_classes(listing, folder, form):
    """[(path, label)] of ``listing``, a decoupled.data.folders.Listing of ``folder``, with the network's labels,
    matched by class name. Raises InputError for a class that the network does not have.
    """
    for name in listing.classes:
        if name not in form.classes:
            some = ", ".join(form.classes[:10])
            raise InputError(f"{folder / name} is not a class of the network: {some}, …")
    return [(path, form.classes.index(listing.classes[label])) for path, label in listing.samples]


def labeled_batches(samples, form, device):
    """Yields mini-batches of ``samples``, [(path, label)], in the ``form`` of the network's input: images (B, 3, s, s)
    and labels (B,).
    """
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        images = torch.stack([form.read(path) for path, _ in batch])
        labels = torch.tensor([label for _, label in batch])
        yield as_batch(images, form, device), labels


def own_test_set(saved, form, data_dir, device):
    """The test set of the run that saved the checkpoint ``saved``, as Batches.

    Raises InputError if its classes are not the network's, and prints a note if the run was tested on other images.
    """
    arguments = saved["arguments"]
    if "dataset" not in arguments:
        raise InputError(
            "the checkpoint does not say where this run's test images are: name images, or DIR/<class>/<image>"
        )
    data_dir = data_dir or arguments["data_dir"]
    _, test, _ = load_images(arguments["dataset"], data_dir, batch_size=2, drop_last=True)
    if test.form.classes != form.classes:
        changed = sorted(set(test.form.classes) ^ set(form.classes))
        difference = f"{changed[0]!r} is only in one of them" if changed else "their order differs"
        raise InputError(
            f"the classes of {arguments['dataset']} in {data_dir} are not those that the network was trained on "
            f"({difference}): name a folder DIR/<class>/<image>, whose classes are matched by name"
        )
    if arguments.get("validation"):
        print("note: the run was evaluated on training images that it held out; this is the test set", file=sys.stderr)
    elif tested_fingerprint(saved) not in (None, test.fingerprint):
        print(f"note: the test images in {data_dir} are not those that the run was tested on", file=sys.stderr)
    return Batches(
        test.images,
        test.labels,
        BATCH_SIZE,
        mean=form.mean,
        std=form.std,
        description=f"{test.description}, the test set",
        device=device,
    )


def tested_fingerprint(saved):
    """The fingerprint of the images that the run was tested on (see Batches), or None if its checkpoint has none."""
    states = saved["state"].get("test")
    return states[0].get("fingerprint") if states else None


@torch.inference_mode()
def evaluate_exits(net, batches, confidences=CONFIDENCES):
    """Measures accuracy and cost if all images leave at one head, for each head, and if they leave early, for each of
    ``confidences``: a pandas data frame with the columns

    exit            "head" or "early"
    at              the head, counted from 1, or the confidence
    top1            %
    gflops          average per image
    saved           % of the FLOPs of the last head alone
    left1, left2, … % of the images that leave at each head

    ``frame.attrs["images"]`` is the number of images.
    """
    batches_of_logits = []
    batches_of_labels = []
    with eval_mode(net):
        for images, labels in batches:
            batches_of_logits.append([logits.float().cpu() for logits in every_head(net, images)])
            batches_of_labels.append(labels.cpu())
    every_logits = [torch.cat(logits) for logits in zip(*batches_of_logits, strict=True)]
    labels = torch.cat(batches_of_labels)
    flops = exit_flops(net, images[:1])
    correct = torch.stack([logits.argmax(1) == labels for logits in every_logits])
    rows = []
    for index in range(len(every_logits)):
        scores = exit_scores(torch.full_like(labels, index), correct, flops.alone, flops.alone[-1])
        rows.append({"exit": "head", "at": index + 1, **scores})
    if len(every_logits) > 1:
        for confidence in confidences:
            scores = exit_scores(exit_heads(every_logits, confidence), correct, flops.early, flops.alone[-1])
            rows.append({"exit": "early", "at": confidence, **scores})
    frame = pd.DataFrame(rows)
    frame.attrs["images"] = len(labels)
    return frame


def exit_scores(heads, correct, flops, flops_of_all):
    """Accuracy and cost if image i leaves at ``heads``[i]: {column: value} of evaluate_exits.

    ``correct`` (number of heads, N) is whether each head classifies each image correctly, ``flops`` the cost of leaving
    at each head, and ``flops_of_all`` the cost of all bodies and the last head.
    """
    shares = torch.bincount(heads, minlength=len(correct)).double() / len(heads)
    average = (shares * torch.tensor(flops, dtype=torch.float64)).sum().item()
    scores = {
        "top1": 100 * correct.gather(0, heads[None]).double().mean().item(),
        "gflops": average / 1e9,
        "saved": 100 * (1 - average / flops_of_all),
    }
    for n, share in enumerate(shares.tolist(), start=1):
        scores[f"left{n}"] = 100 * share
    return scores


def exits_figure(frame, title):
    """A figure of accuracy against average FLOPs. ``frame`` comes from evaluate_exits."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
    early_label = "early exit at confidence c"
    head_label = "all at head n"
    looks = styles((early_label, head_label))
    early = frame[frame["exit"] == "early"]
    heads = frame[frame["exit"] == "head"]
    axes.plot(early["gflops"], early["top1"], label=early_label, linestyle="-", **looks[early_label])
    axes.plot(heads["gflops"], heads["top1"], label=head_label, linestyle="", **looks[head_label])
    annotate(axes, early, above=4)
    annotate(axes, heads, above=-11)
    axes.set(xscale="log", xlabel="average GFLOP per image", ylabel="top-1 (%)", title=title)
    axes.title.set_fontsize(9)
    axes.legend(loc="lower right")
    return figure


def annotate(axes, rows, above):
    """Writes each row's "at" next to its point, ``above`` points higher; skips labels that would overlap the previous
    one.
    """
    last = None
    for row in rows.itertuples():
        if last is not None and last.top1 == row.top1 and row.gflops < 1.2 * last.gflops:
            continue
        last = row
        axes.annotate(f"{row.at:g}", (row.gflops, row.top1), xytext=(4, above), textcoords="offset points", fontsize=7)


# The command


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    path = find_checkpoint(Path(args.checkpoint))
    saved = loading.read(path)
    form = loading.input_form(saved, path)
    net = loading.rebuild(saved, path, script=args.script, device=args.device)
    if not saved["finished"]:  # some heads may not have learned yet
        print(f"note: the run of {path} is not finished: it is in epoch {saved['epoch']}", file=sys.stderr)
    if args.early_exit is not None and count_heads(net) == 1:
        raise InputError(f"--early-exit: the network in {path} has one head, so no image can leave early")
    if args.labeled:
        evaluate_labeled(net, form, saved, args)
    else:
        predict_images(net, form, args)


def find_checkpoint(path):
    """``path`` itself or, if it is a folder, the checkpoint of its newest run: see decoupled.logs.newest."""
    if not path.is_dir():
        return path
    checkpoint = newest(path.glob("*.pt"))
    if checkpoint is None:
        raise InputError(f"there is no checkpoint in {path}")
    print(f"checkpoint: {checkpoint}", file=sys.stderr)
    return checkpoint
