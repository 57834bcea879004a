"""Back-propagation of torchvision's VGG and ResNet on ImageNet: the end-to-end
rows of the paper's Table 3, on the schedule of imagenet_dgl.py.

    python imagenet/imagenet.py DIR --arch resnet152 --half \\
        --dynamic-loss-scale -j 16
    torchrun --nproc-per-node 4 imagenet/imagenet.py DIR --arch vgg19_bn \\
        --half --dynamic-loss-scale -j 8

DIR has train/ and val/; -b is the mini-batch of all processes together. The
paper's top-1 / top-5 (%) after 50 epochs: vgg13_bn 66.6 / 87.5, vgg19_bn 69.7 /
89.7, resnet152 74.4 / 92.1. torchvision's VGG has dropout in its classifier;
the greedy one has none.
"""

import imagenet_flags
from greedy_vgg import check_image_size
from imagenet_flags import TOPK, log_progress, sgd
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torchvision import models

from decoupled import logs
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.parallel.mesh import all_reduce_meters
from decoupled.training import flags

ARCHS = models.list_models(models, include=("resnet*", "resnext*", "wide_resnet*", "vgg*"))


def parse_args():
    return imagenet_flags.parse(imagenet_flags.parser(__doc__, ARCHS, default="resnet152"))


def build(args, classes):
    """torchvision's network, initialized as in torchvision, as a single module. Raises InputError for images too small
    for five halvings.
    """
    check_image_size(args.image_size, args.arch)
    return nn.Sequential(models.get_model(args.arch, weights=None, num_classes=classes))


def main():
    args = parse_args()
    run, train, val, stage, (network,) = imagenet_flags.setup(args, build)
    optimizer = sgd(args, network)
    schedule = StepLR(optimizer, args.epochdecay, gamma=0.1)
    meter = Meter(TOPK)

    for epoch in run.epochs(net=stage, optimizers=optimizer, schedules=schedule, train=train, test=val, meters=meter):
        stage.train()
        for images, labels in log_progress(run, run.progress(train), len(train)):
            with run.autocast():
                logits = network(images)  # (b, classes)
            loss = F.cross_entropy(logits.float(), labels)
            run.step(loss, optimizer)  # zero_grad, backward (gradients are averaged over the processes), step
            meter.update(loss, logits, labels)
        run.mesh.broadcast_buffers(stage.modules_here)
        with run.autocast():
            scores = evaluate(stage.heads, run.evaluation(val), topk=TOPK)
        trained, score = all_reduce_meters([meter, *scores], run.mesh)
        rate = schedule.get_last_lr()[0]
        line = logs.imagenet_backprop_line(rate, epoch, (trained.top1, trained.top5), (score.top1, score.top5))
        run.report(line, logs.loss_line(1, epoch, trained.loss))
        schedule.step()


if __name__ == "__main__":
    flags.start(main)
