"""ImageNet: the networks, the two scripts, their data, and several processes, on small generated folders and narrow
networks.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from running import ROOT, Finished, launch, load_script, published_series
from small_imagenet import BACKPROP, CLASSES, DGL, TRAIN, VAL, write_folders
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from decoupled.logs import read_log
from decoupled.parallel import batch_norm as global_batch_norm
from decoupled.parallel.stages import batch_norms

vgg, resnet = load_script("imagenet/greedy_vgg.py"), load_script("imagenet/greedy_resnet.py")
script = load_script(DGL)
import imagenet_folders  # noqa: E402  importable since a script of that folder was loaded

GPUS = torch.cuda.device_count()
# Mini-batches of 8, 8, 5; val 8, 8, 1
TOY = "--image-size 32 -b 8 -j 0 --device cpu --nepochs 2 --epochdecay 1 --lr 0.01"
FLAGS = tuple(TOY.split())
VGG = (DGL, "--arch", "vgg11", "--block_size", 3, "--channels", 2)
RESNET = (DGL, "--arch", "resnet50", "--splits", 3, "--channels", 2)
END = (BACKPROP, "--arch", "resnet18")
DROPOUT = (DGL, "--arch", "squeezenet1_1", "--splits", 3, "--nlin", 1, "--mlp", 0)
METHODS = {"vgg": VGG, "resnet": RESNET, "end to end": END, "dropout": DROPOUT}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture
def train_small(run_script, folder, tmp_path):
    """train_small((script, *flags), *flags): what the script leaves with FLAGS; ``to`` names its folder."""

    def run(method, *flags, to="logs", data=folder):
        return run_script(method[0], data, *FLAGS, *method[1:], *flags, folder=tmp_path / to)

    return run


WHOLE = {}


@pytest.fixture
def whole(train_small, tmp_path_factory):
    """whole(method): what an uninterrupted run leaves. Each is run once."""

    def run(method):
        if method not in WHOLE:
            WHOLE[method] = train_small(method, to=tmp_path_factory.mktemp("whole"))
        return WHOLE[method]

    return run


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def result_lines(left):
    """The lines of results and losses, without when and where."""
    return [line for line in left.log.read_text().splitlines() if re.match(r"(# )?n: |lr: ", line)]


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in branches for leaf in tensors(branch)]


def assert_same(left, whole):
    assert result_lines(left) == result_lines(whole)
    mine, its = tensors(left.state), tensors(whole.state)
    assert len(mine) == len(its) > 10 and all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_debug_stops_each_epoch_early_and_leaves_a_log_but_no_checkpoint(train_small, monkeypatch):
    monkeypatch.setattr("imagenet_flags.DEBUG_BATCHES", 2)
    (log,) = train_small(VGG, "--debug", 1, "-p", 1).folder.iterdir()
    assert log.suffix == ".log" and len(read_log(log)["epoch"].unique()) == 2
    assert published_series(log) == set()


# The networks

AUXILIARY = {
    64: 468_584,
    128: 1_353_960,
    256: 4_378_088,
    512: 15_439_848,
    1024: 57_617_384,
}  # MLP-SR by channels, 1,000 classes
VGG_HEAD, RESNET_HEAD = 123_642_856, 2_049_000
NETWORKS = [  # flags, parameters of the bodies, channels where the auxiliaries are
    (
        "--arch vgg13 --block_size 1",
        [1_920, 37_056, 74_112, 147_840, 295_680, 590_592, 1_181_184, 2_360_832, 2_360_832, 2_360_832],
        [64, 64, 128, 128, 256, 256, 512, 512, 512],
    ),
    ("--arch vgg13 --block_size 3", [113_088, 1_034_112, 5_902_848, 2_360_832], [128, 256, 512]),
    ("--arch vgg19 --block_size 4", [260_928, 2_067_456, 8_263_680, 9_443_328], [128, 256, 512]),
    ("--arch vgg19 --block_size 8", [2_328_384, 17_707_008], [256]),
    ("--arch resnet152", [18_601_024, 39_542_784], [1024]),
    ("--arch resnet101", [11_894_848, 30_605_312], [1024]),
    ("--arch resnet152 --splits 4", [4_077_632, 14_523_392, 14_523_392, 25_019_392], [1024, 1024, 1024]),
    ("--arch vgg11 --block_size 8", [9_225_984], []),
    ("--arch resnet50 --splits 1", [23_508_032], []),
]


@pytest.mark.parametrize(
    ("flags", "bodies", "channels"), NETWORKS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_modules_of_the_published_commands(monkeypatch, flags, bodies, channels):
    command = f"imagenet_dgl.py DIR {flags} --half --dynamic-loss-scale -j 8"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    args = script.parse_args()
    with torch.device("meta"):
        net = script.build(args, 1000)
    assert [count(module.body) for module in net] == bodies
    head = VGG_HEAD if "vgg" in flags else RESNET_HEAD
    assert [count(module.auxiliary) for module in net] == [*(AUXILIARY[width] for width in channels), head]
    if flags == "--arch resnet152":  # the auxiliary of the published cut reads 14×14
        assert [len(module.body) for module in net] == [26, 25]
        assert net[0].auxiliary[0].output_size == (4, 4)
    name = args.arch + "_bn" * ("vgg" in flags)
    with torch.device("meta"):
        assert sum(bodies) + head == count(torchvision.models.get_model(name))


@pytest.mark.parametrize("name", ["vgg13_bn", "vgg19_bn", "resnet152"])
def test_baselines_are_torchvisions(monkeypatch, name):
    monkeypatch.setattr(
        sys, "argv", ["imagenet.py", "DIR", "--arch", name, "--half", "--dynamic-loss-scale", "-j", "8"]
    )
    baseline = load_script(BACKPROP)
    args = baseline.parse_args()
    with torch.device("meta"):
        assert (
            count(baseline.build(args, 1000))
            == {"vgg13_bn": 133_053_736, "vgg19_bn": 143_678_248, "resnet152": 60_192_808}[name]
        )
    assert (args.epochs, args.epochdecay, args.batch_size, args.lr, args.momentum, args.wd) == (
        50,
        10,
        256,
        0.1,
        0.9,
        1e-4,
    )
    assert (args.static_loss_scale, args.dynamic_loss_scale, args.image_size, args.fused_sgd) == (
        None,
        True,
        224,
        "torch",
    )


def test_cutting_changes_nothing_but_the_auxiliaries():
    """The backbone computes what torchvision's does, for any cut."""
    images = torch.randn(2, 3, 32, 32)
    whole = torchvision.models.resnet50(num_classes=5).eval()
    net = resnet.greedy_resnet("resnet50", 1, 5, 32).eval()
    net.load_state_dict(dict(zip(net.state_dict(), whole.state_dict().values(), strict=True)))
    torch.testing.assert_close(net(images)[0], whole(images))
    settings = ((resnet.greedy_resnet, "resnet50", (1, 3, 17)), (vgg.greedy_vgg, "vgg19", (16, 5, 1)))
    for build, arch, cuts in settings:
        first = build(arch, cuts[0], 5, 32, width=2).eval()
        for cut in cuts[1:]:
            net = build(arch, cut, 5, 32, width=2).eval()
            for mine, its in zip(backbone(net), backbone(first), strict=True):
                mine.copy_(its)
            torch.testing.assert_close(net(images)[-1], first(images)[-1])
    whole = torchvision.models.vgg.make_layers(
        [2, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"], batch_norm=True
    ).eval()
    net = vgg.greedy_vgg("vgg11", 3, 5, 32, width=2).eval()
    for mine, its in zip(backbone(net), whole.state_dict().values(), strict=False):  # after the bodies comes the head
        mine.copy_(its)
    representation = images
    for module in net:
        representation = module.body(representation)
    torch.testing.assert_close(net[-1].auxiliary[0](representation), whole(images))


def backbone(net):
    """The values of the bodies, in order, then those of the last head."""
    return [
        value for part in (*(module.body for module in net), net[-1].auxiliary) for value in part.state_dict().values()
    ]


def big(net, kind):
    return [layer for layer in net.modules() if isinstance(layer, kind) and layer.weight.numel() > 5000]


def assert_convolutions_are_kaiming_normal(net):
    for layer in big(net, nn.Conv2d):
        spread = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.05)


