import copy

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.analysis.costs import costs, peak_memory, relative_cost
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork

KIB = 1024


def kib(count):
    """A float32 tensor of ``count`` KiB."""
    return torch.ones(count, 256)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Peak memory


def test_peak_is_the_largest_sum_alive_at_once():
    def step():
        first = kib(1)
        second = kib(2)
        del first
        third = kib(4)  # 2 + 4
        del second, third
        kib(5)

    assert peak_memory(step) == 6 * KIB


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_chain_without_gradient_frees_each_operand(device):
    layers = [nn.Linear(16, width, device=device) for width in (16,)] + [
        nn.Linear(16, 64, device=device),
        nn.Linear(64, 32, device=device),
    ]
    images = torch.ones(16, 16, device=device)

    @torch.no_grad()
    def step():
        output = images
        for layer in layers:
            output = layer(output)  # 1 KiB, then 1 + 4, then 4 + 2

    assert peak_memory(step, device) == 6 * KIB


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_chain_with_gradient_keeps_activations_until_backward(device):
    first, second = (nn.Linear(16, 16, bias=False, device=device) for _ in range(2))
    images = torch.ones(64, 16, device=device)  # 4 KiB, as every activation; weights 1 KiB

    def step():
        output = second(first(images))  # 4 + 4
        output.backward(
            torch.ones_like(output)
        )  # + 4; then second's gradient 1, its input's 4; then that input goes before first's gradient 1 comes

    assert peak_memory(step, device) == (8 + 4 + 1 + 4) * KIB
    assert first.weight.grad is not None


def test_views_and_in_place_results_count_once():
    def step():
        values = kib(8)
        view = values.view(-1)[10:].reshape(-1, 1)
        view.transpose(0, 1).add_(1).relu_()
        values.mul_(2)
        torch.exp(values, out=values)
        assert view.untyped_storage().nbytes() == 8 * KIB

    assert peak_memory(step) == 8 * KIB


def test_view_keeps_its_storage_alive():
    def step():
        view = kib(8)[:1]
        other = kib(1)
        return view, other

    assert peak_memory(step) == 9 * KIB


def test_storages_from_before_do_not_count():
    before, out = kib(8), kib(8)

    def step():
        before.add_(1)
        torch.exp(before.view(-1), out=out.view(-1))
        return before[:2].detach(), before.to(torch.float32)

    assert peak_memory(step) == 0


def test_freed_memory_is_reused_however_often():
    def step():
        for _ in range(20):
            kib(3)

    assert peak_memory(step) == 3 * KIB


def test_tensors_from_python_numbers_and_inside_inference_mode_count():
    def step():
        return torch.tensor([0.0] * 256)

    @torch.inference_mode()
    def pool():
        return F.max_pool2d(images, 2)  # 1 KiB and, until it returns, int64 indices

    images = torch.ones(1, 4, 16, 16)
    assert peak_memory(step) == KIB
    assert peak_memory(pool) == 3 * KIB


def test_peak_memory_leaves_no_trace():
    before = kib(1)
    first = peak_memory(lambda: before + 1)
    kept = before * 2  # made after the first measurement
    assert peak_memory(lambda: kept + before) == first == KIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda_is_the_allocators():
    def step():
        torch.ones(4, 256, device="cuda")
        return torch.ones(2, 256, device="cuda")

    assert peak_memory(step, "cuda") == 4 * KIB


def dgl_step(net, images, labels, summed=False):
    """Two steps of DGL; with ``summed``, one backward pass through the sum of the losses."""
    optimizers = [SGD(module.parameters(), lr=0.1, momentum=0.9) for module in net]

    def step():
        representation, losses = images, []
        for module, optimizer in zip(net, optimizers, strict=True):
            representation, logits = module(representation)
            loss = F.cross_entropy(logits, labels)
            if summed:
                losses.append(loss)
            else:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            representation = representation.detach()
        if summed:
            net.zero_grad()
            sum(losses).backward()
            for optimizer in optimizers:
                optimizer.step()

    return lambda: (step(), step())


def test_dgl_needs_less_memory_than_joint_backward_passes():
    depth = 4

    # The paper's claim: each module's graph is freed before the next module's forward pass.
    def net(block_size=1):
        with torch.device("meta"):
            return layerwise_cnn(channels=64, depth=depth, downsample=(), auxiliary="mlp-sr", block_size=block_size)

    images, labels = torch.empty(128, 3, 32, 32, device="meta"), torch.zeros(128, dtype=torch.int64, device="meta")
    dgl = peak_memory(dgl_step(net(), images, labels), "meta")
    summed = peak_memory(dgl_step(net(), images, labels, summed=True), "meta")
    backpropagation = peak_memory(dgl_step(net(block_size=depth), images, labels), "meta")
    activation = 128 * 64 * 32 * 32 * 4
    assert (
        summed - dgl > (2 * depth - 4) * activation
    )  # a module keeps two activations: of its convolution and of its ReLU
    assert backpropagation - dgl > (2 * depth - 4) * activation
    # and DGL's is nearly that of its costliest module alone, however many there are: parameters' memory is what is
    # added
    modules = costs(net(), images).xs("module", level="part")
    assert (
        modules["memory"].max() <= dgl < modules["memory"].max() + 2 * 4 * modules["parameters"].sum() + 2 * activation
    )


def test_peaks_on_meta_are_those_on_the_cpu():
    net, images = layerwise_cnn(channels=8, depth=3), torch.randn(4, 3, 32, 32)
    pd.testing.assert_frame_equal(costs(net, images), costs(net.to("meta"), images.to("meta")))


