"""What is run on a GPU, simulated (tests/test_simulated_cuda.py) or real (tests/test_cuda.py): every script, with small
networks and few images, and fp16 whose loss scale overflows. conftest.py has the fixtures for every test.
"""

from collections import Counter

import pytest
import torch
from running import PARALLEL, SEQUENTIAL
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.data import datasets
from decoupled.data.folders import DataSet, Split
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import eval_mode
from decoupled.training.precision import Steps

TOY = ("--dataset", "digits", "--train-samples", 32, "--batch-size", 8)  # four mini-batches an epoch
NARROW = ("--channels", 4)
RESNET = (*TOY, *NARROW, "--depth", 14, "--splits", 3)
BUFFER = (*TOY, "--feature_size", 4, "--layer-sequence", "sequential", "--buffer", 3)
FOLDERS = ("--image-size", 32, "-b", 7, "-j", 0)  # three
IMAGENET, IMAGENET_BACKPROP = "imagenet/imagenet_dgl.py", "imagenet/imagenet.py"
VGG = (IMAGENET, *FOLDERS, "--arch", "vgg11", "--channels", 2, "--block_size", 3)
AUX, DNI, ASYNC = "aux_nets/cifar_dgl.py", "dni/cifar_cnn_dni.py", "async_buffer/cifar_buffer.py"
DGL, DDG, BACKPROP = (f"ddg_comparison/cifar_{method}.py" for method in ("dgl", "ddg", "backprop"))
# The scripts, their flags, and the operations of a mini-batch: of each stage in turn; of one turn of each asynchronous
# layer; for DDG of the first epoch, in which the lowest module takes its first step late, and of another.
COMMANDS = {
    (PARALLEL, *TOY, *NARROW): [447],
    (SEQUENTIAL, *TOY, *NARROW): [131, 137, 142, 105],
    (AUX, *TOY, *NARROW): [685],
    (AUX, *TOY, *NARROW, "--type_aux", "cnn"): [440],
    ("dni/cifar_dgl.py", *TOY, *NARROW): [225],
    (DNI, *TOY, *NARROW): [57],
    (DNI, *TOY, *NARROW, "--dni", "--context"): [133],
    (DGL, *RESNET): [399],
    (DDG, *RESNET): [249, 247],
    (BACKPROP, *RESNET[:-2]): [185],
    (BACKPROP, *RESNET, "--checkpointing"): [237],
    (ASYNC, *BUFFER[:-2]): [536],
    (ASYNC, *BUFFER): [546],
    (ASYNC, *BUFFER, "--buffer-device", "cpu"): [551],
    (ASYNC, *BUFFER, "--compress", 8): [626],
    (ASYNC, *BUFFER, "--compress", 4, "--buffer-device", "cpu"): [671],
    (*VGG, "--static-loss-scale", 64): [399],
    (IMAGENET, *FOLDERS, "--arch", "resnet50", "--channels", 2, "--dynamic-loss-scale"): [669],
    (IMAGENET, *FOLDERS, "--arch", "shufflenet_v2_x0_5"): [695],
    (IMAGENET_BACKPROP, *FOLDERS, "--arch", "resnet18"): [243],
}
LAYERS = 6  # of the asynchronous network


