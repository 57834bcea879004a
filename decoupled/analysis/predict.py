"""What a trained network says of images, and what leaving it early saves.

    python -m decoupled predict CHECKPOINT cat.png dog.png --early-exit 0.9
    python -m decoupled predict CHECKPOINT DIR
    python -m decoupled predict CHECKPOINT

CHECKPOINT is a run's .pt file, or a folder, whose newest is taken. For each
image: class, confidence (the softmax of the head's logits), head, and FLOPs
saved, in % of those of all bodies and the last head. With --early-exit an image
leaves at the first head whose confidence is high enough; it has passed the
heads below as well, so leaving at the last one saves less than nothing.

On labeled images, DIR/<class>/<image> or without either the run's own test set:
top-1 and average FLOPs of leaving at each head, and at each confidence.
--output draws them, and writes the numbers beside the figure.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from decoupled.analysis.plots import STYLE, styles
from decoupled.data.batches import Batches
from decoupled.data.datasets import load as load_images
from decoupled.errors import InputError
from decoupled.networks.flops import count_flops
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork, eval_mode
from decoupled.training import checkpoint as checkpoints
from decoupled.training import checkpoint as loading
from decoupled.training import flags

CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


BATCH = 100  # images at once


def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's .pt file, or a folder: its newest")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="image files, or one folder DIR/<class>/<image>")
    parser.add_argument("--heads", metavar="all|N", help="which heads say what they see, from 1 (default: the last)")
    confidence = "leave at the first head that is so sure, from 0 to 1"
    parser.add_argument("--early-exit", type=flags.number(least=0), metavar="CONFIDENCE", help=confidence)
    parser.add_argument("--data-dir", metavar="DIR", help="where the run's own test set is now")
    parser.add_argument("--output", metavar="PNG", help="figure of accuracy against FLOPs; the numbers go to .csv")
    parser.add_argument("--script", metavar="PY", help="the script of the run, when it is not in this repository")
    parser.add_argument("--device", default="auto", help=flags.DEVICE)
    args = parser.parse_args(argv)
    if args.early_exit is not None and args.heads:
        parser.error("--early-exit chooses each image's head: leave out --heads")
    if args.early_exit is not None and args.early_exit > 1:
        parser.error(f"--early-exit {args.early_exit:g}: a confidence is at most 1")
    folders = [name for name in args.images if Path(name).is_dir()]
    if folders and len(args.images) > 1:
        parser.error(f"{folders[0]} is a folder: name it alone, or image files")
    args.labeled = not args.images or bool(folders)
    if args.output and not args.labeled:
        parser.error("--output is for labeled images: name a folder DIR/<class>/<image>, or none")
    if args.heads and args.labeled:
        parser.error("--heads is for image files: of labeled images every head's accuracy is printed")
    return args


# Leaving early


@torch.inference_mode()
def early_exit(net, images, confidence):
    """(logits (B, classes), heads (B,) from 0): each image leaves the DecoupledNetwork ``net`` at the first head whose
    softmax has a probability of at least ``confidence``, the rest at the last. Modules above run on what is left.
    """
    staying, representation = torch.arange(len(images), device=images.device), images
    heads = torch.full((len(images),), len(net) - 1, device=images.device)
    logits = None
    with eval_mode(net):
        for index, module in enumerate(net):
            representation, said = module(representation)
            logits = said.new_empty(len(images), said.shape[1]) if logits is None else logits
            logits[staying] = said
            leaving = said.float().softmax(1).amax(1) >= confidence
            heads[staying[leaving]] = index
            staying, representation = staying[~leaving], representation[~leaving]
            if not len(staying):
                break
    return logits, heads.clamp(max=len(net) - 1)


def exits(every_logits, confidence):
    """The heads (B,), from 0, at which images leave, from every head's logits [(B, classes), …]."""
    sure = torch.stack([logits.float().softmax(1).amax(1) >= confidence for logits in every_logits[:-1]])
    everyone = torch.ones_like(sure[:1]) if len(sure) else torch.ones(1, len(every_logits[-1]), dtype=torch.bool)
    return torch.cat([sure, everyone]).int().argmax(0)  # the first