# Costs


def linear_pair(inputs, width, classes, body=True):
    return DecoupledModule(
        nn.Linear(inputs, width, bias=False) if body else nn.Flatten(), nn.Linear(width, classes, bias=False)
    )


def test_costs_of_a_linear_module_by_hand():
    batch, inputs, width, classes = 7, 6, 5, 3
    frame = costs(DecoupledNetwork([linear_pair(inputs, width, classes)]), torch.randn(batch, inputs))
    body, auxiliary, module = (frame.loc[1, part] for part in ("body", "auxiliary", "module"))
    assert list(frame.index) == [(1, "body"), (1, "auxiliary"), (1, "module")]
    assert (body["parameters"], auxiliary["parameters"], module["parameters"]) == (30, 15, 45)
    assert (body["flops"], auxiliary["flops"], module["flops"]) == (60, 30, 90)
    # forward and gradient of the weight; the auxiliary's input needs its gradient too
    assert (body["training_flops"], auxiliary["training_flops"], module["training_flops"]) == (
        2 * 60,
        3 * 30,
        2 * 60 + 3 * 30,
    )
    # Body alone, second step, backward: output, scalar loss and its gradient, the output's gradient; momentum, weight's
    # gradient
    assert body["memory"] == 4 * (2 * batch * width + 2 + 2 * 30)


def test_costs_of_a_module_without_parameters_in_its_body():
    frame = costs(DecoupledNetwork([linear_pair(6, 6, 3, body=False)]), torch.randn(7, 6))
    assert frame.loc[(1, "body"), ["parameters", "flops", "training_flops", "memory"]].tolist() == [
        0,
        0,
        0,
        4,
    ]  # a scalar loss
    assert (
        frame.loc[(1, "auxiliary"), "training_flops"] == 2 * frame.loc[(1, "auxiliary"), "flops"]
    )  # nothing below needs a gradient


def test_costs_of_the_learning_curves_network():
    with torch.device("meta"):
        frame = costs(layerwise_cnn(), torch.empty(8, 3, 32, 32))
    parts = {part: frame.xs(part, level="part") for part in ("body", "auxiliary", "module")}
    # The released counts; an MLP-SR auxiliary there has 2C more, of a batch norm that it never uses.
    assert parts["body"]["parameters"].tolist() == [1920, 74112, 147840, 295680]
    assert parts["auxiliary"]["parameters"].tolist() == [214282 - 128, 846346 - 256, 846346 - 256, 2114058 - 512]
    assert parts["body"]["flops"].tolist() == [
        2 * 9 * 3 * 64 * 32**2,
        2 * 9 * 64 * 128 * 16**2,
        2 * 9 * 128 * 128 * 16**2,
        2 * 9 * 128 * 256 * 8**2,
    ]
    assert parts["auxiliary"]["flops"][2] == 2 * (3 * 128**2 * 4**2 + 3 * 512**2 + 512 * 10)
    for column in ("parameters", "flops", "training_flops"):
        pd.testing.assert_series_equal(parts["body"][column] + parts["auxiliary"][column], parts["module"][column])
    # One layer a module: no gradient of the module's input, so twice the forward; the auxiliary's input has one
    pd.testing.assert_series_equal(parts["body"]["training_flops"], 2 * parts["body"]["flops"], check_names=False)
    pd.testing.assert_series_equal(
        parts["auxiliary"]["training_flops"], 3 * parts["auxiliary"]["flops"], check_names=False
    )
    assert parts["module"]["training_flops"].sum() == pytest.approx(0.347e9, rel=2e-3)
    assert (parts["module"]["memory"] > parts["body"]["memory"]).all() and (
        parts["module"]["memory"] > parts["auxiliary"]["memory"]
    ).all()


def test_blocks_of_layers_back_propagate_inside():
    with torch.device("meta"):
        frame = costs(layerwise_cnn(channels=16, depth=2, downsample=(), block_size=2), torch.empty(2, 3, 32, 32))
    first, second = 2 * 9 * 3 * 16 * 32**2, 2 * 9 * 16 * 16 * 32**2
    assert frame.loc[(1, "body"), "training_flops"] == 2 * first + 3 * second


@pytest.mark.parametrize("name, low, high", [("cnn", 200, 200.1), ("mlp-sr", 4, 4.5), ("mlp", 2, 2.2)])
def test_relative_cost_where_channels_stay(name, low, high):
    with torch.device("meta"):
        net = layerwise_cnn(channels=128, depth=4, auxiliary=name)
    relative = relative_cost(costs(net, torch.empty(2, 3, 32, 32, device="meta")))
    assert list(relative.index) == [1, 2, 3, 4]
    assert (
        low <= relative[3] <= high
    )  # 256 → 256 channels at 16×16: CNN-aux is two convolutions more (and a small Linear)


@pytest.mark.parametrize("training", [True, False])
def test_costs_leave_the_network_as_it_was(training):
    net = layerwise_cnn(channels=8, depth=3, downsample=(1,))
    net[1].body.append(nn.Dropout(0.5))
    net.train(training)
    net[0].body.eval()
    net[0].auxiliary.requires_grad_(False)
    net[2].body[0].weight.grad = torch.ones_like(net[2].body[0].weight)
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    images = torch.randn(4, 3, 32, 32)
    untouched, random = images.clone(), torch.get_rng_state()
    costs(net, images)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["2.body.0.weight"]
    assert (net[2].body[0].weight.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(images, untouched) and not images.requires_grad
