"""Any network cut into modules: the pieces are the model, learn on their own, and errors say the way out.

TORCHVISION=all cuts every classifier of torchvision: some minutes, and 10 GB of memory for the largest.
"""

import copy
import itertools
import os

import pytest
import torch
import torchvision
from running import load_script
from torch import nn
from torch.nn import functional as F

from decoupled import InputError, cuts, decouple
from decoupled.analysis import costs
from decoupled.networks.evaluation import evaluate

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


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden, mask=None, **options):
        return (self.norm(hidden + self.attention(hidden, hidden, hidden, attn_mask=mask)[0]),)


class Pretrained(nn.Module):
    """A model as a library of language models has it: many arguments, a dictionary out, a loop with a condition."""

    def __init__(self, width=16, depth=4):
        super().__init__()
        self.embeddings = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, input_ids, labels=None, **options):
        if input_ids.max() >= self.embeddings.num_embeddings:
            raise IndexError("no such token")
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, **options)[0]
        return {"logits": self.classifier(self.norm(hidden)[:, 0])}


class Adapter(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        hidden = self.model.embeddings(input_ids)
        for layer in self.model.layers:
            hidden = layer(hidden)[0]
        return self.model.classifier(self.model.norm(hidden)[:, 0])


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
    return torch.randint(50, (4, 6))


MODELS = {
    "functions": (Convolutional, images),
    "counting": (counting, images),
    "vit": (vit, images),
    "swin": (swin, images),
    "convnext": (convnext, images),
    "tokens": (lambda: Adapter(Pretrained()), tokens),
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
    F.cross_entropy(value, labels).backward()
    return value


@pytest.mark.parametrize(("name", "splits"), [("functions", 2), *((name, 4) for name in MODELS)])
def test_the_pieces_are_the_model_in_logits_gradients_and_buffers(name, splits):
    build, inputs = MODELS[name]
    model, inputs, labels = build(), inputs(), torch.arange(4)
    twin = copy.deepcopy(model)
    net = decouple(model, inputs, splits=splits, classes=CLASSES)
    assert len(net) == splits
    for training in (True, False):
        expected = outcome([twin], inputs, labels, training)
        got = outcome([module.body for module in net], inputs, labels, training)
        assert torch.equal(got, expected)
        for (key, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), key
            assert one.grad is None or torch.equal(one.grad, other.grad), key
        assert all(torch.equal(one, other) for one, other in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("name", MODELS)
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
    assert torch.equal(net(inputs)[-1], model(inputs))


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


def test_cuts_are_between_large_parts_where_that_costs_little_and_behind_what_has_no_flops():
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


class TwoWays(Tied):
    def forward(self, x):
        return super().forward(x + 1 if self.training else x)


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
    assert list(cuts(model, VECTORS).index) == ["mix", "cat()"]
    net = decouple(model, VECTORS, at=["mix"])
    assert torch.equal(net(VECTORS)[-1], model(VECTORS))


def holding_a_computed_tensor():
    model = mlp(8, 8, 3)
    model.cache = 2 * model[0].weight
    return model


VECTORS = torch.randn(4, 8)
ERRORS = {
    "nothing chosen": (mlp(8, 8, 3), VECTORS, {}, "splits=.*at="),
    "no integer": (mlp(8, 8, 3), VECTORS, {"splits": 0}, "splits.*0"),
    "too few": (
        mlp(8, 8, 8, 3),
        VECTORS,
        {"splits": 4},
        " 3 .* 0, 1",
    ),
    "misspelt": (vit(), images(), {"at": ["encoder.layer"]}, "encoder.layer: .*encoder.layers"),
    "end": (mlp(8, 8, 3), VECTORS, {"at": ["1"]}, "1 .*: .* 0$"),
    "nothing above": (
        nn.Sequential(mlp(8, 8, 3), nn.Identity()),
        VECTORS,
        {"at": ["0.1"]},
        r"0.1 .*: .* 0.0$",
    ),
    "twice": (
        nn.Sequential(mlp(8, 8), nn.ReLU(), mlp(8, 3)),
        VECTORS,
        {"at": ["0", "1"]},
        "0 and 1",
    ),
    "residual": (
        torchvision_model("resnet18")(),
        images(),
        {"at": ["layer2.0.conv1"]},
        r"layer2.0.conv1 .*layer1 .* layer1, layer2.0$",
    ),
    "in place": (
        torchvision_model("resnet18")(),
        images(),
        {"at": ["bn1"]},
        r"bn1 .* conv1, relu$",
    ),
    "tied": (Tied(), VECTORS, {"at": ["layer"]}, "layer.weight"),
    "branching": (
        Branching(),
        VECTORS,
        {"splits": 2},
        "Branching",
    ),
    "two ways": (TwoWays(), VECTORS, {"splits": 2}, "TwoWays"),
    "fixed": (Fixed(*mlp(8, 8, 3)), VECTORS, {"splits": 2}, "Fixed"),
    "computed": (
        holding_a_computed_tensor(),
        VECTORS,
        {"splits": 2},
        "Sequential",
    ),
    "dictionary": (Pretrained(), tokens(), {"splits": 2}, "dict"),
    "head": (mlp(8, 8, 3), VECTORS, {"splits": 2, "classes": 4}, "3 classes.* 4"),
    "other size": (mlp(8, 8, 3), torch.randn(4, 9), {"splits": 2}, r"\(2, 9\)"),
    "no batch": (mlp(8, 8, 3), [1, 2], {"splits": 2}, "example_input"),
    "ambiguous": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 3)),
        images(size=8),
        {"at": ["0"]},
        r"\(8, 8, 8\).* 0 .*layout=",
    ),
    "not square": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 8 * 9, 3)),
        torch.randn(2, 3, 8, 9),
        {"at": ["0"]},
        "layout=",
    ),
    "layout": (mlp(8, 8, 3), VECTORS, {"splits": 2, "layout": "nchw"}, "channels_first, channels_last"),
    "unknown auxiliary": (vit(), images(), {"splits": 2, "auxiliary": "cnn"}, "cnn.*mlp"),
    "own auxiliary": (
        mlp(8, 8, 3),
        VECTORS,
        {"splits": 2, "auxiliary": lambda shape, classes: nn.Identity()},
        r"\(2, 8\).*\(2, 3\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_that_names_what_is_wrong(case):
    model, inputs, arguments, message = ERRORS[case]
    with pytest.raises(InputError, match=message) as error:
        decouple(model, inputs, **arguments)
    assert "\n" not in str(error.value)


def test_layout_settles_what_a_shape_does_not_tell():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 8 * 9, 3))
    first = decouple(model, torch.randn(2, 3, 8, 9), at="0", layout="channels_first", auxiliary="cnn")[0].auxiliary
    last = decouple(model, torch.randn(2, 3, 8, 9), at="0", layout="channels_last", auxiliary="cnn")[0].auxiliary
    assert first[0].in_channels == 8 and last[1][0].in_channels == 9


EVERY = os.environ.get("TORCHVISION") == "all"


@pytest.mark.parametrize("name", TORCHVISION.CLASSIFIERS if EVERY else ["googlenet", "regnet_y_400mf"])
def test_classifiers_of_torchvision(name):
    sizes = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
    for splits in (2, 4):
        net = TORCHVISION.greedy_torchvision(name, splits, CLASSES, sizes.get(name, 64), convs=1, hidden_layers=1)
        assert len(net) == splits
        assert [kinds(module.auxiliary).count("Linear") for module in net] == [2] * (splits - 1) + [0]
        assert all(next(module.body.parameters(), None) is not None for module in net)


def test_images_too_small_are_an_error_of_one_line():
    with pytest.raises(InputError, match=r"AlexNet.*\(2, 3, 8, 8\)") as error:
        TORCHVISION.greedy_torchvision("alexnet", image_size=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet10t"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    size = {"img_size": 64} if name.startswith("vit") else {}
    model, inputs = timm.create_model(name, num_classes=CLASSES, **size), images(2, 64)
    net = decouple(model, inputs, splits=4)
    model.eval()
    assert torch.equal(net.eval()(inputs)[-1], model(inputs))