@torch.no_grad()
def exit_flops(net, image):
    """(alone, early): FLOPs of ``image`` (1, 3, h, w) to each head, through the bodies up to it and that head alone, or
    all heads up to it, as an image has that may leave early.
    """
    with eval_mode(net):
        alone = [count_flops(lambda n=n: net(image, [n])) for n in range(heads_of(net))]
        early = [count_flops(lambda n=n: net(image, range(n + 1))) for n in range(heads_of(net))]
    return alone, early


def heads_of(net):
    """How many heads ``net`` has: as many as modules in a DecoupledNetwork, else one."""
    return len(net) if isinstance(net, DecoupledNetwork) else 1


# On images, and on a data set


def predict(net, form, paths, args):
    """Prints a line for each image and head asked for."""
    heads = chosen(args.heads, heads_of(net))
    images = [as_batch(form.read(path)[None], form, args.device) for path in paths]
    alone, early = exit_flops(net, images[0])
    for path, batch in zip(paths, images, strict=True):
        if args.early_exit is None:
            with torch.inference_mode():
                answers = dict(zip(heads, net(batch, heads), strict=True))
            flops = alone
        else:
            logits, head = early_exit(net, batch, args.early_exit)
            answers, flops = {head.item(): logits}, early
        for head, logits in answers.items():
            confidence, label = logits.float().softmax(1)[0].max(0)
            saved = 100 * (1 - flops[head] / alone[-1])
            print(f"{path}: {form.classes[label]}, {confidence:.3f}, head {head + 1}, {saved:.1f} % of FLOPs saved")


