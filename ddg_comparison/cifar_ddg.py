"""Decoupled back-propagation with delayed gradients (DDG) of a ResNet on
CIFAR-10, the second row of the paper's Table 2.

    python ddg_comparison/cifar_ddg.py

DDG (Huo, Gu, Yang, Huang; ICML 2018; arXiv 1804.10574) splits a network into K
modules, here counted from 0. In iteration t, the mini-batch x_t passes through
all of them, with their weights w^t. Then each module takes a step with the
gradient of an earlier mini-batch x_s, s = t − (K−1−k):

    w_k^(t+1) = w_k^t − lr · ∂f(x_s; w^s)/∂w_k    and  w_k^t while s < 0

(momentum and weight decay as in SGD, with the current weights). The module also
passes the gradient with respect to its inputs down to the module below, which
uses it in the next iteration. The activations and weights in these gradients
are those of iteration s. Each module therefore keeps the graph of its forward
pass, built on a copy of its weights because the optimizer changes the weights
in place. Module k keeps K−1−k mini-batches, plus one within an iteration.
Running the forward pass again, with w^t, would be a different method: Features
Replay (Huo, Gu, Huang; NeurIPS 2018; arXiv 1807.04511), which needs less memory
and more computation.

Mini-batches stay in flight when an epoch ends: the first steps of the next
epoch use their gradients, with that epoch's learning rate. A checkpoint
contains their inputs and weights, from which a resumed run rebuilds the graphs.
The last K−1 mini-batches of a run only update the upper modules.

The paper quotes 93.41 % for ResNet-110 in 2 modules after 300 epochs from DDG's
authors. A training image costs 1.52 GFLOP, an epoch 76 TFLOP: as much as in
back-propagation. With one module, this is back-propagation.
"""

from collections import deque
from typing import NamedTuple

import torch
from cifar_resnet import chained_resnet, frozen_statistics
from torch import Tensor
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
    group = parser.add_argument_group("network")
    group.add_argument("--depth", type=flags.integer(1, 2000), default=110, help="depth of the ResNet, 6n+2")
    group.add_argument("--channels", type=flags.WIDTH, default=16, help="channels of the first third of the blocks")
    group.add_argument("--splits", type=flags.integer(1), default=2, metavar="K", help="number of modules")
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--milestones",
        type=flags.integer(1),
        nargs="+",
        default=[150, 225],
        metavar="EPOCH",
        help="epochs at which the learning rate drops 10× (default: 150 225)",
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum, which DDG's authors use")
    return parser.parse_args()


class MiniBatch(NamedTuple):
    """A mini-batch x_s that has passed forward through a module and waits for its gradient."""

    inputs: Tensor  # (B, C, h, w), from the module below
    weights: dict  # copies of the module's weights w_k^s by name; empty in the last module, which steps immediately
    output: Tensor  # with its graph: (B, C', h', w') or, in the last module, the loss


class InFlight:
    """The mini-batches in flight in module ``k`` of ``net``, oldest first: ``delay`` of them between iterations.

    gradient  of the loss with respect to the oldest one's output, (B, C', h', w'), from the module above
    loss      of the latest mini-batch, in the last module
    """

    def __init__(self, run, net, k):
        self.run = run
        self.module = net[k]
        self.delay = len(net) - 1 - k
        self.is_lowest = k == 0
        self.batches = deque()
        self.gradient = None
        self.loss = None

    def copy_weights(self):
        """Copies of the module's weights for a forward pass. Later steps do not change them, and the backward pass
        reaches the module's own weights through them. Without delay, none are needed.
        """
        if self.delay == 0:
            return {}
        return {name: weight.clone() for name, weight in self.module.named_parameters()}

    def state_dict(self):
        """The tensors from which ``load_state_dict`` rebuilds the graphs."""
        batches = []
        for batch in self.batches:
            weights = {name: weight.detach() for name, weight in batch.weights.items()}
            batches.append((batch.inputs.detach(), weights))
        # The last module has no mini-batches between iterations and computes its own gradient
        return {"batches": batches, "gradient": self.gradient if batches else None}

    def load_state_dict(self, state):
        device = next(self.module.parameters()).device
        self.gradient = state["gradient"]
        if self.gradient is not None:
            self.gradient = self.gradient.to(device)
        self.module.train()
        self.batches.clear()
        for inputs, saved_weights in state["batches"]:
            inputs = inputs.to(device).requires_grad_(not self.is_lowest)
            weights = self.copy_weights()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(saved_weights[name])
            with frozen_statistics(self.module), self.run.autocast():
                output = functional_call(self.module, weights, inputs)
            self.batches.append(MiniBatch(inputs, weights, output))