# Where the overflow is put: the module and its loss, from 0; and the steps that must be skipped, (module, its step).
OVERFLOWS = {
    (PARALLEL, *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (SEQUENTIAL, *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (AUX, *TOY, *NARROW): ((5, 0), {(5, 0)}),
    ("dni/cifar_dgl.py", *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (DGL, *RESNET): ((0, 2), {(0, 2)}),
    # A gradient that overflowed goes down, iteration by iteration. The middle module's first step is its second
    # iteration's, and so on: all three skip the same step of theirs.
    (DDG, *RESNET): ((2, 1), {(2, 1), (1, 1), (0, 1)}),
    (BACKPROP, *RESNET, "--checkpointing"): ((0, 1), {(0, 1)}),
    (ASYNC, *BUFFER): ((1, 1), {(1, 1)}),
    (*VGG, "--dynamic-loss-scale"): ((1, 1), {(1, 1)}),
    (IMAGENET_BACKPROP, *FOLDERS, "--arch", "resnet18", "--dynamic-loss-scale"): ((0, 1), {(0, 1)}),
}


def called(command):
    script, *flags = command
    common = FOLDERS if "imagenet" in script else TOY
    return " ".join([script.removesuffix(".py"), *map(str, flags[len(common) :])])


def few_images():
    """In place of read_digits: 32 images for training, one of each class and two for testing."""
    images = torch.randint(256, (44, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(44) % 10
    train = Split(images[:32], labels[:32])
    test = Split(images[32:], labels[32:])
    return DataSet(train, test, classes=list("0123456789"), source="random")


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """Image folders of 7 classes, 21 images for training."""
    from small_imagenet import write_folders

    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture
def on_gpu(run_script, image_folders, monkeypatch):
    """on_gpu(command, *flags): what its script leaves with small networks and few images, on cuda."""
    monkeypatch.setattr(datasets, "read_digits", few_images)

    def run(command, *flags):
        script, *own = command
        data = [image_folders] if "imagenet" in script else []
        return run_script(script, *data, *own, "--device", "cuda", *flags)

    return run


@pytest.fixture
def overflow(monkeypatch):
    """overflow(n, call): the ``call``-th loss of module ``n``, both from 0, is scaled until its gradients are infinite.
    Returns, for each module, whether each of its steps has moved its weights.
    """
    scalers, calls, moved = [], Counter(), []
    scale, step = torch.amp.GradScaler.scale, torch.amp.GradScaler.step
    wrong = []

    def made(self, *args, init_scale=2.0**10, **options):
        init(self, *args, init_scale=init_scale, **options)
        scalers.append(self)
        moved.append([])

    def scaled(self, loss):
        n = scalers.index(self)
        calls[n] += 1
        return scale(self, loss) * (2.0**100 if [n, calls[n] - 1] == wrong else 1)

    def stepped(self, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        step(self, optimizer)
        changed = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        moved[scalers.index(self)].append(any(changed))

    init = torch.amp.GradScaler.__init__
    for name, function in {"__init__": made, "scale": scaled, "step": stepped}.items():
        monkeypatch.setattr(torch.amp.GradScaler, name, function)

    def begin(n, call):
        for record in (scalers, calls, moved):
            record.clear()
        wrong[:] = [n, call]
        return moved

    return begin


def check_an_overflow(on_gpu, overflow, command):
    """In one module it costs that one step, and half its loss scale."""
    at, skipped = OVERFLOWS[command]
    moved = overflow(*at)
    left = on_gpu(command, "--half", "--epochs", 1)
    assert {(n, k) for n, steps in enumerate(moved) for k, move in enumerate(steps) if not move} == skipped
    lost = dict(skipped)
    for n, (steps, scaler) in enumerate(zip(moved, left.state["scalers"], strict=True)):
        assert len(steps) >= 2 and scaler["scale"] == 2.0 ** (9 if n in lost else 10)
        assert scaler["_growth_tracker"] == len(steps) - (lost[n] + 1 if n in lost else 0)  # steps since
    assert all(weight.isfinite().all() for weight in left.weights.values())


def check_compiled(device, half=False, tolerance=1e-3, depth=2, sizes=(8, 8, 5, 8, 5)):
    """``depth`` compiled modules learn what plain ones do in batches of these ``sizes``, with an evaluation between
    where they differ; representations and logits stay what they were whatever runs afterwards.
    """
    device, runs = torch.device(device), {}
    images = torch.randn(5, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(8, device=device)
    for compiled in (False, True):
        torch.manual_seed(0)
        net = layerwise_cnn(channels=4, depth=depth, downsample=(1,), auxiliary="cnn", input_shape=(3, 8, 8))
        steps = Steps(device, half)
        steps.prepare(net, compiled)
        optimizers = [SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True) for module in net]
        left = []
        for size, batch in zip(sizes, images, strict=False):
            representation = batch[:size].contiguous(memory_format=torch.channels_last)
            for module, optimizer in zip(net, optimizers, strict=True):
                with steps.autocast():
                    representation, logits = module(representation)
                loss = F.cross_entropy(logits.float(), labels[:size])
                steps.step(loss, optimizer)
                representation = representation.detach()
                kept = [representation, logits.detach(), loss.detach()]
                left.append((kept, [value.clone() for value in kept]))
            if len({*sizes}) == 1:
                continue
            with eval_mode(net), torch.inference_mode(), steps.autocast():
                left.append((scores := net[0](batch), [value.clone() for value in scores]))
        assert all(torch.equal(now, then) for kept, before in left for now, then in zip(kept, before, strict=True))
        runs[compiled] = [value for kept, _ in left for value in kept] + [*net.state_dict().values()]
    for plain, other in zip(runs[False], runs[True], strict=True):
        torch.testing.assert_close(other.float(), plain.float(), rtol=tolerance, atol=tolerance)