def test_vgg_starts_as_published():
    net = vgg.greedy_vgg("vgg11", 3, 5, 32, width=16)
    assert_convolutions_are_kaiming_normal(net)
    for layer in big(net, nn.Linear):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert (layer.weight == 1).all()
        if getattr(layer, "bias", None) is not None:
            assert (layer.bias == 0).all()


def test_resnets_linear_layers_keep_pytorchs_default_and_only_bn1d_is_drawn():
    net = resnet.greedy_resnet("resnet50", 2, 5, 32, width=16)
    assert_convolutions_are_kaiming_normal(net)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):  # U(±1/√fan-in), biases too
            bound = layer.in_features**-0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias.abs() <= bound).all() and layer.bias.std() > bound / 5
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.weight.min() < 0.05 < 0.95 < layer.weight.max() < 1 and (layer.bias == 0).all()
        elif isinstance(layer, nn.Conv2d):
            assert layer.bias is None


# The algorithm and the numbers


def test_dgl_is_each_module_learning_alone(whole, folder):
    """To the bit, by SGD on each module's own loss, by the images the data give."""
    torch.manual_seed(1)
    net = vgg.greedy_vgg("vgg11", 3, CLASSES, 32, width=2).to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    train, _, _ = imagenet_folders.load(folder, image_size=32, batch_size=8, workers=0, seed=1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True) for m in net]
    for rate in (0.01, 0.1 * 0.01):
        for images, labels in train:
            losses = []
            representation = images
            for module in net:
                representation, logits = module(representation.detach())
                losses.append(F.cross_entropy(logits, labels))
            for optimizer, loss in zip(optimizers, losses, strict=True):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    weights = whole(VGG).weights
    for name, value in net.state_dict().items():
        assert torch.equal(weights[name], value), name
        assert not torch.equal(value, start[name]), name


