"""Meters, single-pass evaluation and ensembles, against numpy and the naive way."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled.networks.evaluation import Meter, WithEnsembles, count_hits, ensembles, evaluate, ranks
from decoupled.networks.layerwise import layerwise_cnn


def test_meter_weighs_batches_by_their_size():
    meter = Meter()
    logits = torch.eye(10)[[1, 2, 3, 4]]
    meter.update(torch.tensor(1.0), logits, torch.tensor([1, 2, 3, 0]))
    meter.update(torch.tensor(4.0), logits[:2], torch.tensor([1, 0]))
    assert meter.loss == pytest.approx((4 * 1 + 2 * 4) / 6)
    assert meter.top1 == pytest.approx(100 * 4 / 6)


def test_top_k_against_numpy():
    logits, labels = torch.randn(50, 20), torch.randint(20, (50,))
    meter = Meter(topk=(1, 3, 20))
    meter.update(torch.tensor(0.0), logits[:30], labels[:30])
    meter.update(torch.tensor(0.0), logits[30:], labels[30:])
    order = np.argsort(-logits.numpy(), axis=1)
    for k in (1, 3, 20):
        assert meter.top(k) == pytest.approx(
            100 * np.mean([label in row[:k] for row, label in zip(order, labels.numpy(), strict=True)])
        )
    assert meter.top(20) == 100
    again = Meter(topk=(1, 3, 20))
    again.load_state_dict(meter.state_dict())
    again.update(torch.tensor(3.0), logits, labels)
    assert again.count == 100 and again.loss == pytest.approx(1.5) and again.top(3) == pytest.approx(meter.top(3))


@pytest.mark.parametrize("classes", [4, 10])  # as many as samples, and more
def test_of_soft_labels_the_largest_share_counts(classes):
    logits = torch.randn(4, classes)
    labels = torch.tensor([0, 3, 2, 1])
    soft = 0.7 * F.one_hot(labels, classes) + 0.3 * F.one_hot(labels.roll(1), classes)
    for topk in ((1,), (1, 2)):
        hard_meter, soft_meter = Meter(topk), Meter(topk)
        hard_meter.update(torch.tensor(1.0), logits, labels)
        soft_meter.update(torch.tensor(1.0), logits, soft)
        assert torch.equal(soft_meter.sums(), hard_meter.sums())
    (meter,) = evaluate(lambda_module(lambda images: 9 * F.one_hot(labels, classes).float()), [(logits, soft)])
    assert meter.top1 == 100


@pytest.mark.parametrize("topk", [(1,), (1, 5)])
def test_tokens_that_are_ignored_do_not_count(topk):
    logits = torch.randn(2, 3, 10)
    labels = torch.tensor([[3, -100, -100], [7, -100, 0]])
    meter = Meter(topk)
    expected = Meter(topk)
    kept = labels != -100
    meter.update(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, labels)
    expected.update(F.cross_entropy(logits[kept], labels[kept]), logits[kept], labels[kept])
    none = torch.full((2, 3), -100)
    meter.update(F.cross_entropy(logits.flatten(0, 1), none.flatten()), logits, none)
    torch.testing.assert_close(meter.sums(), expected.sums())
    assert meter.sums()[0] == 3


def test_a_meter_without_samples_is_nan():
    meter = Meter(topk=(1, 5))
    assert all(math.isnan(value) for value in (meter.loss, meter.top1, meter.top5))
    again = Meter(topk=(1, 5))
    again.load_state_dict(meter.state_dict())
    assert math.isnan(again.loss) and math.isnan(again.top1)


def test_top_5_with_ties_against_numpy():
    logits, labels = torch.randint(3, (200, 9)).float(), torch.randint(9, (200,))
    meter = Meter((1, 5))
    meter.update(torch.tensor(0.0), logits, labels)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")  # of equal logits the lower class first
    for k in (1, 5):
        hits = [label in row[:k] for row, label in zip(order, labels.numpy(), strict=True)]
        assert meter.top(k) == pytest.approx(100 * np.mean(hits))


def test_ties_go_to_the_lower_class_and_nan_is_never_correct():
    logits = torch.zeros(4, 6)
    assert ranks(logits, torch.tensor([0, 1, 4, 5])).tolist() == [0, 1, 4, 5]
    for bad in (torch.full((1, 6), float("nan")), torch.tensor([[1.0, float("nan"), 0, 0, 0, 0]])):
        assert all(ranks(bad, torch.tensor([label])).item() >= 1 for label in range(6))


def test_top_1_alone_counts_what_ranks_count():
    logits = torch.randint(-2, 3, (600, 6)).float()  # many are equal
    logits[torch.rand(600, 6) < 0.05] = float("nan")
    logits[torch.rand(600, 6) < 0.05] = float("inf")
    labels = torch.randint(6, (600,))
    for one, label, rank in zip(logits, labels, ranks(logits, labels), strict=True):
        (hit,) = count_hits(one[None], label[None], (1,))
        assert hit == (rank < 1)
    assert count_hits(logits, labels, (1,)) == count_hits(logits, labels, (1, 5))[:1]


def test_meter_keeps_no_graph():
    logits = torch.randn(4, 10, requires_grad=True)
    meter = Meter()
    meter.update(F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)), logits, torch.zeros(4, dtype=torch.long))
    assert not any(value.requires_grad for value in (meter.summed_loss, *meter.hits))


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_a_network_may_return_its_only_heads_logits():
    test = batches(8, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Dropout())
    (meter,) = evaluate(net, test)
    assert net.training
    net.eval()
    (listed,) = evaluate(lambda_module(lambda images: [net(images)]), test)
    assert torch.equal(meter.sums(), listed.sums()) and meter.count == 8


def batches(count, size):
    torch.manual_seed(1)
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    return [(images[start : start + size], labels[start : start + size]) for start in range(0, count, size)]


def test_one_pass_equals_evaluating_head_by_head():
    net = layerwise_cnn(channels=4, depth=4)
    net.train()
    test = batches(50, 16)
    passes = []
    together = evaluate(net, (passes.append(1) or batch for batch in test))
    assert len(passes) == len(test)
    net.eval()
    for index, meter in enumerate(together):
        correct, loss = 0, 0.0
        for images, labels in test:
            representation = images
            with torch.no_grad():
                for module in net[: index + 1]:
                    representation, logits = module(representation)
            correct += (logits.argmax(1) == labels).sum().item()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
        assert meter.top1 == 100 * correct / 50
        assert meter.loss == pytest.approx(loss / 50, rel=1e-5)
        (alone,) = evaluate(net, test, heads=[index])
        assert (alone.top1, alone.loss) == (meter.top1, meter.loss)


def test_evaluation_changes_nothing():
    net = layerwise_cnn(channels=4, depth=2)
    net.train()
    net[0].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    evaluate(net, batches(8, 8))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net[0].body[1].training and net[1].training


@pytest.mark.parametrize("probabilities", [True, False])
def test_heads_and_their_ensembles_in_one_pass(probabilities):
    """Of probabilities, not logits, or the other way round: here the two have other values."""
    logits = [torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 3.9]]), torch.tensor([[-50.0, 0.0, 0.1]])]
    outputs = WithEnsembles(lambda_module(lambda images: logits), probabilities)(None)
    of_heads = [head.numpy().astype(float) for head in logits]
    if probabilities:
        of_heads = [np.exp(head) / np.exp(head).sum() for head in of_heads]
    first, second, third = of_heads
    expected = [first, (first + 2 * second) / 3, (first + 2 * second + 4 * third) / 7]
    for mine, its in zip(outputs, [*logits, *expected], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5)


def test_ensembles_against_numpy():
    outputs = [torch.randn(5, 7) for _ in range(4)]
    for n, ensemble in enumerate(ensembles(outputs)):
        weights = np.array([2**i / (2 ** (n + 1) - 1) for i in range(n + 1)])
        assert weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(
            ensemble.numpy(),
            np.tensordot(weights, np.stack([o.numpy() for o in outputs[: n + 1]]), 1),
            rtol=1e-5,
            atol=1e-6,
        )
