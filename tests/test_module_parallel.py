"""The benchmarks of modules in parallel: what they make of measurements and counts, not the clock."""

from types import SimpleNamespace

import pytest
import torch
from running import load_script

from decoupled.networks.modules import DecoupledModule, DecoupledNetwork

measured = load_script("benchmarks/module_parallel.py")
paper = load_script("benchmarks/module_parallel_paper.py")


def result(wall, cpu, waited=0.0, lengths=(4,), sent=0, module_seconds=()):
    return measured.Result(wall, cpu, waited, list(module_seconds), sent, list(lengths))


def test_the_table_is_of_medians_and_of_the_busiest():
    """10 s for 100 images by one process, modules of 1, 2, 3, 2 s; 5, 6 and 100 s by two; the second is the busiest."""
    rounds = []
    for wall in (5.0, 6.0, 100.0):
        results = {name: [result(20.0, 16.0)] for name in measured.ROWS}
        results["DGL, 1 process"] = [result(10.0, 8.0, module_seconds=(1, 2, 3, 2))]
        split = {"lengths": (2, 2), "sent": 3 * 10**6}
        results["DGL, 2 processes"] = [
            result(wall, 3.0, waited=2.0, **split),
            result(wall, 5.0, waited=0.03 * wall, **split),
        ]
        rounds.append(results)
    frame, milliseconds = measured.make_table(rounds, SimpleNamespace(steps=10, batch_size=10))
    assert milliseconds == [100, 200, 300, 200]
    row = frame.loc["DGL, 2 processes"].to_dict()
    assert row.pop("cut") == "2,2"
    assert row == pytest.approx(
        {
            "images/s, clock": 100 / 6,
            "CPU": 20,
            "speed-up, clock": 10 / 6,
            "by CPU": 1.6,
            "ideal": 8 / 5,
            "waits %": 3,
            "MB": 3,
            "GB/s": 100 / 6 / 10 * 0.003,
        }
    )
    assert frame["speed-up, clock"]["data-parallel b.-p."] == 1  # compared with back-propagation


def test_one_process_measures_its_modules():
    """In this process, where nothing waits and nothing is sent."""
    args = SimpleNamespace(steps=1, batch_size=2, queue=2, half=False)
    greedy = measured.work(args, measured.ROWS["DGL, 1 process"])
    assert len(greedy.module_seconds) == 4 and all(seconds > 0 for seconds in greedy.module_seconds)
    assert sum(greedy.module_seconds) <= greedy.cpu and (greedy.lengths, greedy.sent) == ([4], 0)
    backprop = measured.work(args, measured.ROWS["back-propagation"])
    assert backprop.wall > 0 and (backprop.lengths, backprop.sent, backprop.module_seconds) == ([4], 0, [])


def test_the_formulas_of_the_paper():
    """Two GPUs of 1 FLOP/s, 10 images of 100 bytes; modules of 2 and 3 FLOPs with auxiliaries, 1.5 and 2.5 without."""
    demands = paper.Demands(
        batch_size=10,
        dgl_flops=[2.0, 3.0],
        body_flops=[1.5, 2.5],
        link_bytes=[100.0],
        backprop_gradients=1000,
        dgl_gradients=1200,
    )
    assert paper.relative_speeds(demands, 1.0, 1e9) == pytest.approx(
        {
            "one GPU, DGL": 40 / 50,
            "DGL": 40 / 30,
            "1F1B 8": 40 / (25 * 9 / 8),
            "1F1B 32": 40 / (25 * 33 / 32),
            "data-parallel b.-p.": 2,
            "data-parallel DGL": 40 / 25,
        },
        rel=1e-4,
    )
    slow = paper.relative_speeds(demands, 1.0, 10.0)  # 100 s for representations, 100 and 120 s for gradients
    assert slow["DGL"] == pytest.approx(0.4) and slow["1F1B 8"] == pytest.approx(40 / (100 * 9 / 8))
    assert slow["data-parallel b.-p."] == pytest.approx(40 / (20 / 3 + 100))
    assert slow["data-parallel DGL"] == pytest.approx(40 / (25 / 3 + 120))


def test_memory_on_paper_by_hand():
    """Two modules, a Linear layer each, without biases: 2 → 3 → 5 features and heads of 10 classes, on 4 vectors."""

    def module(inputs, outputs):
        body = torch.nn.Linear(inputs, outputs, bias=False)
        return DecoupledModule(body, torch.nn.Linear(outputs, 10, bias=False))

    net = DecoupledNetwork([module(2, 3), module(3, 5)]).to("meta")
    images = torch.empty(4, 2, device="meta")
    assert paper.representation_bytes(net, images) == [4 * 4 * 2, 4 * 4 * 3, 4 * 4 * 5]
    lower = 3 * 4 * 2 * 3 + 2 * 4 * 4 * 3  # weights, gradients, momentum; two micro-batches of outputs
    upper = 3 * 4 * (3 * 5 + 5 * 10) + 4 * 4 * (5 + 10)
    assert paper.pipeline_memory(net, images, micro_batches=8) == max(lower, upper)