def numpy_top(outputs, labels, k):
    """Top-k accuracy in %, of equal outputs the lower class first."""
    order = np.argsort(-outputs, axis=1, kind="stable")
    return 100 * np.mean([label in row[:k] for row, label in zip(order, labels, strict=True)])


@pytest.mark.parametrize("method", [VGG, RESNET], ids=["vgg", "resnet"])
def test_the_logs_accuracies_are_numpys(whole, folder, method):
    """Every head's, and those of the ensembles: softmax of head i weighted 2^i / (2^(n+1) - 1)."""
    left = whole(method)
    build = vgg.greedy_vgg if method is VGG else resnet.greedy_resnet
    net = build(method[2], method[4], CLASSES, 32, width=2).to(memory_format=torch.channels_last)
    net.load_state_dict(left.weights)
    _, val, _ = imagenet_folders.load(folder, image_size=32, batch_size=8, workers=0)
    with torch.no_grad():
        every = [net.eval()(images) for images, _ in val]
    heads = [torch.cat([logits[n] for logits in every]).float().numpy() for n in range(len(net))]
    labels = np.array([label for _, label in (val.samples[1, index] for index in range(VAL))])
    frame = read_log(left.log)
    frame = frame[frame["epoch"] == 2]
    assert frame["n"].tolist() == list(range(1, len(net) + 1)) and len(net) > 2
    total = 0
    for n, (logits, (_, row)) in enumerate(zip(heads, frame.iterrows(), strict=True)):
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        total = total + 2**n * probabilities / probabilities.sum(1, keepdims=True)
        assert (row["test_top1"], row["test_top5"]) == pytest.approx(
            (numpy_top(logits, labels, 1), numpy_top(logits, labels, 5)), abs=1e-4
        )
        ensemble = total / (2 ** (n + 1) - 1)
        assert (row["ensemble_top1"], row["ensemble_top5"]) == pytest.approx(
            (numpy_top(ensemble, labels, 1), numpy_top(ensemble, labels, 5)), abs=1e-4
        )
    assert frame["loss"].notna().all() and (frame["loss"] > 0).all()


