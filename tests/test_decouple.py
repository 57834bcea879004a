"""Any model cut into modules: the modules are the model, learn on their own, and what cannot be cut is explained.

The smallest classifier of each family of torchvision is cut, most on the meta device. TORCHVISION=all cuts all of them
for real: some minutes, and 10 GB of memory for the largest. Models of timm and transformers are cut where these are
installed.
"""

import copy
import io
import itertools
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from running import load_script
from torch import nn
from torch.nn import functional as F

from decoupled import InputError, cuts, decouple
from decoupled.analysis import costs
from decoupled.networks.evaluation import evaluate
from decoupled.networks.tracing import logits_of

CLASSES = 10
TORCHVISION = load_script("imagenet/greedy_torchvision.py")


def images(batch=4, size=32):
    return torch.randn(batch, 3, size, size)


class Convolutional(nn.Module):
    """Functions between its layers, dropout that follows the mode, and a constant made in its forward."""

    def __init__(self, drop=0.5):
        super().__init__()
        self.drop = drop
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.third = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("scale", torch.tensor(2.0))
        self.last = nn.Linear(8, CLASSES)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.norm(self.first(images))), 2)
        x = F.relu(self.second(x) * self.scale + torch.tensor([0.5]))
        x = self.third(x)
        x.add_(self.shift)
        x = F.relu(x, inplace=True)
        x = F.dropout(x.mean((2, 3)), self.drop, training=self.training)
        return self.last(x)


class Attention(nn.Module):
    """Attention as it is often written: sizes of its input, an assertion about them, and a branch."""

    def __init__(self, width, causal=False):
        super().__init__()
        self.causal = causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        assert width % 2 == 0, "two heads"
        if tokens > 1000:
            raise ValueError("too many tokens")
        heads = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    def __init__(self, width, causal=False):
        super().__init__()
        self.attention, self.norm = Attention(width, causal), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, hidden, cache=None, **options):
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.mlp(hidden), cache


