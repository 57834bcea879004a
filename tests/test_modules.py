"""Networks and auxiliary networks: the layers and parameter counts of the paper's experiments."""

import itertools

import pytest
import torch
from torch import nn

from decoupled import InputError
from decoupled.analysis.costs import peak_memory
from decoupled.networks.auxiliary import AveragePool, make_auxiliary
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import (
    DecoupledModule,
    DecoupledNetwork,
    eval_mode,
    group_layers,
    output_shape,
    split_evenly,
)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_learning_curves_network_has_the_released_parameter_counts():
    net = layerwise_cnn(channels=64, depth=4)
    assert [count(module.body) for module in net] == [1_920, 74_112, 147_840, 295_680]
    # The released counts less the batch norm (2C) that the released auxiliaries and head build and never use.
    released = [214_282, 846_346, 846_346, 2_114_058]
    assert [count(module.auxiliary) for module in net] == [
        n - 2 * c for n, c in zip(released, (64, 128, 128, 256), strict=True)
    ]


def test_aux_nets_network_has_the_released_parameter_counts():
    net = layerwise_cnn(channels=128, depth=6)
    assert [count(module.body) for module in net] == [3_840, 295_680, 590_592, 1_181_184, 2_360_832, 2_360_832]
    assert count(net[-1].auxiliary) == 8_422_410 - 2 * 512


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", 3 * (256 * 256 + 256 + 2 * 256) + 2570),
        ("mlp-sr", 3 * (64 * 64 + 2 * 64) + 3 * (256 * 256 + 256 + 2 * 256) + 2570),
        ("cnn", 2 * (9 * 64 * 64 + 2 * 64) + 2 * 64 + 2570),
    ],
)
def test_auxiliary_parameter_counts(name, expected):
    assert count(make_auxiliary(name, (64, 32, 32), 10)) == expected


def kinds(module):
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