def test_backprop_logs_the_rate_that_fell(whole):
    frame = read_log(whole(END).log)
    assert frame["lr"].tolist() == pytest.approx([0.01, 0.001]) and frame["loss"].notna().all()


def test_without_ensembles(train_small):
    frame = read_log(train_small(VGG, "--ensemble", 0, "--nepochs", 1).log)
    assert frame["ensemble_top1"].isna().all() and frame["test_top1"].notna().all()


# Stopping and resuming


@contextmanager
def signalled(after, evaluating=False, number=signal.SIGTERM):
    """Inside the block this process gets a signal in the networks' forward pass number ``after``, of training or of
    evaluation.
    """
    calls = []

    def hook(module, inputs):
        if not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return  # only the first layer counts
        trains = module.training and len(inputs[0]) > 2  # decouple runs a copy on two images
        counts = torch.is_inference_mode_enabled() if evaluating else trains
        if counts:
            calls.append(module)
            if len(calls) == after:
                os.kill(os.getpid(), number)

    with register_module_forward_pre_hook(hook):
        yield


STOPS = [(1, False), (4, False), (6, False), (4, True)]  # of 3 mini-batches in an epoch, and 3 in its evaluation


@pytest.mark.parametrize(
    ("method", "stop"),
    [("vgg", stop) for stop in STOPS] + [("resnet", STOPS[1]), ("dropout", STOPS[1])],
)
def test_a_signal_finishes_the_batch_and_resume_goes_on_exactly(train_small, whole, capsys, method, stop):
    method = METHODS[method]
    after, evaluating = stop
    number = signal.SIGINT if after == 4 else signal.SIGTERM
    with pytest.raises(SystemExit) as end, signalled(after, evaluating, number):
        train_small(method)
    assert end.value.code == 128 + number
    place = "epoch 2, batch 3" if evaluating else f"epoch {(after + 2) // 3}, batch {(after - 1) % 3 + 1}"
    message = capsys.readouterr().err
    assert number.name in message and place in message and "Traceback" not in message
    left = train_small(method, "--resume", "auto")
    assert f"resumed after {place}\n" in left.log.read_text()
    assert_same(left, whole(method))


@pytest.mark.parametrize("method", ["vgg", "resnet", "end to end"])
def test_an_epochs_end_resumes_exactly(train_small, whole, method):
    method = METHODS[method]
    first = train_small(method, "--nepochs", 1)
    left = train_small(method, "--resume", first.checkpoint)
    assert_same(left, whole(method))
    assert {"net", "optimizers", "schedules", "scalers", "train", "test", "meters"} == left.state.keys()
    modules = 1 if method is END else 3
    assert len(left.state["optimizers"]) == len(left.state["scalers"]) == modules
    assert len(read_log(left.log)) == 2 * modules
    assert {key.split(".")[0] for key in left.weights} == {str(n) for n in range(modules)}


