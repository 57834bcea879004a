"""Does the input keep up? Images/s that one core decodes and augments, that
workers deliver, and that a training step consumes.

    python benchmarks/imagenet_input.py DIR --arch vgg13 --splits 10 --half \\
        -j 4 8 16

DIR holds train/ and val/ (see imagenet/imagenet_folders.py); real ImageNet's
larger files take longer than shrunk ones. The step is that of DGL on one batch
that is already on the device, evaluation and log not counted. When the workers
deliver less than the step consumes, training is bound by decoding.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.analysis.costs import step_seconds
from decoupled.training import environment as provenance
from decoupled.training import flags

sys.path.append(str(Path(__file__).parent.parent / "imagenet"))
import imagenet_folders
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("data", type=flags.path, metavar="DIR", help="folder with train/ and val/, of class folders")
    archs = (*STAGES, *BLOCKS)
    network = f"network: {', '.join(archs)}"
    parser.add_argument("-a", "--arch", choices=archs, default="resnet152", metavar="ARCH", help=network)
    parser.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="modules")
    parser.add_argument("-b", "--batch-size", type=flags.integer(2), default=256, help="images a step")
    parser.add_argument(
        "-j",
        "--workers",
        type=flags.integer(0),
        nargs="+",
        default=[4],
        help="numbers of workers to try (default: 4)",
    )
    parser.add_argument("--image-size", type=flags.integer(32), default=224, help="side of the crops")
    parser.add_argument(
        "--samples",
        type=flags.integer(2),
        default=1000,
        metavar="N",
        help="images of an epoch (default: at most 1000)",
    )
    parser.add_argument(
        "--steps",
        type=flags.integer(1),
        default=10,
        metavar="N",
        help="training steps timed",
    )
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser.parse_args()


def decoding_speed(images):
    """Images/s that this process reads, decodes, crops and mirrors by itself, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    started = time.perf_counter()
    for index in range(len(images)):
        images[1, index]
    torch.set_num_threads(threads)
    return len(images) / (time.perf_counter() - started)


def delivery_speed(batches):
    """Images/s that arrive on the device, normalized, after a first epoch that starts the workers."""
    for _ in range(2):
        started = time.perf_counter()
        count = sum(len(labels) for _, labels in batches)
        if batches.device.type == "cuda":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


def step_speed(args, classes, device):
    """Images/s of DGL's training step."""
    settings = (classes, args.image_size)
    if args.arch in BLOCKS:
        net = greedy_resnet(args.arch, args.splits, *settings)
    else:
        net = greedy_vgg(args.arch, math.ceil(sum(STAGES[args.arch]) / args.splits), *settings)
    net.to(device, memory_format=torch.channels_last).train()
    optimizers = [SGD(module.parameters(), lr=1e-4, momentum=0.9, fused=True) for module in net]
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device).to(
        memory_format=torch.channels_last
    )
    labels = torch.randint(classes, (args.batch_size,), device=device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scalers = [torch.amp.GradScaler(device.type, enabled=args.half and device.type == "cuda") for _ in net]

    def step():
        representation = images
        for module, optimizer, scaler in zip(net, optimizers, scalers, strict=True):
            with torch.autocast(device.type, dtype, enabled=args.half):
                representation, logits = module(representation)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            representation = representation.detach()

    step_seconds(step, 1, device)
    return args.batch_size / step_seconds(step, args.steps, device)


def main():
    args = parse_args()
    device = flags.pick_device(args.device)
    torch.backends.cudnn.benchmark = True

    def load(workers):
        listing = imagenet_folders.list_images(Path(args.data) / "train", imagenet_folders.LAYOUT)
        count = min(args.samples, len(listing.samples))
        batch_size = min(args.batch_size, count)
        count -= count % batch_size  # whole batches
        settings = {"image_size": args.image_size, "batch_size": batch_size, "train_samples": count}
        return imagenet_folders.load(args.data, workers=workers, device=device, **settings)

    train, _, classes = load(0)
    what = f"{args.arch}, K = {args.splits}, batch {args.batch_size}, {args.image_size}x{args.image_size}"
    print("\n".join(provenance.environment(device, args.half)))
    print(f"# {what}, {train}, {os.cpu_count()} cores")
    one = decoding_speed(train.images)
    print(f"{one:10,.1f} images/s decoded by one core")
    for workers in args.workers:
        batches = load(workers)[0]
        print(f"{delivery_speed(batches):10,.1f} images/s delivered with {workers} worker{'s' * (workers != 1)}")
        batches.close()
    step = step_speed(args, classes, device)
    print(f"{step:10,.1f} images/s the step consumes; cores that keep it busy: {math.ceil(step / one)}")


if __name__ == "__main__":
    flags.start(main)