def forward(in_flight, inputs, labels):
    """Passes x_t forward through one module, with its weights w_k^t, and adds it to its mini-batches in flight.

    inputs (B, C, h, w) from the module below and labels (B,) → output (B, C', h', w') or, in the last module, logits
    (B, classes), detached.
    """
    inputs = inputs.detach().requires_grad_(not in_flight.is_lowest)
    weights = in_flight.copy_weights()
    with in_flight.run.autocast():
        output = functional_call(in_flight.module, weights, inputs)
    if in_flight.delay > 0:
        in_flight.batches.append(MiniBatch(inputs, weights, output))
    else:
        loss = F.cross_entropy(output.float(), labels)
        in_flight.loss = loss.detach()
        in_flight.gradient = torch.ones_like(loss)
        in_flight.batches.append(MiniBatch(inputs, weights, loss))
    return output.detach()


def delayed_step(in_flight, optimizer):
    """One step of a module with the gradient of x_s, its oldest mini-batch in flight, through the graph of iteration s.

    Returns the gradient with respect to the module's inputs, (B, C, h, w), for the module below; None in the lowest
    module.
    """
    delayed = in_flight.batches.popleft()
    # In fp16, each module has its own loss scale; the gradients passed down are unscaled
    scaler = in_flight.run.scaler(optimizer)
    # Of shape (1,): an fp16 gradient divided by a scalar would stay fp16
    scale = scaler.scale(torch.ones(1, device=delayed.output.device))
    optimizer.zero_grad()
    gradient = in_flight.gradient * scale
    delayed.output.backward(gradient.view_as(delayed.output).to(delayed.output.dtype))
    gradient_below = None
    if not in_flight.is_lowest:
        gradient_below = delayed.inputs.grad / scale
    scaler.step(optimizer)
    scaler.update()
    return gradient_below


def build(args, classes):
    """Builds the network that the flags describe."""
    return chained_resnet(args.depth, args.splits, classes, width=args.channels)


def main():
    args = parse_args()
    run = Run(args)
    train, test, classes = run.data()
    net = run.prepare(build(args, classes), cuda_graphs=False)  # several mini-batches are in flight
    for module in net:
        if not list(module.parameters()):
            raise InputError(f"--splits {args.splits} leaves a module without trainable weights: choose fewer")
    optimizers = [
        SGD(module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=args.nesterov, fused=True)
        for module in net
    ]
    milestones = [epoch - 1 for epoch in args.milestones]  # schedules count finished epochs
    schedules = [MultiStepLR(optimizer, milestones, gamma=0.1) for optimizer in optimizers]
    queues = [InFlight(run, net, k) for k in range(len(net))]
    meter = Meter()

    for epoch in run.epochs(
        net=net,
        optimizers=optimizers,
        schedules=schedules,
        train=train,
        test=test,
        meters=meter,
        in_flight=queues,
    ):
        net.train()
        for images, labels in run.progress(train):
            representation = images
            # Here, the modules run one after the other. On K devices, their backward passes would run at the same time:
            # within an iteration, a module needs only the representation from below.
            for k, (in_flight, optimizer) in enumerate(zip(queues, optimizers, strict=True)):
                representation = forward(in_flight, representation, labels)  # x_t, with w_k^t
                if len(in_flight.batches) > in_flight.delay:  # s = t − (K−1−k) ≥ 0
                    gradient_below = delayed_step(in_flight, optimizer)  # with the gradient of x_s
                    if k > 0:
                        queues[k - 1].gradient = gradient_below  # for the next iteration of the module below
            loss = queues[-1].loss
            logits = representation
            run.watch(loss, len(net))
            meter.update(loss, logits, labels)
        with run.autocast():
            (score,) = evaluate(net, run.evaluation(test))
        run.log(len(net), epoch, meter, score)
        for schedule in schedules:
            schedule.step()


if __name__ == "__main__":
    flags.start(main)
