"""One of two processes that train a network with interfaces under DistributedDataParallel (gloo, CPU). Not a test:
tests/test_dni.py starts both and reads what rank 0 prints.

python tests/two_processes.py RANK STORE: a JSON list per way to train, with the outcome of each of its two steps:
"mean" (each gradient is the mean of both processes' own), "own" (unreduced: each process's own), "neither", or the
error.
"""

import json
import os
import sys
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dni

WAYS = {"plain": ({}, False), "find_unused": ({"find_unused_parameters": True}, False), "deferred": ({}, True)}


def network():
    torch.manual_seed(0)
    synthesizers = dni.BasicSynthesizer(5, n_hidden=1, context_dim=3), dni.BasicSynthesizer(6, n_hidden=1)
    for synthesizer in synthesizers:
        nn.init.normal_(synthesizer.layers[-1].weight)
    first, second = map(dni.BackwardInterface, synthesizers)
    layers = [nn.Linear(4, 5), nn.Tanh(), first, nn.Linear(5, 6), nn.Tanh(), second, nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def step(net, parameters, inputs, labels, deferred):
    """The parameters' gradients."""
    for parameter in parameters:
        parameter.grad = None
    with dni.synthesizer_context(F.one_hot(labels, 3).double()):
        if deferred:
            with dni.defer_backward():
                dni.backward(F.cross_entropy(net(inputs), labels))
        else:
            F.cross_entropy(net(inputs), labels).backward()
    return [parameter.grad.clone() for parameter in parameters]


def outcome(got, own, other):
    def same(expected):
        return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(got, expected, strict=True))

    if same([(a + b) / 2 for a, b in zip(own, other, strict=True)]):
        return "mean"
    return "own" if same(own) else "neither"


def main():
    rank = int(sys.argv[1])
    distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    outcomes = {}
    alone = network()
    for way, (options, deferred) in WAYS.items():
        net = network()
        # buckets so small that several are in flight
        parallel = DistributedDataParallel(net, bucket_cap_mb=1e-4, **options)
        outcomes[way] = []
        for seed in range(2):
            torch.manual_seed(seed)
            shares = list(zip(torch.randn(2, 4, 4).double(), torch.randint(3, (2, 4)), strict=True))
            own, other = (step(alone, list(alone.parameters()), *shares[index], False) for index in (rank, 1 - rank))
            try:
                got = step(parallel, list(net.parameters()), *shares[rank], deferred)
            except RuntimeError as error:
                outcomes[way].append(str(error))
            else:
                outcomes[way].append(outcome(got, own, other))
    print(json.dumps(outcomes), flush=True)
    distributed.barrier()
    os._exit(0)  # a reducer that was left in the middle of a step, as one of the ways does, may abort when torn down


if __name__ == "__main__":
    main()
