"""Decoupled back-propagation with delayed gradients (DDG) of a ResNet on
CIFAR-10, the second row of the paper's Table 2.

    python ddg_comparison/cifar_ddg.py

DDG (Huo, Gu, Yang, Huang; ICML 2018; arXiv 1804.10574) cuts a network into K
modules, here counted from 0. In iteration t the mini-batch x_t passes all of
them, with their weights w^t. Then each steps at once by the gradient of an
earlier mini-batch x_s, s = t − (K−1−k):

    w_k^(t+1) = w_k^t − lr · ∂f(x_s; w^s)/∂w_k    and  w_k^t while s < 0

(momentum and weight decay as in SGD, at the present weights). A module hands
its gradient by its input down, for the next iteration. Activations and weights
in that gradient are those of iteration s. So the graph of its forward pass is
kept, on a copy of the module's weights, since the optimizer changes those in
place: module k keeps K−1−k mini-batches, and one more within an iteration. To
run the forward pass again, with w^t, would be another method: Features Replay
(Huo, Gu, Huang; NeurIPS 2018; arXiv 1807.04511), which takes less memory and
more computing.

The end of an epoch changes nothing for the mini-batches on their way: the next
epoch's first iterations step by them, at its learning rate. They are in the
checkpoint, as inputs and weights, and a resumed run builds their graphs from
these. The last K−1 of a run move the upper modules only.

The paper has 93.41 % for ResNet-110 in 2 modules after 300 epochs, as DDG's
authors report. A training image costs 1.52 GFLOP, an epoch 76 TFLOP: as much as
back-propagation, which it is with one module.
"""

from collections import deque

import torch
from cifar_resnet import chained_resnet, frozen_statistics
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from decoupled import InputError
from decoupled.networks.evaluation import Meter, evaluate
from decoupled.training import flags
from decoupled.training.run import Run


def parse_args():
    parser = flags.parser(__doc__, epochs=300, batch_size=128, lr=0.01)
    group = parser.add_argument_group("network and recipe")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="of the ResNet, 6n+2")
    group.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="modules")
    group.add_argument(
        "--milestones",
        type=flags.integer(1),
        nargs="+",
        default=[150, 225],
        metavar="EPOCH",
        help="first epochs at a tenth of the rate before (default: 150 225)",
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum, as DDG's authors use")
    return parser.parse_args()


class InFlight:
    """The mini-batches in module ``k`` of ``net`` whose gradient is still to come, oldest first: ``delay`` of them
    between iterations.

    batches   (input, weights, output) of each: input (B, C, h, w); the weights it passed, by name, none where they are
              still the module's; the output with its graph, or the loss for the last module
    gradient  the gradient of the loss by the oldest output, as the module above has handed it down:
              (B, C', h', w') or None
    """

    def __init__(self, run, net, k):
        self.run, self.module, self.n, self.has_below = run, net[k], k + 1, k > 0
        self.delay = len(net) - 1 - k
        self.batches = deque()
        self.gradient = None

    def weights(self):
        """Copies of the module's weights that later steps leave alone; a gradient by them goes to the module's own."""
        return {name: weight.clone() for name, weight in self.module.named_parameters()} if self.delay else {}

    def state_dict(self):
        """What the graphs are built from, not the graphs."""
        batches = [
            (below.detach(), {name: weight.detach() for name, weight in weights.items()})
            for below, weights, _ in self.batches
        ]
        return {"batches": batches, "gradient": self.gradient if batches else None}

    def load_state_dict(self, state):
        device = next(self.module.parameters()).device
        self.gradient = None if state["gradient"] is None else state["gradient"].to(device)
        self.batches.clear()
        for below, saved in state["batches"]:
            weights = self.weights()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(saved[name])
            below = below.to(device).requires_grad_(self.has_below)
            with frozen_statistics(self.module), self.run.autocast():
                self.batches.append((below, weights, functional_call(self.module.train(), weights, below)))


def turn(run, module, optimizer, own, representation, labels):
    """One module's part of an iteration: what comes from below, (B, C, h, w), and labels (B,) → (its output: the next
    representation or, of the last module, logits; the loss, there alone; the gradient that goes down: of the input of
    an earlier mini-batch, None in the lowest module and as long as no gradient has come to this one).
    """
    below = representation.detach().requires_grad_(own.has_below)
    weights, loss = own.weights(), None
    with run.autocast():
        above = output = functional_call(module, weights, below)  # (B, C', s, s); in the last module (B, classes)
    if own.delay == 0:
        above = output.detach()
        output = loss = F.cross_entropy(output.float(), labels)
        own.gradient = torch.ones_like(loss)
        run.watch(loss, own.n)
    own.batches.append((below, weights, output))
    if len(own.batches) <= own.delay:
        return above, loss, None  # the first K−1−k iterations
    below, _, output = own.batches.popleft()
    # With fp16 each module has its own loss scale; gradients go from one to the next without
    scaler = run.scaler(optimizer)
    scale = scaler.scale(torch.ones(1, device=labels.device))  # (1,), not a scalar: fp16 divided by it is fp32
    optimizer.zero_grad()
    output.backward((own.gradient * scale).view_as(output).to(output.dtype))
    gradient = below.grad / scale if own.has_below else None
    scaler.step(optimizer)
    scaler.update()
    return above, loss, gradient


def step(run, net, optimizers, in_flight, images, labels):
    """One iteration of DDG: images (B, 3, 32, 32), labels (B,) → loss, logits (B, classes).

    Here the modules take turns. A module needs nothing another makes in the same iteration but the representation below
    it, so on K devices their backward passes would run at once.
    """
    representation = images
    for k, (module, optimizer, own) in enumerate(zip(net, optimizers, in_flight, strict=True)):
        representation, loss, gradient = turn(run, module, optimizer, own, representation, labels)
        if gradient is not None:
            in_flight[k - 1].gradient = gradient  # for its next iteration
    return loss.detach(), representation


def build(args, classes):
    """The network that the flags name."""
    return chained_resnet(args.depth, args.splits, classes)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes), graphs=False)  # several mini-batches are in flight
    if not all(list(module.parameters()) for module in net):
        raise InputError(
            f"--splits {args.splits} leaves a module without weights, which has nothing to learn: choose fewer"
        )
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
        for module in net
    ]
    falls = [epoch - 1 for epoch in args.milestones]  # in epochs done, which is what schedules count
    schedules = [MultiStepLR(optimizer, falls, gamma=0.1) for optimizer in optimizers]
    in_flight = [InFlight(run, net, k) for k in range(len(net))]
    meter = Meter()

    state = {"net": net, "optimizers": optimizers, "schedules": schedules, "train": train, "test": test}
    for epoch in run.epochs(**state, meters=meter, in_flight=in_flight):
        net.train()
        for images, labels in run.progress(train):
            loss, logits = step(run, net, optimizers, in_flight, images, labels)
            meter.update(loss, logits, labels)
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test))
        run.log(len(net), epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