def test_auxiliary_layers_are_those_of_the_paper():
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(make_auxiliary("mlp", (8, 32, 32), 10)) == ["AveragePool"] * 2 + ["Flatten", *hidden * 3, "Linear"]
    conv = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(make_auxiliary("mlp-sr", (8, 32, 32), 10)) == [
        "AveragePool",
        *conv * 3,
        "AveragePool",
        "Flatten",
        *hidden * 3,
        "Linear",
    ]
    assert kinds(make_auxiliary("cnn", (8, 32, 32), 10)) == [
        *conv * 2,
        "AveragePool",
        "BatchNorm2d",
        "Flatten",
        "Linear",
    ]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_average_pool_is_pytorchs(dtype, layout):
    """Forward and backward, to the bit where a window has 2^n elements; windows of different sizes included."""
    for sides, size in [
        ((32, 32), 8),
        ((8, 8), (2, 2)),
        ((8, 16), (2, 1)),
        ((4, 4), 4),
        ((49, 98), (1, 2)),
        ((7, 7), 2),
    ]:
        representation = torch.randn(3, 5, *sides, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        expected = torch.nn.AdaptiveAvgPool2d(size)(representation)
        pooled = AveragePool(size)(representation)
        assert torch.equal(pooled, expected)
        gradient = torch.randn(3, 5, *expected.shape[2:], dtype=dtype)  # in the layout that flattening leaves
        (right,) = torch.autograd.grad(expected, representation, gradient)
        (given,) = torch.autograd.grad(pooled, representation, gradient)
        if sides == (49, 98):
            torch.testing.assert_close(given, right)
        else:
            assert torch.equal(given, right)
        assert given.stride() == representation.stride()


def test_average_pools_backward_pass_makes_no_tensor_larger_than_its_inputs_gradient():
    representation = torch.randn(2, 4, 8, 8, requires_grad=True)
    pooled, gradient = AveragePool(2)(representation), torch.randn(2, 4, 2, 2)
    memory = peak_memory(lambda: torch.autograd.grad(pooled, representation, gradient))
    assert memory == 4 * (representation.numel() + gradient.numel())


@pytest.mark.parametrize(
    ("size", "reduced"),
    [
        ((32, 32), (8, 8)),
        ((16, 16), (4, 4)),
        ((8, 8), (2, 2)),
        ((7, 7), (2, 2)),
        ((4, 4), (1, 1)),
        ((1, 1), (1, 1)),
        ((9, 20), (3, 5)),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "mlp-sr"])
def test_pooled_sizes(name, size, reduced):
    sizes = []
    net = make_auxiliary(name, (4, *size), 10)
    net[0].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    assert net(torch.randn(2, 4, *size)).shape == (2, 10)
    assert sizes == [reduced]


def test_cnn_auxiliary_works_at_full_size():
    sizes = []
    net = make_auxiliary("cnn", (4, 7, 9), 10)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert net(torch.randn(2, 4, 7, 9)).shape == (2, 10)
    assert sizes == [(4, 7, 9), (4, 7, 9)]


def test_an_unknown_auxiliary_is_an_input_error():
    with pytest.raises(InputError, match="vgg"):
        layerwise_cnn(channels=4, auxiliary="vgg")


def test_down_sampling_comes_first_in_its_module_and_doubles_the_channels():
    net = layerwise_cnn(channels=4, depth=4)
    assert [isinstance(module.body[0], nn.MaxPool2d) for module in net] == [False, True, False, True]
    representation, shapes = torch.randn(2, 3, 32, 32), []
    for module in net:
        representation, logits = module(representation)
        shapes.append(tuple(representation.shape[1:]))
        assert logits.shape == (2, 10)
    assert shapes == [(4, 32, 32), (8, 16, 16), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize(
    ("block_size", "convs"), [(1, [1] * 6), (2, [2, 2, 2]), (3, [3, 3]), (4, [4, 2]), (5, [5, 1]), (6, [6])]
)
def test_block_sizes(block_size, convs):
    net = layerwise_cnn(channels=4, depth=6, block_size=block_size)
    assert [sum(isinstance(layer, nn.Conv2d) for layer in module.body) for module in net] == convs
    assert [tuple(logits.shape) for logits in net(torch.randn(2, 3, 32, 32))] == [(2, 10)] * len(convs)


def test_batch_norm_weights_start_uniform_as_in_the_published_runs_and_nothing_else_changes():
    torch.manual_seed(3)
    net = layerwise_cnn(channels=64, depth=4)
    norms = [layer for layer in net.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert len(norms) == 4 + 3 * 6 + 2
    weights = torch.cat([norm.weight.detach() for norm in norms])
    histogram = torch.histc(weights, 10, 0, 1) / len(weights)
    assert weights.min() >= 0 and weights.max() <= 1 and (histogram - 0.1).abs().max() < 0.02
    assert not any(norm.bias.any() for norm in norms)
    torch.manual_seed(3)
    first = nn.Conv2d(3, 64, 3, padding=1)  # PyTorch's default
    assert torch.equal(net[0].body[0].weight, first.weight) and torch.equal(net[0].body[0].bias, first.bias)


@pytest.mark.parametrize("block_size", [0, -1, 7])
def test_impossible_block_sizes(block_size):
    with pytest.raises(InputError):
        layerwise_cnn(channels=4, depth=6, block_size=block_size)


def test_layers_in_groups():
    assert group_layers(list("abcde"), 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert split_evenly(list("abcde"), 2) == [["a", "b", "c"], ["d", "e"]]
    assert [len(group) for group in split_evenly(list(range(58)), 4)] == [15, 15, 15, 13]
    # Groups of 4 alone would be 15
    assert [len(group) for group in split_evenly(list(range(58)), 16)] == [4] * 10 + [3] * 6
    for splits in range(1, 59):
        groups = split_evenly(list(range(58)), splits)
        assert len(groups) == splits
        assert list(itertools.chain(*groups)) == list(range(58))
    for splits in (0, 6):
        with pytest.raises(InputError):
            split_evenly(list("abcde"), splits)


def test_heads_asked_for_are_those_of_the_whole_and_nothing_above_is_run():
    net = layerwise_cnn(channels=4, depth=4).eval()
    images = torch.randn(2, 3, 32, 32)
    every = net(images)
    ran = []
    for index, module in enumerate(net):
        module.body.register_forward_hook(lambda module, inputs, output, index=index: ran.append(index))
    (second,) = net(images, heads=[1])
    assert torch.equal(second, every[1])
    assert ran == [0, 1]
    third, first = net(images, heads=[2, 0])
    assert torch.equal(third, every[2]) and torch.equal(first, every[0])


@pytest.mark.parametrize("heads", [[-1], [4], [0, 7]])
def test_a_head_that_does_not_exist_is_an_error(heads):
    net = layerwise_cnn(channels=4, depth=4).eval()
    with pytest.raises(IndexError, match=f"{heads[-1]}.*0 to 3"):
        net(torch.randn(2, 3, 32, 32), heads=heads)


def test_probing_a_shape_leaves_the_body_as_it_was():
    body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(2).eval())
    before = {key: value.clone() for key, value in body.state_dict().items()}
    random = torch.get_rng_state()
    assert output_shape(body[:2], (3, 9, 7)) == (4, 4, 3)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    assert body[0].training and body[1].training and not body[2].training
    assert torch.equal(random, torch.get_rng_state())


def test_eval_mode_restores_each_module():
    net = DecoupledNetwork(
        [DecoupledModule(nn.BatchNorm2d(3), nn.Flatten()), DecoupledModule(nn.BatchNorm2d(3), nn.Flatten())]
    )
    net[0].eval()
    with pytest.raises(ZeroDivisionError), eval_mode(net):
        assert not net[1].training
        raise ZeroDivisionError
    assert not net[0].body.training and net[1].body.training and net.training
