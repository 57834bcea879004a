"""Checks whether the input pipeline keeps up with training: images/s that one
core decodes and augments, that workers deliver, and that a training step consumes.

    python benchmarks/imagenet_input.py DIR --arch vgg13 --splits 10 --half \\
        -j 4 8 16

DIR has the folders train/ and val/ (see imagenet/imagenet_folders.py). Full-size
ImageNet files take longer to decode than shrunk ones. The step is DGL's on one
batch that is already on the device, without evaluation and log. If the workers
deliver less than the step consumes, training waits for decoding.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch

from decoupled.analysis.costs import step_seconds
from decoupled.training import flags
from decoupled.training.device import pick_device
from decoupled.training.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
from method_steps import ScaledOptimizer, autocast_on, dgl_step, sgd

sys.path.append(str(Path(__file__).parent.parent / "imagenet"))
import imagenet_folders
from greedy_resnet import BLOCKS, greedy_resnet
from greedy_vgg import STAGES, greedy_vgg


def parse_args():
    networks = (*STAGES, *BLOCKS)
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "data", type=flags.path, metavar="DIR", help="folder with train/ and val/, each with one folder per class"
    )
    parser.add_argument(
        "-a",
        "--arch",
        choices=networks,
        default="resnet152",
        metavar="ARCH",
        help=f"network: {', '.join(networks)}",
    )
    parser.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="modules")
    parser.add_argument("--channels", type=flags.WIDTH, default=64, help="channels of the network's first layer")
    parser.add_argument("-b", "--batch-size", type=flags.integer(2), default=256, help="images per step")
    parser.add_argument(
        "-j",
        "--workers",
        type=flags.integer(0),
        nargs="+",
        default=[4],
        help="numbers of workers to try (default: 4)",
    )
    parser.add_argument(
        "--image-size", type=flags.integer(32), default=224, help="height and width of the crops, in pixels"
    )
    parser.add_argument(
        "--samples",
        type=flags.integer(2),
        default=1000,
        metavar="N",
        help="images per epoch (default: at most 1000)",
    )
    parser.add_argument("--steps", type=flags.integer(1), default=10, metavar="N", help="training steps to time")
    parser.add_argument("--half", action="store_true", help="mixed precision: fp16 on CUDA, bf16 elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser.parse_args()


def decoding_speed(images):
    """Images/s that this process reads, decodes, crops and flips on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    started = time.perf_counter()
    for index in range(len(images)):
        images[index]
    torch.set_num_threads(threads)
    return len(images) / (time.perf_counter() - started)


def delivery_speed(batches):
    """Images/s that arrive on the device, normalized, after a first epoch that starts the workers."""
    load_all(batches)
    started = time.perf_counter()
    count = load_all(batches)
    return count / (time.perf_counter() - started)


def load_all(batches):
    """Loads all images of ``batches`` and returns their number."""
    count = sum(len(labels) for _, labels in batches)
    if batches.device.type == "cuda":
        torch.cuda.synchronize()
    return count


def step_speed(args, classes, device):
    """Images/s of DGL's training step."""
    settings = {"classes": classes, "image_size": args.image_size, "width": args.channels}
    if args.arch in BLOCKS:
        net = greedy_resnet(args.arch, args.splits, **settings)
    else:
        block_size = math.ceil(sum(STAGES[args.arch]) / args.splits)
        net = greedy_vgg(args.arch, block_size, **settings)
    net.to(device, memory_format=torch.channels_last).train()
    optimizers = [ScaledOptimizer(sgd(module), args.half) for module in net]
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (args.batch_size,), device=device)
    autocast = autocast_on(device, args.half)

    def step():
        dgl_step(net, optimizers, images, labels, autocast)

    step_seconds(step, 1, device)  # warm up
    return args.batch_size / step_seconds(step, args.steps, device)


def load_images(args, workers, device):
    """(training batches, validation batches, number of classes) of at most --samples images, in whole batches."""
    listing = imagenet_folders.list_images(Path(args.data) / "train", imagenet_folders.LAYOUT)
    count = min(args.samples, len(listing.samples))
    batch_size = min(args.batch_size, count)
    return imagenet_folders.load(
        args.data,
        workers=workers,
        device=device,
        image_size=args.image_size,
        batch_size=batch_size,
        train_samples=count - count % batch_size,
    )


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    train, _, classes = load_images(args, 0, device)
    about = f"{args.arch}, K = {args.splits}, batch {args.batch_size}, {args.image_size}x{args.image_size}"
    print("\n".join(environment(device, args.half)))
    print(f"# {about}, {train}, {os.cpu_count()} cores")
    one_core = decoding_speed(train.samples.dataset)
    print(f"{one_core:10,.1f} images/s decoded by one core")
    for workers in args.workers:
        batches, _, _ = load_images(args, workers, device)
        unit = "worker" if workers == 1 else "workers"
        print(f"{delivery_speed(batches):10,.1f} images/s delivered with {workers} {unit}")
        batches.close()
    consumed = step_speed(args, classes, device)
    cores = math.ceil(consumed / one_core)
    print(f"{consumed:10,.1f} images/s the step consumes; cores that keep it busy: {cores}")


if __name__ == "__main__":
    flags.start(main)
