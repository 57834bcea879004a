"""What tests run on a GPU, simulated (test_simulated_cuda.py) or real (test_cuda.py): every script with a small network
and few images, and fp16 with overflows of the loss scale. conftest.py imports the fixtures, for all tests.
"""

from collections import Counter

import pytest
import torch
from running import PARALLEL, SEQUENTIAL
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import eval_mode
from decoupled.training.steps import Steps

TOY = (
    "--dataset",
    "digits",
    "--train-samples",
    32,
    "--validation",
    12,
    "--batch-size",
    8,
)  # four mini-batches an epoch
NARROW = ("--channels", 4)
RESNET = (*TOY, *NARROW, "--depth", 14, "--splits", 3)
BUFFER = (*TOY, "--feature_size", 4, "--layer-sequence", "sequential", "--buffer", 3)
FOLDERS = ("--image-size", 32, "-b", 7, "-j", 0)  # three mini-batches an epoch
IMAGENET = "imagenet/imagenet_dgl.py"
IMAGENET_BACKPROP = "imagenet/imagenet.py"
VGG = (IMAGENET, *FOLDERS, "--arch", "vgg11", "--channels", 2, "--block_size", 3)
AUX = "aux_nets/cifar_dgl.py"
DNI = "dni/cifar_cnn_dni.py"
ASYNC = "async_buffer/cifar_buffer.py"
DGL = "ddg_comparison/cifar_dgl.py"
DDG = "ddg_comparison/cifar_ddg.py"
BACKPROP = "ddg_comparison/cifar_backprop.py"
# The scripts with their flags, and the number of operations of a mini-batch. For sequential learning: of each stage.
# For asynchronous scripts: of one turn of each layer. For DDG: in the first epoch, in which the lowest module takes its
# first step late, and in another one.
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