class OwnViT(nn.Module):
    """Patches, a class token, positions, and layers that return tuples."""

    def __init__(self, width=16, depth=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(17, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        if x.shape[1] + 1 != len(self.positions):
            raise ValueError("images of another size")
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(self.norm(x)[:, 0])


class Answer:
    def __init__(self, logits):
        self.logits = logits


class LanguageModel(nn.Module):
    """Logits for each token, in an object; a mask and positions made in the forward; a head that is the embedding."""

    def __init__(self, width=16, depth=4, tied=True):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(CLASSES, width), nn.Embedding(32, width)
        self.layers = nn.ModuleList(Layer(width, causal=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, labels=None, **options):
        if tokens.shape[1] > 32:
            raise IndexError("too many tokens")
        hidden = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            hidden = layer(hidden, **options)[0] * self.scale
        return Answer(self.head(self.norm(hidden)))


class Dictionary(LanguageModel):
    """Logits for each sequence, in a dictionary."""

    def forward(self, tokens):
        return {"loss": None, "logits": super().forward(tokens).logits[:, -1]}


class Recurrent(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, width), nn.Linear(width, CLASSES)
        self.rnns = nn.ModuleList(
            (nn.LSTM(width, width, batch_first=True), nn.GRU(width, width, batch_first=True), nn.LSTM(width, width))
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        x, _ = self.rnns[0](x)
        x, _ = self.rnns[1](x)
        x, (state, _) = self.rnns[2](x.transpose(0, 1))
        return self.head(x[-1] + state[0])


def double(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Skips cross its inside; below and above them it can be cut. One logit per class and pixel."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.bottom = double(3, 4), double(4, 8), double(8, 8)
        self.up, self.refine, self.head = double(16, 4), double(4 + 4, 4), double(4, 4)
        self.out = nn.Conv2d(4, CLASSES, 1)

    def forward(self, images):
        stem = self.stem(images)
        down = self.down(F.max_pool2d(stem, 2))
        bottom = self.bottom(F.max_pool2d(down, 2))
        x = self.up(torch.cat([down, F.interpolate(bottom, scale_factor=2.0)], 1))
        x = self.refine(torch.cat([stem, F.interpolate(x, scale_factor=2.0)], 1))
        return self.out(self.head(x))


class Encoder(nn.Module):
    """PyTorch's own encoder, cut between its layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.embedding, self.head = nn.Linear(3, 16), nn.Linear(16, CLASSES)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Counting(nn.Module):
    """Changes a buffer in its forward, in train mode alone, and so has to stay whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.steps.add_(1)
        return self.second(self.first(x))


def counting():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), Counting(), nn.Linear(8, 8), nn.Linear(8, CLASSES))


def vit():
    return torchvision.models.VisionTransformer(32, 8, 4, 2, 16, 32, dropout=0.1, num_classes=CLASSES)


def swin():
    settings = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": [2, 2]}
    return torchvision.models.SwinTransformer(**settings, num_classes=CLASSES)


def convnext():
    from torchvision.models.convnext import CNBlockConfig

    return torchvision.models.ConvNeXt(
        [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.5, num_classes=CLASSES
    )


def torchvision_model(name):
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


def tokens():
    return torch.randint(CLASSES, (4, 6))


MODELS = {
    "functions": (Convolutional, images),
    "counting": (counting, images),
    "vit": (vit, images),
    "swin": (swin, images),
    "convnext": (convnext, images),
    "own vit": (OwnViT, images),
    "dictionary": (Dictionary, tokens),
    "recurrent": (Recurrent, tokens),
    "encoder": (Encoder, lambda: torch.randn(4, 5, 3)),
    "resnet18": (torchvision_model("resnet18"), images),
    "mobilenet_v3_small": (torchvision_model("mobilenet_v3_small"), images),
    "shufflenet_v2_x0_5": (torchvision_model("shufflenet_v2_x0_5"), images),
    "squeezenet1_1": (torchvision_model("squeezenet1_1"), images),
}


def outcome(network, inputs, labels, training):
    """Logits, gradients of all parameters and buffers after a pass through ``network``, a list of modules in turn."""
    torch.manual_seed(5)
    for module in network:
        module.train(training)
        module.zero_grad()
    value = inputs
    for module in network:
        value = module(value)
    value = logits_of(value)
    F.cross_entropy(value.flatten(0, -2), labels.flatten()).backward()
    return value


def assert_is_the_model(net, model, inputs, labels, exact=True):
    """That the bodies of ``net``, cut from ``model``, do what it does: logits, gradients and buffers, in both modes."""
    bodies = [module.body for module in net]
    for training in (True, False):
        start = [buffer.clone() for buffer in model.buffers()]
        expected = outcome([model], inputs, labels, training)
        gradients = [parameter.grad for parameter in model.parameters()]
        buffers = [buffer.clone() for buffer in model.buffers()]
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), start, strict=True):
                buffer.copy_(value)
        assert torch.equal(outcome(bodies, inputs, labels, training), expected)
        for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None), key
            if gradient is not None:
                assert torch.equal(parameter.grad, gradient) or not exact, key
                assert torch.allclose(parameter.grad, gradient, atol=1e-5), key
        assert all(torch.equal(one, other) for one, other in zip(model.buffers(), buffers, strict=True))


def assert_names_are_the_models(net, model):
    assert {name.split(".body.")[1] for name in net.state_dict() if ".body." in name} <= set(model.state_dict())
    names = [name.split(".body.")[1] for name, _ in net.named_parameters() if ".body." in name]
    assert len(names) == len(set(names))
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert {name for name, _ in model.named_parameters()} - unused <= set(names)


def pickled(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("name", "splits"), [("functions", 2), *((name, 4) for name in MODELS)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_modules_are_the_model_in_logits_gradients_buffers_and_names(name, splits):
    build, inputs = MODELS[name]
    model, inputs, labels = build(), inputs(), torch.arange(4)
    net = decouple(model, inputs, splits=splits, classes=CLASSES)
    assert len(net) == splits
    assert_is_the_model(net, model, inputs, labels)
    outcome([model], inputs, labels, training=True)
    assert_names_are_the_models(net, model)
    for clone in (pickled, copy.deepcopy):
        twin = clone(net)
        assert list(twin.state_dict()) == list(net.state_dict())
        for training in (True, False):
            torch.manual_seed(3)
            expected = net.train(training)(inputs)
            torch.manual_seed(3)
            assert all(map(torch.equal, twin.train(training)(inputs), expected))


@pytest.mark.parametrize("name", ["functions", "vit", "own vit", "dictionary", "recurrent", "resnet18"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ten_lines_train_the_model_in_place_and_no_gradient_crosses(name):
    build, inputs = MODELS[name]
    model, inputs, labels = build(), inputs(), torch.arange(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    net = decouple(model, inputs, splits=3).train()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in net]
    representation = inputs
    for module, optimizer in zip(net, optimizers, strict=True):
        others = {id(p) for other in net if other is not module for p in other.parameters()}
        assert not others & {id(p) for p in module.parameters()}
        representation, logits = module(representation)
        assert logits.shape == (4, CLASSES)
        loss = F.cross_entropy(logits, labels)
        net.zero_grad()
        loss.backward()
        touched = {id(p) for p in net.parameters() if p.grad is not None}
        assert touched and touched <= {id(p) for p in module.parameters()}
        optimizer.step()
        representation = representation.detach()
    assert list(model.state_dict()) == list(before)
    learnt = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
    # A layer before batch norm may have a bias without effect; stochastic depth leaves layers out.
    assert len(learnt) > 0.5 * len(list(model.named_parameters()))
    assert {id(p) for p in model.parameters()} <= {id(p) for p in net.parameters()}
    model.eval()
    net.eval()
    assert torch.equal(net(inputs)[-1], logits_of(model(inputs)))


def test_the_model_stays_as_it_was():
    model = torchvision_model("resnet18")()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    before, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    inputs = torch.ones(2, 3, 32, 32)
    cuts(model, inputs)
    assert torch.equal(random, torch.get_rng_state())
    decouple(model, inputs, at=["layer2"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model.layer2[0].training and not model.layer1[0].training
    assert not model.fc.weight.requires_grad and model.conv1.weight.requires_grad
    assert bool((inputs == 1).all())


def test_cuts_lists_shapes_and_shares_of_the_flops():
    model, inputs = torchvision_model("resnet18")(), images(2, 64)
    frame = cuts(model, inputs)
    blocks = [f"layer{stage}{block}" for stage in (1, 2, 3, 4) for block in (".0", "")]
    assert list(frame.index) == ["conv1", "relu", "maxpool", *blocks, "avgpool", "flatten()"]
    assert frame.loc["layer2", "shape"] == (128, 8, 8)
    for name in ("conv1", "layer1.0", "layer3"):
        body = decouple(model, inputs, at=[name])[0].body
        share = costs.count_flops(lambda body=body: body(inputs)) / costs.count_flops(lambda: model(inputs))
        assert frame.loc[name, "flops"] == share


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_the_largest_module_is_as_small_as_can_be(splits):
    model, inputs = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise([7, 3, 9, 8, 2, 6, 6, 9, 4]))), None
    inputs = torch.randn(3, 7)
    flops = [layer.weight.numel() for layer in model]
    best = min(
        sorted((sum(flops[a:b]) for a, b in itertools.pairwise((0, *at, len(flops)))), reverse=True)
        for at in itertools.combinations(range(1, len(flops)), splits - 1)
    )
    net = decouple(model, inputs, splits=splits)
    got = [sum(p.numel() for p in module.body.parameters() if p.dim() == 2) for module in net]
    assert sorted(got, reverse=True) == best


def test_cuts_are_between_large_parts_where_that_costs_little_and_after_what_has_no_flops():
    model = torchvision_model("resnet18")()
    net = decouple(model, images(2, 64), splits=4)
    assert [sorted(dict(module.body.named_children())) for module in net] == [
        ["bn1", "conv1", "layer1", "maxpool", "relu"],
        ["layer2"],
        ["layer3"],
        ["avgpool", "fc", "layer4"],
    ]


def test_names_choose_the_cuts_in_any_order_and_by_any_name_of_a_place():
    model = torchvision_model("resnet18")()
    net = decouple(model, images(), at=["layer3.1", "layer1"])
    assert len(net) == 3 and net[0].body.layer1 is not None and not hasattr(net[0].body, "layer2")
    assert getattr(net[1].body.layer2, "0") is model.layer2[0]
    assert len(decouple(model, images(), at="layer1")) == 2
    assert len(decouple(model, images(), splits=1)) == 1


def kinds(module):
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


def test_auxiliaries_read_the_channels_of_either_layout_and_of_tokens():
    swin_net = decouple(swin(), images(), splits=2, auxiliary="cnn")
    assert kinds(swin_net[0].auxiliary)[:2] == ["ToChannelsFirst", "Conv2d"]
    representation = swin_net[0].body(images())
    assert swin_net[0].auxiliary[1][0].in_channels == representation.shape[-1] == 12
    vit_net = decouple(vit(), images(), splits=2)
    assert kinds(vit_net[0].auxiliary)[:3] == ["ToChannelsFirst", "AdaptiveAvgPool1d", "Conv1d"]
    assert vit_net[0].auxiliary[1][0].output_size == 5  # of 17 tokens
    vit_net.eval()
    hidden = vit_net[0].body(images())
    means = hidden[:, :4].mean(1, keepdim=True).expand(-1, 17, -1)
    mean = decouple(vit(), images(), splits=2, auxiliary="mlp", hidden_layers=0)[0].auxiliary
    expected = F.linear(hidden.mean(1), mean[1][-1][0].weight, mean[1][-1][0].bias)
    assert torch.allclose(mean(hidden), expected, atol=1e-6) and not torch.allclose(mean(means), expected, atol=1e-6)
    vector = decouple(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)), torch.randn(4, 5), splits=2)[0].auxiliary
    assert vector(torch.randn(4, 6)).shape == (4, 3)


def test_the_blocks_in_the_docs_run(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "own_networks.md").read_text()
    training, auxiliaries, *_ = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(training, names)
    assert len(names["net"](names["images"])) == 4
    assert capsys.readouterr().out.count(" %\n") == 2 * 4 and (tmp_path / "model.pt").is_file()
    exec(auxiliaries, names)
    assert kinds(names["net"][0].auxiliary).count("Linear") == 2  # one hidden layer


def test_options_and_an_own_auxiliary():
    model = torchvision_model("resnet18")()
    short = decouple(model, images(), at=["layer1"], auxiliary="mlp-sr", convs=1, hidden_layers=0)[0].auxiliary
    assert kinds(short) == [
        "AveragePool",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "AveragePool",
        "Flatten",
        "Linear",
    ]
    asked = []

    def linear(shape, classes):
        asked.append((shape, classes))
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    for maps_or_tokens, inputs in ((model, images()), (vit(), images()), (LanguageModel(tied=False), tokens())):
        with pytest.raises(TypeError, match="convs"):
            decouple(maps_or_tokens, inputs, splits=2, auxiliary="mlp", convs=1)

    net = decouple(model, images(), at=["layer1", "layer2"], auxiliary=linear)
    assert asked == [((64, 8, 8), CLASSES), ((128, 4, 4), CLASSES)]
    assert net[1].auxiliary(torch.randn(2, 128, 4, 4)).shape == (2, CLASSES)


def test_evaluation_costs_and_compilation_take_the_network():
    model, inputs = vit(), images(2)
    net = decouple(model, inputs, splits=3)
    frame = costs.costs(net, inputs)
    forward = frame.loc[(slice(None), "body"), "flops"].sum()
    with torch.no_grad():
        assert forward == costs.count_flops(lambda: model.eval()(inputs)) / 2
    assert frame.loc[(3, "auxiliary"), "flops"] == 0 and (frame.loc[(slice(None), "module"), "memory"] > 0).all()
    meters = evaluate(net, [(inputs, torch.tensor([0, 1]))])
    assert len(meters) == 3
    net.eval()
    plain = net(inputs)
    assert torch.equal(net(inputs, heads=[1])[0], plain[1])
    assert torch.equal(copy.deepcopy(net)(inputs, heads=[2])[0], plain[2])


def test_modules_compile_whole_and_follow_the_mode():
    torch.compiler.reset()  # all modules share a forward, and the versions of it that other tests have compiled count
    inputs = images()
    net = decouple(Convolutional(drop=1.0), inputs, splits=2)
    for training in (False, True):
        expected = net.train(training)[1](net[0].body(inputs))[1]
        module = copy.deepcopy(net[1])
        module.compile(backend="eager", fullgraph=True)
        assert torch.allclose(module(net[0].body(inputs))[1], expected, atol=1e-6)
        if training:
            assert torch.equal(expected, net[1].body.last.bias.expand(4, -1))  # all was dropped
        else:
            assert not torch.allclose(expected[0], expected[1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.relu(self.layer(self.relu(self.layer(x)))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x) if x.sum() > 0 else x)


class Fixed(nn.Sequential):
    def forward(self, x):
        return super().forward(2 * x if torch.is_grad_enabled() else x)


def mlp(*widths):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


class Lists(nn.Module):
    """Branches in a list that a module changes in place, as in HRNet, and a token given to a module, as in CaiT."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.branches, self.head = nn.Linear(8, 8), Mix(), Branches(), nn.Linear(16, 3)
        self.token = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        x = self.mix(self.stem(x), self.token.expand(x.shape[0], -1))
        return self.head(torch.cat(self.branches([x, x]), 1))


class Mix(nn.Module):
    def forward(self, x, token):
        return x + token


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(8, 8, 8)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x[index] = layer(x[index])
        return x


def test_modules_may_be_given_lists_and_parameters():
    model = Lists()
    assert list(cuts(model, VECTORS).index) == ["stem", "mix", "cat()"]
    net = decouple(model, VECTORS, at=["mix"])
    assert torch.equal(net(VECTORS)[-1], model(VECTORS))


def holding_a_computed_tensor():
    model = mlp(8, 8, 3)
    model.cache = 2 * model[0].weight
    return model


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        first = self.first(x)
        return self.head(self.second(first)) + x[:, :3]


class NoLogits(nn.Sequential):
    def forward(self, x):
        return {"scores": super().forward(x)}


class Length(nn.Sequential):
    def forward(self, x):
        return super().forward(x.reshape(len(x), 8))


class ReadsItsInput(nn.Module):
    """As decoders for classification do, to find where padding begins."""

    def __init__(self):
        super().__init__()
        self.layers = LanguageModel(tied=False)

    def forward(self, tokens):
        logits = self.layers(tokens).logits
        return logits[torch.arange(tokens.shape[0]), (tokens != 0).sum(1) - 1]


VECTORS = torch.randn(4, 8)
ERRORS = {
    "nothing chosen": (mlp(8, 8, 3), VECTORS, {}, ["splits=K", "at=[names]"]),
    "no integer": (mlp(8, 8, 3), VECTORS, {"splits": 0}, ["splits", "0"]),
    "too few": (mlp(8, 8, 8, 3), VECTORS, {"splits": 4}, ["3 modules", "0, 1"]),
    "fixed batch size": (Length(*mlp(8, 8, 3)), VECTORS, {"splits": 2}, ["Length", "x.shape[0]"]),
    "misspelt": (vit(), images(), {"at": ["encoder.layer"]}, ["encoder.layer:", "encoder.layers"]),
    "end": (mlp(8, 8, 3), VECTORS, {"at": ["1"]}, ["after 1 ", "nearest places are 0"]),
    "nothing above": (
        nn.Sequential(mlp(8, 8, 3), nn.Identity()),
        VECTORS,
        {"at": ["0.1"]},
        ["after 0.1 ", "nearest places are 0.0"],
    ),
    "twice": (nn.Sequential(mlp(8, 8), nn.ReLU(), mlp(8, 3)), VECTORS, {"at": ["0", "1"]}, ["0 and 1"]),
    "residual": (
        torchvision_model("resnet18")(),
        images(),
        {"at": ["layer2.0.conv1"]},
        ["after layer2.0.conv1 ", "need layer1)", "nearest places are layer1, layer2.0, layer2"],
    ),
    "in place": (
        torchvision_model("resnet18")(),
        images(),
        {"at": ["bn1"]},
        ["after bn1 ", "in place", "nearest places are conv1, relu, maxpool"],
    ),
    "shared": (Tied(), VECTORS, {"at": ["layer"]}, ["layer.weight"]),
    "skips": (Skips(), VECTORS, {"splits": 2}, ["Skips cannot be cut", "after first, ", "test_decouple.py:"]),
    "branching": (Branching(), VECTORS, {"splits": 2}, ["Branching", "test_decouple.py:", "if x.sum() > 0"]),
    "input": (ReadsItsInput(), tokens(), {"splits": 2}, ["ReadsItsInput cannot be cut", "last_hidden_state"]),
    "fixed": (Fixed(*mlp(8, 8, 3)), VECTORS, {"splits": 2}, ["Fixed", "eval mode"]),
    "computed": (holding_a_computed_tensor(), VECTORS, {"splits": 2}, ["Sequential", "before it runs"]),
    "no logits": (NoLogits(*mlp(8, 8, 3)), VECTORS, {"splits": 2}, ["NoLogits", "dict"]),
    "head": (mlp(8, 8, 3), VECTORS, {"splits": 2, "classes": 4}, ["3 classes", "4"]),
    "other size": (mlp(8, 8, 3), torch.randn(4, 9), {"splits": 2}, ["(2, 9)"]),
    "no batch": (mlp(8, 8, 3), [1, 2], {"splits": 2}, ["example_input"]),
    "ambiguous": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 3)),
        images(size=8),
        {"at": ["0"]},
        ["(8, 8, 8) after 0", "layout=channels_first or channels_last"],
    ),
    "not square": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 8 * 9, 3)),
        torch.randn(2, 3, 8, 9),
        {"at": ["0"]},
        ["layout="],
    ),
    "layout": (mlp(8, 8, 3), VECTORS, {"splits": 2, "layout": "nchw"}, ["'nchw'", "channels_first, channels_last"]),
    "unknown auxiliary": (vit(), images(), {"splits": 2, "auxiliary": "cnn"}, ["cnn", "mlp"]),
    "no place near": (
        Skips(),
        VECTORS,
        {"at": ["second"]},
        ["Skips", "second (", "test_decouple.py:", "docs/own_networks"],
    ),
    "unknown token auxiliary": (
        LanguageModel(tied=False),
        tokens(),
        {"splits": 2, "auxiliary": "cnn"},
        ["'cnn'", "linear, mlp"],
    ),
    "logits of pixels": (UNet(), images(), {"at": "refine"}, ["(B, 10, 32, 32)", "callable"]),
    "own auxiliary": (
        mlp(8, 8, 3),
        VECTORS,
        {"splits": 2, "auxiliary": lambda shape, classes: nn.Identity()},
        ["after 0", "(2, 8)", "(2, 3)"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_that_names_what_and_where(case):
    model, inputs, arguments, words = ERRORS[case]
    with pytest.raises(InputError) as error:
        decouple(model, inputs, **arguments)
    message = str(error.value)
    assert "\n" not in message and "after ;" not in message
    for word in words:
        assert word in message


def test_layout_settles_what_a_shape_does_not_tell():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 8 * 9, 3))
    first = decouple(model, torch.randn(2, 3, 8, 9), at="0", layout="channels_first", auxiliary="cnn")[0].auxiliary
    last = decouple(model, torch.randn(2, 3, 8, 9), at="0", layout="channels_last", auxiliary="cnn")[0].auxiliary
    assert first[0].in_channels == 8 and last[1][0].in_channels == 9


def warned(call):
    """The texts of the warnings given in ``call()``, and what it returns."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = call()
    return [str(warning.message) for warning in given], result


def test_sequences_learn_at_each_token_and_a_tied_head_becomes_its_own():
    model, inputs, labels = LanguageModel(), tokens(), torch.randint(CLASSES, (4, 6))
    given, net = warned(lambda: decouple(model, inputs, splits=3))
    assert len(given) == 1 and "head.weight" in given[0] and "embedding.weight" in given[0]
    assert model.head.weight is not model.embedding.weight
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert_is_the_model(net, model, inputs, labels)
    assert_names_are_the_models(net, model)
    assert kinds(net[0].auxiliary) == ["LayerNorm", "Linear", "GELU", "Linear"]
    net.train()
    for optimizer in [torch.optim.SGD(module.parameters(), lr=0.1) for module in net]:
        optimizer.zero_grad()
    representation = inputs
    for module in net:
        representation, logits = module(representation.detach())
        assert logits.shape == (4, 6, CLASSES)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    model.eval(), net.eval()
    for other in (torch.randint(CLASSES, (3, 6)), torch.randint(CLASSES, (2, 9))):  # other batches, other lengths
        assert torch.equal(net(other)[-1], model(other).logits)
    linear = decouple(model, inputs, splits=2, auxiliary="linear")[0].auxiliary
    assert kinds(linear) == ["LayerNorm", "Linear"]


def test_evaluation_counts_tokens_and_leaves_out_labels_of_minus_100():
    model, inputs, labels = LanguageModel(tied=False), tokens(), torch.randint(CLASSES, (4, 6))
    net = decouple(model, inputs, splits=2).eval()
    labels[0, 2:] = -100
    for topk in ((1,), (1, 3)):
        meters = evaluate(net, [(inputs[:1], labels[:1]), (inputs[1:], labels[1:])], topk=topk)
        for meter, logits in zip(meters, net(inputs), strict=True):
            kept = labels != -100
            best = logits[kept].topk(topk[-1], dim=-1).indices
            hits = (best == labels[kept][:, None]).any(1)
            assert meter.sums()[0] == kept.sum() == 20
            assert meter.loss == pytest.approx(F.cross_entropy(logits[kept], labels[kept]).item(), rel=1e-6)
            assert meter.top(topk[-1]) == pytest.approx(100 * hits.double().mean().item())


def test_logits_of_pixels_take_an_auxiliary_of_ones_own():
    model, inputs = UNet(), images()
    assert set(cuts(model, inputs).index) >= {"stem.0", "refine", "head"}

    def pixelwise(shape, classes):
        return nn.Conv2d(shape[0], classes, 1)

    net = decouple(model, inputs, at=["refine"], auxiliary=pixelwise)
    model.eval()
    assert torch.equal(net.eval()(inputs)[-1], model(inputs))
    with pytest.raises(InputError) as error:
        decouple(model, inputs, at=["down"], auxiliary=pixelwise)
    assert "stem" in str(error.value)


def test_a_compiled_model_is_cut_as_its_original():
    model = torchvision_model("resnet18")()
    model.compile(backend="eager")
    net = decouple(torch.compile(model, backend="eager"), images(), at=["layer2"])
    assert net[0].body.layer1 is model.layer1


def test_hooks_of_whole_modules_fire_and_the_others_are_named():
    model, fired = torchvision_model("resnet18")(), []
    for name in ("layer1", "layer2", "avgpool"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    given, net = warned(lambda: decouple(model, images(), at=["layer2.0"]))
    assert len(given) == 1 and "layer2" in given[0] and "layer1" not in given[0] and "avgpool" not in given[0]
    fired.clear()
    net.eval()(images())
    assert fired == ["layer1", "avgpool"]


class Noisy(nn.Sequential):
    """In train mode, adds noise from ``draw()`` to the output of each layer."""

    def __init__(self, draw):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
        self.draw = draw

    def forward(self, x):
        for layer in self:
            x = layer(x) + (self.draw() if self.training else 0)
        return x


def test_random_numbers_are_drawn_anew_in_each_step_or_refused():
    inputs = torch.ones(4, 8)
    for seed in (0, 1):  # the check of the result uses seed 0
        torch.manual_seed(seed)
        net = decouple(Noisy(lambda: torch.randn(1)), inputs, splits=2, auxiliary="mlp")
        assert not torch.equal(net(inputs)[-1], net(inputs)[-1])
    for draw in (lambda: random.random(), lambda: np.random.rand()):  # noqa: NPY002  bound methods are copied
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        with pytest.raises(InputError, match="draws random numbers"):
            decouple(Noisy(draw), inputs, splits=2, auxiliary="mlp")


def test_an_auxiliary_that_changes_the_representation_is_refused():
    def auxiliary(shape, classes):
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(*shape, classes))

    with pytest.raises(InputError, match="the auxiliary after 0 changes the representation"):
        decouple(mlp(8, 8, 3), VECTORS, splits=2, auxiliary=auxiliary)


def test_backward_hooks_of_an_opened_module_are_named():
    model = nn.Sequential(mlp(8, 8, 8), nn.Linear(8, 3))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on 0 will not fire"):
        decouple(model, torch.ones(4, 8), at=["0.0"], auxiliary="mlp")


def test_a_module_with_far_more_than_its_share_is_named():
    given, _ = warned(lambda: decouple(mlp(8, 8, 800, 800, 8), VECTORS, splits=4))
    assert len(given) == 1 and "module 3 of 4" in given[0] and "98 %" in given[0]


class Unknown(torch.autograd.Function):
    """An operator without a formula."""

    @staticmethod
    def forward(ctx, x, matrix):
        return x.unsqueeze(-1).mul(matrix).sum(-2)


class Custom(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width))

    def forward(self, x):
        return Unknown.apply(x, self.matrix)


def test_parameters_weigh_where_no_formula_is_known():
    shares = cuts(nn.Sequential(nn.Linear(8, 8), Custom(8), nn.Linear(8, 8)), VECTORS)
    assert list(shares["flops"]) == pytest.approx([1 / 3, 2 / 3])


class TwoNames(LanguageModel):
    """A parameter with two names in one module, as in BERT's head."""

    def __init__(self):
        super().__init__(tied=False)
        self.head = nn.Linear(16, CLASSES)
        self.bias = nn.Parameter(torch.randn(CLASSES))
        self.head.bias = self.bias


def test_a_parameter_may_have_two_names():
    model, inputs = TwoNames(), tokens()
    net = decouple(model, inputs, splits=2)
    assert any(parameter is model.bias for parameter in net[1].parameters())
    with torch.no_grad():
        model.bias.add_(1)
    assert torch.equal(net.eval()(inputs)[-1], model.eval()(inputs).logits)


def test_sizes_of_the_input_are_read_from_each_representation():
    model, inputs = OwnViT(), images(2)
    net = decouple(model, inputs, splits=4).eval()
    model.eval()
    for batch in (1, 3):
        inputs = images(batch)
        assert torch.equal(net(inputs)[-1], model(inputs))


def test_modules_export_and_their_code_can_be_read():
    for model, inputs in ((torchvision_model("resnet18")(), images(2)), (OwnViT(), images(2))):
        net = decouple(model, inputs, splits=2).eval()
        program = torch.export.export(net, (inputs,))
        assert all(map(torch.equal, program.module()(inputs), net(inputs)))
        assert "def forward(self, representation)" in net[0].body.code


SMALLEST_OF_EACH_FAMILY = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)
REAL = ("googlenet", "regnet_x_400mf")  # the others are on the meta device, where RegNets cannot be initialized
EVERY = os.environ.get("TORCHVISION") == "all"
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}


@pytest.mark.parametrize("name", TORCHVISION.CLASSIFIERS if EVERY else SMALLEST_OF_EACH_FAMILY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_classifiers_of_torchvision(name):
    with torch.device("cpu" if EVERY or name in REAL else "meta"):
        net = TORCHVISION.greedy_torchvision(name, 4, CLASSES, SIZES.get(name, 64), convs=1, hidden_layers=1)
    assert len(net) == 4
    assert [kinds(module.auxiliary).count("Linear") for module in net] == [2] * 3 + [0]
    assert all(next(module.body.parameters(), None) is not None for module in net)


def test_images_too_small_are_an_error_of_one_line():
    with pytest.raises(InputError) as error:
        TORCHVISION.greedy_torchvision("alexnet", image_size=8)
    assert "\n" not in str(error.value) and "(2, 3, 8, 8)" in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet10t"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    size = {"img_size": 64} if name.startswith("vit") else {}
    model, inputs = timm.create_model(name, num_classes=CLASSES, **size), images(2, 64)
    net = decouple(model, inputs, splits=4)
    model.eval()
    assert torch.equal(net.eval()(inputs)[-1], model(inputs))


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
IMAGES_OF = "ForImageClassification"
TEXT_OF = "ForSequenceClassification"
HUGGING_FACE = {
    "Bert": (TEXT_OF, TEXT),
    "DistilBert": (
        TEXT_OF,
        {"vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 64},
    ),
    "Roberta": (TEXT_OF, TEXT | {"pad_token_id": 1}),
    "Electra": (TEXT_OF, TEXT | {"embedding_size": 16}),
    "DebertaV2": (TEXT_OF, TEXT),
    "ModernBert": (TEXT_OF, TEXT),
    "ViT": (IMAGES_OF, IMAGE),
    "DeiT": (IMAGES_OF, IMAGE),
    "Beit": (IMAGES_OF, IMAGE),
    "Dinov2": (IMAGES_OF, IMAGE),
    "Swin": (IMAGES_OF, SWIN),
    "Swinv2": (IMAGES_OF, SWIN),
    "ConvNext": (IMAGES_OF, STAGES | {"image_size": 32}),
    "ConvNextV2": (IMAGES_OF, STAGES | {"image_size": 32}),
    "ResNet": (IMAGES_OF, STAGES | {"embedding_size": 8}),
    "RegNet": (IMAGES_OF, STAGES | {"embedding_size": 8, "groups_width": 8}),
    "MobileViT": (IMAGES_OF, {"image_size": 32}),
    "PoolFormer": (IMAGES_OF, STAGES),
    "Segformer": (IMAGES_OF, STAGES),
    "GPT2": ("LMHeadModel", GPT2),
    "Llama": ("ForCausalLM", DECODER),
    "Qwen3": ("ForCausalLM", DECODER),
    "OPT": (
        "ForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "ffn_dim": 37,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
}
MAPS = ("ConvNext", "ConvNextV2", "Segformer")  # as small as these are, the shapes do not tell
SUMS_IN_ANOTHER_ORDER = ("Llama", "Qwen3")  # gradients differ by rounding


def hugging_face(name, head, settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    config = getattr(transformers, name + "Config")(**settings, **({} if "LM" in head else {"num_labels": CLASSES}))
    return getattr(transformers, name + head)(config)


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.filterwarnings("ignore")
def test_models_of_hugging_face(name):
    head, settings = HUGGING_FACE[name]
    torch.manual_seed(0)
    model = hugging_face(name, head, settings)
    inputs = images() if head == IMAGES_OF else torch.randint(2, 99, (4, 12))
    layout = "channels_first" if name in MAPS else None
    net = decouple(model, inputs, splits=4, layout=layout)
    labels = torch.randint(CLASSES, (4, 12) if "LM" in head else (4,))
    assert_is_the_model(net, model, inputs, labels, exact=name not in SUMS_IN_ANOTHER_ORDER)
    assert_names_are_the_models(net, model)
    net.eval()
    assert all(map(torch.equal, pickled(net)(inputs), net(inputs)))


class LastToken(nn.Module):
    """A decoder for classification, of sequences that end without padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        hidden = self.model.base_model(tokens).last_hidden_state
        return self.model.score(hidden)[:, -1]


@pytest.mark.parametrize(("name", "settings"), [("GPT2", GPT2), ("Llama", DECODER)])
@pytest.mark.filterwarnings("ignore")
def test_decoders_for_classification_of_hugging_face(name, settings):
    torch.manual_seed(0)
    model, inputs = hugging_face(name, TEXT_OF, settings), torch.randint(2, 99, (4, 12))
    with pytest.raises(InputError) as error:
        decouple(model, inputs, splits=4)
    assert "last_hidden_state" in str(error.value)
    adapted = LastToken(model)
    net = decouple(adapted, inputs, splits=4)
    assert_is_the_model(net, adapted, inputs, torch.arange(4), exact=name not in SUMS_IN_ANOTHER_ORDER)
    model.eval()
    assert torch.equal(net.eval()(inputs)[-1], model(inputs).logits)