def test_ctrl_c_with_workers_in_a_terminal(folder, tmp_path):
    """The signal goes to the whole process group, the workers included."""
    flags = (folder, *FLAGS, *VGG[1:], "-j", 2, "-p", 1, "--nepochs", 200, "--save_folder", tmp_path / "logs")
    command = [sys.executable, "-u", ROOT / DGL, *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("epoch 1, batch 2"):
                    os.killpg(process.pid, signal.SIGINT)
                    break
            _, message = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, message
    assert "SIGINT" in message and "Traceback" not in message
    place = re.search(r"epoch (\d+), batch (\d+)", message)
    (log,) = (tmp_path / "logs").glob("*.log")
    checkpoint = torch.load(log.with_suffix(".pt"), weights_only=True)
    assert (checkpoint["epoch"], checkpoint["batch"], checkpoint["within_epoch"]) == (
        int(place[1]),
        int(place[2]),
        True,
    )
    assert [meter["sums"][0] for meter in checkpoint["state"]["meters"]] == [min(8 * int(place[2]), TRAIN)] * 3


# Several processes


def assert_close(left, whole, start):
    """Weights and momentum up to rounding, which is little beside what was learned from the weights ``start``."""
    for mine, its in zip(result_lines(left), result_lines(whole), strict=True):
        numbers = [[float(text) for text in re.findall(r"[\d.]+", line)] for line in (mine, its)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)
    for name, value in whole.weights.items():
        learned = (value - start[name]).abs().max()
        # A bias before batch norm has a gradient of rounding errors alone
        assert (left.weights[name] - value).abs().max() <= 0.01 * learned + 1e-7, name
    for mine, its in zip(tensors(left.state["optimizers"]), tensors(whole.state["optimizers"]), strict=True):
        assert (mine - its).abs().max() <= 0.01 * its.abs().max() + 1e-6


def start_of(method):
    """The weights from which the runs of ``method`` start."""
    torch.manual_seed(1)
    if method is VGG:
        return vgg.greedy_vgg("vgg11", 3, CLASSES, 32, width=2).state_dict()
    return nn.Sequential(torchvision.models.resnet18(num_classes=CLASSES)).state_dict()


def test_processes_are_one(train_small, whole, folder, tmp_path):
    """Two processes share each mini-batch and get the same weights and log up to rounding, though a short one is shared
    3 to 2, and one image of val/ is left to one process. They may go on where one stopped. Stages with one replica each
    learn what one process learns to the bit. With two replicas all stop after the same mini-batch, for a signal to one
    of the upper stage, and one process goes on. Ensembles are of all heads.
    """

    def run(processes, method, to, *flags, **more):
        words = (method[0], folder, *FLAGS, *method[1:], "--save_folder", tmp_path / to, *flags)
        return {"processes": processes, "words": [str(word) for word in words], **more}

    with pytest.raises(SystemExit), signalled(5):
        train_small(END, to="resumed")
    (two, _), (resumed, _), (stages, _), (mesh, message) = launch(
        run(2, VGG, "two"),
        run(2, END, "resumed", "--resume", "auto"),
        run(3, VGG, "stages", "--stages", 3, "--queue", 1),
        run(4, VGG, "mesh", "--stages", 2, "--modules-per-stage", "1,2", faults={"3": [4, "SIGTERM"]}),
    )
    assert (two, resumed, stages, mesh) == ("finished", "finished", "finished", "[143]"), message
    left = Finished(tmp_path / "two")
    assert_close(left, whole(VGG), start_of(VGG))
    assert "# processes: 2, gloo\n" in left.log.read_text()
    assert_close(Finished(tmp_path / "resumed"), whole(END), start_of(END))
    assert_same(Finished(tmp_path / "stages"), whole(VGG))
    assert "# processes: 4, gloo, modules 1,2, 2 replicas of each\n" in Finished(tmp_path / "mesh").log.read_text()
    left = train_small(VGG, "--resume", to="mesh")
    assert_close(left, whole(VGG), start_of(VGG))


@pytest.fixture
def alone():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])  # None: the mean over all mini-batches
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (6, 4, 2, 3, 3)])
def test_global_batch_norm_of_one_process_is_batch_norm(alone, shape, momentum):
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    plain = kind(4, momentum=momentum).double()
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    ours = global_batch_norm.globalize(nn.Sequential(kind(4, momentum=momentum).double()), torch.device("cpu"))
    assert type(ours[0]) is global_batch_norm.GlobalBatchNorm
    assert batch_norms(ours) == [ours[0]]  # its statistics can be recomputed
    ours.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})
    images = [(3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    images[1].data.copy_(images[0].data)
    weight = torch.randn(shape, dtype=torch.float64)
    for norm, image in zip((plain, ours), images, strict=True):
        (norm(image) * weight).sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad)
    for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)
    for mine, its in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(ours.eval()(images[0]), plain.eval()(images[0]))


# Optimizers and precision


def test_apex_is_nvidias(fails, folder, monkeypatch):
    command = (DGL, folder, *FLAGS, *VGG[1:], "--fused-sgd", "apex")
    for module in (None, types.ModuleType("apex")):  # absent; PyPI's, which has no optimizers
        monkeypatch.setitem(sys.modules, "apex", module)
        assert "https://github.com/NVIDIA/apex" in fails(*command)
    nvidia = types.ModuleType("apex.optimizers")
    nvidia.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", nvidia)
    assert "--fused-sgd torch" in fails(*command)  # on the CPU


