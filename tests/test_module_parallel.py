"""The benchmarks of modules in parallel: what they make of measurements and counts, not the clock."""

from types import SimpleNamespace

import pytest
from running import load_script

measured, paper = (load_script(f"benchmarks/{name}.py") for name in ("module_parallel", "module_parallel_paper"))


def test_the_table_is_of_medians_and_of_the_busiest():
    """10 s for 100 images by one process, modules of 1, 2, 3, 2 s; 5, 6 and 100 s by two; the second is the busiest."""

    def result(wall, cpu, waited=0.0, cut=(4,), sent=0, seconds=()):
        return {"wall": wall, "cpu": cpu, "waited": waited, "cut": list(cut), "sent": sent, "seconds": list(seconds)}

    rounds = []
    for wall in (5.0, 6.0, 100.0):
        results = {row: [result(20.0, 16.0)] for row in measured.ROWS}
        results["DGL, 1 process"] = [result(10.0, 8.0, seconds=(1, 2, 3, 2))]
        cut = {"cut": (2, 2), "sent": 3 * 10**6}
        results["DGL, 2 processes"] = [
            result(wall, 3.0, waited=2.0, **cut),
            result(wall, 5.0, waited=0.03 * wall, **cut),
        ]
        rounds.append(results)
    frame, modules = measured.table(rounds, SimpleNamespace(steps=10, batch_size=10))
    assert modules == [100, 200, 300, 200]
    row = frame.loc["DGL, 2 processes"].to_dict()
    rates = {"images/s, clock": 100 / 6, "CPU": 20, "speed-up, clock": 10 / 6, "by CPU": 1.6, "ideal": 8 / 5}
    link = {"MB": 3, "GB/s": 100 / 6 / 10 * 0.003}
    assert row == {
        "cut": "2,2",
        **{name: pytest.approx(value) for name, value in (rates | {"waits %": 3} | link).items()},
    }
    assert frame["speed-up, clock"]["data-parallel b.-p."] == 1  # beside back-propagation


def test_the_formulas_of_the_paper():
    """Two GPUs of 1 FLOP/s, 10 images of 100 bytes; modules of 2 and 3 FLOPs with auxiliaries, 1.5 and 2.5 without."""
    counted = object.__new__(paper.Counted)
    counted.gpus, counted.batch, counted.links = 2, 10, [100.0]
    counted.dgl, counted.bodies, counted.gradients = [2.0, 3.0], [1.5, 2.5], {"b.-p.": 1000, "DGL": 1200}
    fast = counted.speeds(1.0, 1e9)
    assert fast == {name: pytest.approx(value, rel=1e-4) for name, value in {
        "one GPU, DGL": 40 / 50, "DGL": 40 / 30, "1F1B 8": 40 / (25 * 9 / 8), "1F1B 32": 40 / (25 * 33 / 32),
        "data-parallel b.-p.": 2, "data-parallel DGL": 40 / 25,
    }.items()}  # fmt: skip
    slow = counted.speeds(1.0, 10.0)  # 100 s for representations, 100 and 120 s for gradients
    assert slow["DGL"] == pytest.approx(0.4) and slow["1F1B 8"] == pytest.approx(40 / (100 * 9 / 8))
    assert slow["data-parallel b.-p."] == pytest.approx(40 / (20 / 3 + 100))
    assert slow["data-parallel DGL"] == pytest.approx(40 / (25 / 3 + 120))