# Where a loss overflows: (module, its loss), from 0; and which steps must be skipped: {(module, its step), …}.
OVERFLOWS = {
    (PARALLEL, *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (SEQUENTIAL, *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (AUX, *TOY, *NARROW): ((5, 0), {(5, 0)}),
    ("dni/cifar_dgl.py", *TOY, *NARROW): ((1, 1), {(1, 1)}),
    (DGL, *RESNET): ((0, 2), {(0, 2)}),
    # The gradient that overflowed is passed down, one module per iteration. The first step of the middle module is in
    # the second iteration, and so on: each module skips its step 1.
    (DDG, *RESNET): ((2, 1), {(2, 1), (1, 1), (0, 1)}),
    (BACKPROP, *RESNET, "--checkpointing"): ((0, 1), {(0, 1)}),
    (ASYNC, *BUFFER): ((1, 1), {(1, 1)}),
    (*VGG, "--dynamic-loss-scale"): ((1, 1), {(1, 1)}),
    (IMAGENET_BACKPROP, *FOLDERS, "--arch", "resnet18", "--dynamic-loss-scale"): ((0, 1), {(0, 1)}),
}


def command_name(command):
    script, *flags = command
    common = FOLDERS if "imagenet" in script else TOY
    return " ".join([script.removesuffix(".py"), *map(str, flags[len(common) :])])


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory):
    """Image folders of 7 classes, 21 images for training."""
    from small_imagenet import write_folders

    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture
def on_gpu(run_script, image_folders):
    """on_gpu(command, *flags): runs a command of COMMANDS on cuda, with few images; returns a Finished."""

    def run(command, *flags):
        script, *own = command
        data = [image_folders] if "imagenet" in script else []
        return run_script(script, *data, *own, "--device", "cuda", *flags)

    return run


@pytest.fixture
def overflow(monkeypatch):
    """overflow(n, call): from now on the loss number ``call`` of module ``n``, both from 0, is scaled so much that its
    gradients overflow. Returns a list that has, for each module, whether each of its steps changed its weights.
    """
    scalers = []
    calls = Counter()
    changes = []
    overflowing = []  # [n, call]
    real_init = torch.amp.GradScaler.__init__
    real_scale = torch.amp.GradScaler.scale
    real_step = torch.amp.GradScaler.step

    def init(self, *args, init_scale=2.0**10, **options):
        real_init(self, *args, init_scale=init_scale, **options)
        scalers.append(self)
        changes.append([])

    def scale(self, loss):
        n = scalers.index(self)
        call = calls[n]
        calls[n] += 1
        scaled = real_scale(self, loss)
        return scaled * 2.0**100 if [n, call] == overflowing else scaled

    def step(self, optimizer):
        parameters = []
        for group in optimizer.param_groups:
            parameters += group["params"]
        before = [parameter.detach().clone() for parameter in parameters]
        real_step(self, optimizer)
        changed = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        changes[scalers.index(self)].append(any(changed))

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", init)
    monkeypatch.setattr(torch.amp.GradScaler, "scale", scale)
    monkeypatch.setattr(torch.amp.GradScaler, "step", step)

    def begin(n, call):
        scalers.clear()
        calls.clear()
        changes.clear()
        overflowing[:] = [n, call]
        return changes

    return begin


def check_an_overflow(on_gpu, overflow, command):
    """An overflow in one module costs that one step and halves the module's loss scale."""
    (n, call), skipped = OVERFLOWS[command]
    changes = overflow(n, call)
    left = on_gpu(command, "--half", "--epochs", 1)
    skipped_steps = dict(skipped)  # {module: its step}
    for n, (changed, scaler) in enumerate(zip(changes, left.state["scalers"], strict=True)):
        assert len(changed) >= 2
        if n in skipped_steps:
            k = skipped_steps[n]
            assert [step for step, has_changed in enumerate(changed) if not has_changed] == [k]
            assert scaler["scale"] == 2.0**9
            assert scaler["_growth_tracker"] == len(changed) - (k + 1)  # steps since then
        else:
            assert all(changed)
            assert scaler["scale"] == 2.0**10
            assert scaler["_growth_tracker"] == len(changed)
    assert all(weight.isfinite().all() for weight in left.weights.values())


def check_compiled(device, half=False, tolerance=1e-3, depth=2, sizes=(8, 8, 5, 8, 5)):
    """Compiled modules learn the same as plain ones from mini-batches of these ``sizes``. If the sizes differ, there is
    an evaluation after each step. Later steps must not overwrite earlier representations, logits and losses.
    """
    device = torch.device(device)
    results = {}  # by whether modules are compiled
    images = torch.randn(5, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(8, device=device)
    for compiled in (False, True):
        torch.manual_seed(0)
        net = layerwise_cnn(channels=4, depth=depth, downsample=(1,), auxiliary="cnn", input_shape=(3, 8, 8))
        steps = Steps(device, half)
        steps.prepare(net, compiled)
        optimizers = [SGD(module.parameters(), lr=0.1, momentum=0.9, fused=True) for module in net]
        outputs = []
        copies = []
        for size, batch in zip(sizes, images, strict=False):
            representation = batch[:size].contiguous(memory_format=torch.channels_last)
            for module, optimizer in zip(net, optimizers, strict=True):
                with steps.autocast():
                    representation, logits = module(representation)
                loss = F.cross_entropy(logits.float(), labels[:size])
                steps.step(loss, optimizer)
                representation = representation.detach()
                kept = [representation, logits.detach(), loss.detach()]
                outputs += kept
                copies += [tensor.clone() for tensor in kept]
            if len(set(sizes)) > 1:
                with eval_mode(net), torch.inference_mode(), steps.autocast():
                    evaluated = net[0](batch)  # representation, logits
                    outputs += evaluated
                    copies += [tensor.clone() for tensor in evaluated]
        assert all(torch.equal(output, copy) for output, copy in zip(outputs, copies, strict=True))
        results[compiled] = [*outputs, *net.state_dict().values()]
    for plain, other in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(other.float(), plain.float(), rtol=tolerance, atol=tolerance)
