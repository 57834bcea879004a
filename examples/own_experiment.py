"""Your own network, data and optimizer, trained in the same way as the experiments.

    python examples/own_experiment.py --workers 2
    torchrun --nproc-per-node 2 examples/own_experiment.py --half

The data are scikit-learn's digits, randomly shifted and rotated by worker
processes. decouple splits a small CNN into three modules, trained by AdamW with
warm-up and cosine annealing. docs/own_script.md explains the parts and has recipes for
more.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import Dataset
from torchvision.transforms import v2

from decoupled import decouple
from decoupled.data.loader import Loader
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.run import Run

WARM_UP = 2  # epochs


class Digits(Dataset):
    """Images float32 (1, 8, 8) in [0, 1] and their digits."""

    def __init__(self, part, transform=None):
        digits = load_digits()
        self.images = torch.tensor(digits.images[part], dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target[part])
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return image, self.labels[index]


def parse_args():
    parser = flags.parser(__doc__, epochs=20, batch_size=64, lr=3e-3, distributed=True, own_data=True)
    parser.add_argument("--images", type=flags.integer(20), default=1797, metavar="N", help="use the first N images")
    return parser.parse_args()


def load_data(args, device):
    """Returns (train, test, number of classes). One fifth of the images are for testing."""
    count = args.images // 5
    shared = {"seed": args.seed, "workers": args.workers, "device": device}
    augmented = Digits(slice(count, args.images), v2.RandomAffine(degrees=15, translate=(0.1, 0.1)))
    train = Loader(augmented, args.batch_size, shuffle=True, **shared)
    test = Loader(Digits(slice(count)), args.test_batch_size, **shared)
    return train, test, 10


def conv(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def build(args, classes):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    model = nn.Sequential(conv(1, 16), conv(16, 32), nn.MaxPool2d(2), conv(32, 64), head)
    return decouple(model, torch.rand(2, 1, 8, 8), splits=3)


def schedule(optimizer, epochs):
    """A learning rate that rises for WARM_UP epochs and then falls to 0 along a cosine."""
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=WARM_UP)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, epochs - WARM_UP))
    return SequentialLR(optimizer, [warm_up, cosine], milestones=[WARM_UP])


def main():
    args = parse_args()
    run = Run(args, distributed=True)
    train, test, classes = run.data(lambda: load_data(args, run.device))
    stage = run.distribute(build(args, classes))
    optimizers = [AdamW(module.parameters(), lr=args.lr) for module in stage.modules_here]
    schedules = [schedule(optimizer, args.epochs) for optimizer in optimizers]
    meters = [Meter() for _ in stage.modules_here]

    for epoch in run.epochs(
        net=stage,
        optimizers=optimizers,
        schedules=schedules,
        train=train,
        test=test,
        meters=meters,
    ):
        stage.train()
        for representation, labels in run.progress(stage.inputs(train)):
            for module, optimizer, meter in zip(stage.modules_here, optimizers, meters, strict=True):
                with run.autocast():
                    representation, logits = module(representation)
                loss = F.cross_entropy(logits.float(), labels)
                run.step(loss, optimizer)
                representation = representation.detach()
                meter.update(loss, logits, labels)
            stage.send(representation, labels)
        with run.autocast():
            heads = stage.heads
            scores = evaluate(heads, run.evaluation(stage.inputs(test)))
        for n, (meter, score) in enumerate(zip(*stage.gather(meters, scores), strict=True), start=1):
            run.log(n, epoch, meter, score)
        for each in schedules:
            each.step()


if __name__ == "__main__":
    flags.start(main)