def as_batch(images, form, device):
    """uint8 (B, s, s, 3) → the network's input (B, 3, s, s) on ``device``."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    ((batch, _),) = Batches(images, labels, len(images), mean=form.mean, std=form.std, device=device)
    return batch


@torch.inference_mode()
def evaluate_exits(net, batches, confidences=CONFIDENCES):
    """A pandas frame of leaving at each head alone and early, at each of ``confidences``: columns exit ("head" or
    "early"), at (the head, from 1, or the confidence), top1 (%), gflops (average per image), saved (% of the FLOPs to
    the last head alone), and left1, left2, … (% of the images at each head). ``frame.attrs["images"]`` counts them.
    """
    every_logits, labels = [], []
    with eval_mode(net):
        for images, its in batches:
            every_logits.append([logits.float().cpu() for logits in net(images)])
            labels.append(its.cpu())
    every_logits, labels = [torch.cat(logits) for logits in zip(*every_logits, strict=True)], torch.cat(labels)
    alone, early = exit_flops(net, images[:1])
    right = torch.stack([logits.argmax(1) == labels for logits in every_logits])
    ways = [("head", n + 1, torch.full_like(labels, n), alone) for n in range(len(right))]
    if len(right) > 1:
        ways += [("early", confidence, exits(every_logits, confidence), early) for confidence in confidences]
    rows = []
    for way, at, heads, flops in ways:
        shares = torch.bincount(heads, minlength=len(right)).double() / len(labels)
        average = (shares * torch.tensor(flops, dtype=torch.float64)).sum().item()
        top1 = 100 * right.gather(0, heads[None]).double().mean().item()
        row = {"exit": way, "at": at, "top1": top1, "gflops": average / 1e9, "saved": 100 * (1 - average / alone[-1])}
        rows.append(row | {f"left{n}": 100 * share for n, share in enumerate(shares.tolist(), start=1)})
    frame = pd.DataFrame(rows)
    frame.attrs["images"] = len(labels)
    return frame


def figure(frame, title):
    """A figure of accuracy against average FLOPs, from a frame of evaluate_exits."""
    from matplotlib import pyplot

    with pyplot.style.context(STYLE):
        drawn, axes = pyplot.subplots(figsize=(6, 4))
    looks = styles(("early exit at confidence c", "all at head n"))
    for way, (label, look) in zip(("early", "head"), looks.items(), strict=True):
        rows = frame[frame["exit"] == way]
        axes.plot(rows["gflops"], rows["top1"], label=label, linestyle="-" if way == "early" else "", **look)
        named = None
        for row in rows.itertuples():
            if named is not None and named.top1 == row.top1 and row.gflops < 1.2 * named.gflops:
                continue  # on top of the last one
            named = row
            where = {"xytext": (4, -11 if way == "head" else 4), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(f"{row.at:g}", (row.gflops, row.top1), **where)
    axes.set(xscale="log", xlabel="average GFLOP an image", ylabel="top-1 (%)", title=title)
    axes.title.set_fontsize(9)
    axes.legend(loc="lower right")
    return drawn


def labeled(folder, form, device):
    """Iterates over folder/<class>/<image>, classes called as the network's: images (B, 3, s, s), labels (B,). Raises
    InputError for others.
    """
    odd = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in form.classes]
    if odd:
        raise InputError(f"{odd[0]} is no class of the network's: {', '.join(form.classes[:10])}, …")
    found = [(path, form.classes.index(path.parent.name)) for path in sorted(folder.glob("*/*")) if path.is_file()]
    if not found:
        raise InputError(f"{folder} holds no images: labeled images are {folder}/<class>/<image>")
    for start in range(0, len(found), BATCH):
        paths, labels = zip(*found[start : start + BATCH], strict=True)
        yield as_batch(torch.stack([form.read(path) for path in paths]), form, device), torch.tensor(labels)


def own_test_set(saved, form, data_dir, device):
    """The test set of the run that left ``saved``, as Batches."""
    arguments = saved["arguments"]
    if "dataset" not in arguments:
        raise InputError("this run's test images are a folder of its own: name images, or DIR/<class>/<image>")
    _, test, _ = load_images(arguments["dataset"], data_dir or arguments["data_dir"], batch_size=2, drop_last=True)
    about = {"mean": form.mean, "std": form.std, "description": f"{test.description}, the test set"}
    return Batches(test.images, test.labels, BATCH, **about, device=device)


def main():
    args = parse_args()
    args.device = flags.pick_device(args.device)
    path = Path(args.checkpoint)
    if path.is_dir():
        newest = sorted(path.glob("*.pt"), key=lambda file: file.stat().st_mtime)
        if not newest:
            raise InputError(f"there is no checkpoint in {path}")
        path = newest[-1]
    saved = loading.read(path)
    net, form = loading.rebuild(saved, path, script=args.script, device=args.device), loading.input_form(saved, path)
    if not isinstance(net, DecoupledNetwork):  # one that returns its only head's logits
        net = DecoupledNetwork([DecoupledModule(net, nn.Identity())])
    if args.early_exit is not None and heads_of(net) == 1:
        raise InputError(f"--early-exit: {path} is of a network with one head, which no image leaves early")
    if not args.labeled:
        return predict(net, form, args.images, args)
    if args.images:
        batches, description = labeled(Path(args.images[0]), form, args.device), args.images[0]
    else:
        batches = own_test_set(saved, form, args.data_dir, args.device)
        description = batches.description
    frame = evaluate_exits(net, batches, CONFIDENCES if args.early_exit is None else [args.early_exit])
    title = f"{saved['script']}, {frame.attrs['images']} images of {description}"
    print(title)
    print(frame.to_string(index=False, float_format="{:.4g}".format))
    if args.output:
        output = Path(args.output)
        with checkpoints.writing(output):
            figure(frame, title).savefig(output, dpi=110)
            frame.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
        print(f"figure: {output}, numbers: {output.with_suffix('.csv')}")


def chosen(heads, count):
    """The heads, from 0, that --heads names; None is the last."""
    if heads in ("all", None):
        return list(range(0 if heads else count - 1, count))
    if not heads.isdecimal() or not 1 <= int(heads) <= count:
        raise InputError(f"--heads {heads}: choose all, or one from 1 to {count}")
    return [int(heads) - 1]


if __name__ == "__main__":
    flags.start(main)