def test_fused_and_plain_sgd_agree(train_small):
    fused, plain = train_small(VGG, "--nepochs", 1), train_small(VGG, "--nepochs", 1, "--fused-sgd", "none", to="plain")
    for mine, its in zip(tensors(fused.weights), tensors(plain.weights), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)


def test_half_on_the_cpu_is_bf16(train_small):
    seen = set()

    def watch(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.training:
            seen.add(output.dtype)

    with register_module_forward_hook(watch):
        left = train_small(VGG, "--half", "--dynamic-loss-scale", "--nepochs", 1)
    assert seen == {torch.bfloat16} and "bf16 mixed" in left.log.read_text()


# Bad input


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        (VGG, ("--arch", "vgg12")),
        (END, ("--arch", "vgg12")),
        (VGG, ("--block_size", 9)),
        (VGG, ("--splits", 2)),
        (RESNET, ("--splits", 18)),
        (RESNET, ("--splits", 0)),
        (RESNET, ("--block_size", 2)),
        (VGG, ("--channels", 0)),
        (DROPOUT, ("--channels", 4)),
        (RESNET, ("--image-size", 16)),
        (END, ("--image-size", 16)),
        (VGG, ("--image-size", 16)),
        (VGG, ("--dynamic-loss-scale",)),
        (VGG, ("--static-loss-scale", 128)),
        (VGG, ("--stages", 2)),
        (VGG, ("--modules-per-stage", "1,2")),
        (VGG, ("--local-batch-norm",)),
        (VGG, ("--backend", "gloo")),
        (VGG, ("-b", 22)),
        (VGG, ("-b", 10)),
        (VGG, ("--train-samples", 22)),
        (VGG, ("--val-samples", 18)),
        (VGG, ("--debug", 1, "--resume", "newest")),
        (VGG, ("--large_size_images", 0)),
        (VGG, ("--ncnn", 3)),
        (VGG, ("--start_epoch", 3)),
        (VGG, ("--resume",)),
        (VGG, ("--device", "cuda:7")),
        (VGG, ("-j", -1)),
    ],
)
def test_bad_flags(fails, folder, method, flags):
    message = fails(method[0], folder, *FLAGS, *method[1:], *flags).replace("_", "-").replace(" ", "-")
    names = {"--block-size": "block-size", "--static-loss-scale": "loss-scale", "--dynamic-loss-scale": "loss-scale"}
    flag = flags[0].replace("_", "-")
    assert names.get(flag, flag.lstrip("-")) in message


def test_a_loss_that_is_not_finite_stops_the_run(train_small, capsys):
    with pytest.raises(SystemExit) as stop:
        train_small(VGG, "--lr", 1e38)
    assert stop.value.code == 2 and "module 1 became nan in epoch 1, batch 2" in capsys.readouterr().err


# On a GPU


def torchrun(*command, processes=2):
    """(exit code, what was printed to stderr) of a script under torchrun."""
    script, *words = command
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    full = [*runner, str(ROOT / script), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        full, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        _, message = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, message


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("gloo", marks=pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU")),  # shared by the two
        pytest.param("nccl", marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")),
    ],
)
def test_two_processes_on_gpus_are_one(train_small, folder, tmp_path, backend):
    """SyncBatchNorm in the place of GlobalBatchNorm."""
    whole = train_small(VGG, "--device", "cuda", to="whole")
    words = (folder, *FLAGS, *VGG[1:], "--device", "cuda", "--backend", backend, "--save_folder", tmp_path / "logs")
    code, message = torchrun(DGL, *words)
    assert code == 0, message
    assert_close(Finished(tmp_path / "logs"), whole, start_of(VGG))


@pytest.mark.skipif(GPUS != 1, reason="needs one CUDA GPU")
def test_nccl_with_more_processes_than_gpus_is_refused(folder, tmp_path):
    words = (folder, *FLAGS, *VGG[1:], "--device", "cuda", "--backend", "nccl", "--save_folder", tmp_path / "logs")
    code, message = torchrun(DGL, *words)
    assert code != 0 and "GPUs" in message
