"""ImageNet: the networks, the two scripts, their data, and several processes, on small generated folders and small
networks.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from running import ROOT, Finished, launch, load_script, published_series
from small_imagenet import BACKPROP, CLASSES, DGL, TRAIN, VAL, small, write_folders
from torch import distributed, nn
from torch.nn import functional as F

from decoupled.logs import read_log
from decoupled.networks.evaluation import Meter, ensembles, evaluate
from decoupled.parallel import batch_norm as global_batch_norm

vgg, resnet = load_script("imagenet/greedy_vgg.py"), load_script("imagenet/greedy_resnet.py")
script = load_script(DGL)
import imagenet_folders  # noqa: E402  importable since a script of that folder was loaded

GPUS = torch.cuda.device_count()
FLAGS = (
    "--image-size",
    32,
    "-b",
    8,
    "-j",
    0,
    "--device",
    "cpu",
    "--nepochs",
    2,
    "--epochdecay",
    1,
    "--lr",
    0.01,
)  # batches of 8, 8, 5; val 8, 8, 1
VGG, RESNET, END = (
    (DGL, "--arch", "vgg11", "--block_size", 3),
    (DGL, "--arch", "resnet50", "--splits", 3),
    (BACKPROP, "--arch", "vgg11_bn"),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture(autouse=True)
def images_in_double(monkeypatch):
    real = imagenet_folders.ImageBatches.normalize
    monkeypatch.setattr(imagenet_folders.ImageBatches, "normalize", lambda self, images: real(self, images).double())


@pytest.fixture
def train_small(run_script, folder, tmp_path):
    """train_small((script, *flags), *flags): what the script leaves with FLAGS and small networks; ``to`` names its
    folder.
    """

    def run(method, *flags, to="logs", adapt=lambda net: net, data=folder, **names):
        names = small(load_script(method[0]), adapt) | names
        return run_script(method[0], data, *FLAGS, *method[1:], *flags, folder=tmp_path / to, **names)

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


def test_any_classifier_of_torchvision_learns_and_resumes(run_script, folder, tmp_path):
    method = (DGL, folder, *FLAGS, "--arch", "squeezenet1_1", "--splits", 3, "--nlin", 1, "--mlp", 0)
    real = load_script(DGL).greedy_torchvision
    names = {"greedy_torchvision": lambda *args, **settings: real(*args, **settings).double()}
    whole = run_script(*method, folder=tmp_path / "whole", **names)
    run_script(*method, "--nepochs", 1, **names)
    left = run_script(*method, "--resume", **names)
    assert_same(left, whole)
    assert {key.split(".")[0] for key in left.weights} == {"0", "1", "2"}
    assert len(read_log(left.log)) == 2 * 3


@pytest.mark.parametrize("method", [VGG, END])
def test_debug_stops_each_epoch_early_and_leaves_a_log_but_no_checkpoint(train_small, monkeypatch, method):
    monkeypatch.setattr("imagenet_flags.DEBUG_BATCHES", 2)
    (log,) = (train_small(*(method, "--debug", 1, "-p", 1)).folder).iterdir()
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


def test_the_published_cut_of_resnet_152_reads_14x14():
    with torch.device("meta"):
        net = resnet.greedy_resnet("resnet152", 2)
        assert [len(module.body) for module in net] == [26, 25]
        assert net[0].body(torch.zeros(1, 3, 224, 224)).shape == (1, 1024, 14, 14)
    assert net[0].auxiliary[0].output_size == (4, 4)


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


def test_dgl_is_each_module_learning_alone(train_small, folder):
    """Weights after two epochs are those of plain SGD on each module's own loss, by the images the data give."""
    left = train_small(VGG)
    torch.manual_seed(1)
    net = vgg.greedy_vgg("vgg11", 3, CLASSES, 32, width=2).double()
    train, _, _ = imagenet_folders.load(folder, image_size=32, batch_size=8, workers=0, seed=1)
    velocity = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for epoch in (1, 2):
        for images, labels in train:
            gradients = []
            for module in net:
                images, logits = module(images.detach())
                loss = F.cross_entropy(logits.float(), labels)
                gradients += torch.autograd.grad(loss, list(module.parameters()))
            for parameter, gradient, speed in zip(net.parameters(), gradients, velocity, strict=True):
                speed.mul_(0.9).add_(gradient + 1e-4 * parameter.detach())
                parameter.data -= 0.01 * 0.1 ** (epoch - 1) * speed
    for name, value in net.state_dict().items():
        torch.testing.assert_close(left.weights[name], value, rtol=1e-7, atol=1e-10, msg=name)


def numpy_top(outputs, labels, k):
    """Top-k accuracy in %, of equal outputs the lower class first."""
    order = np.argsort(-outputs, axis=1, kind="stable")
    return 100 * np.mean([label in row[:k] for row, label in zip(order, labels, strict=True)])


@pytest.mark.parametrize("method", [VGG, RESNET], ids=["vgg", "resnet"])
def test_the_logs_accuracies_are_numpys(train_small, folder, method):
    """Every head's, and those of the ensembles: softmax of head i weighted 2^i / (2^(n+1) - 1)."""
    left = train_small(method)
    build = vgg.greedy_vgg if method is VGG else resnet.greedy_resnet
    net = build(method[2], method[4], CLASSES, 32, width=2).double()
    net.load_state_dict(left.weights)
    _, val, _ = imagenet_folders.load(folder, image_size=32, batch_size=8, workers=0)
    with torch.no_grad():
        every = [net.eval()(images) for images, _ in val]
    heads = [torch.cat([logits[n] for logits in every]).float().numpy() for n in range(len(net))]
    labels = np.array([label for _, label in (val.images[1, index] for index in range(VAL))])
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
    np.testing.assert_allclose(
        ensembles([torch.from_numpy(h) for h in heads])[-1],
        sum(2**n * h for n, h in enumerate(heads)) / (2 ** len(heads) - 1),
        rtol=1e-5,
    )


def test_ensembles_are_of_probabilities_not_logits(train_small):
    evaluated = []
    train_small(
        VGG,
        "--nepochs",
        1,
        evaluate=lambda net, *args, **options: evaluated.append(net) or evaluate(net, *args, **options),
    )
    logits = [torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 3.9]]), torch.tensor([[-50.0, 0.0, 0.1]])]
    del evaluated[0].net  # a module: only another may take its place
    evaluated[0].net = lambda images: logits
    outputs = evaluated[0](None)
    probabilities = [np.exp(head.numpy()) / np.exp(head.numpy()).sum() for head in logits]
    expected = [
        probabilities[0],
        (probabilities[0] + 2 * probabilities[1]) / 3,
        (probabilities[0] + 2 * probabilities[1] + 4 * probabilities[2]) / 7,
    ]
    for mine, its in zip(outputs, [head.numpy() for head in logits] + expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), its, rtol=1e-5)


def test_top_5_is_exact_with_ties():
    logits = torch.randint(3, (200, 9)).float()
    labels = torch.randint(9, (200,))
    meter = Meter((1, 5))
    for rows in torch.arange(200).split(64):
        meter.update(torch.tensor(1.0), logits[rows], labels[rows])
    assert (meter.top1, meter.top5) == pytest.approx(
        (numpy_top(logits.numpy(), labels.numpy(), 1), numpy_top(logits.numpy(), labels.numpy(), 5))
    )
    again = Meter((1, 5))
    again.load_state_dict(meter.state_dict())
    again.update(torch.tensor(3.0), logits[:50], labels[:50])
    assert again.count == 250 and again.loss == pytest.approx((200 + 150) / 250)


def test_backprop_logs_the_rate_that_fell(train_small):
    frame = read_log(train_small(END, "--nepochs", 3, "--epochdecay", 2).log)
    assert frame["lr"].tolist() == pytest.approx([0.01, 0.01, 0.001]) and frame["loss"].notna().all()


def test_without_ensembles(train_small):
    frame = read_log(train_small(VGG, "--ensemble", 0, "--nepochs", 1).log)
    assert frame["ensemble_top1"].isna().all() and frame["test_top1"].notna().all()


# Stopping and resuming


def stopping(after, evaluating=False, number=signal.SIGTERM):
    """A change of a network that sends this process a signal in its forward pass number ``after``, of training or of
    evaluation.
    """
    calls = []

    def hook(module, inputs):
        if module.training != evaluating:
            calls.append(1)
            if len(calls) == after:
                os.kill(os.getpid(), number)

    def adapt(net):
        part = net[0].body if hasattr(net[0], "body") else net[0]
        part.register_forward_pre_hook(hook)
        return net

    return adapt


STOPS = [
    (1, False),
    (4, False),
    (6, False),
    (5, True),
]  # of 3 batches an epoch, and 3 of evaluation; building VGG and ResNet takes an evaluation of its own
METHODS = {"vgg": VGG, "resnet": RESNET, "end to end": END}


@pytest.mark.parametrize(
    ("method", "stop"),
    [("vgg", stop) for stop in STOPS] + [("resnet", STOPS[1]), ("end to end", STOPS[1]), ("end to end", STOPS[3])],
)
def test_a_signal_finishes_the_batch_and_resume_goes_on_exactly(train_small, capsys, method, stop):
    method, number = METHODS[method], signal.SIGINT if stop[0] == 4 else signal.SIGTERM
    whole = train_small(method, to="whole")
    with pytest.raises(SystemExit) as end:
        train_small(method, adapt=stopping(*stop, number))
    assert end.value.code == 128 + number
    after, evaluating = stop
    epoch, batch = (2, 3) if evaluating else divmod(after - 1, 3)
    place = f"epoch {epoch}, batch 3" if evaluating else f"epoch {epoch + 1}, batch {batch + 1}"
    message = capsys.readouterr().err
    assert (
        f"{number.name}: finishing this batch" in message
        and f"stopped after {place}, saved in " in message
        and "Traceback" not in message
    )
    left = train_small(method, "--resume", "auto")
    assert f"# resumed after {place}\n" in left.log.read_text()
    assert_same(left, whole)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_epochs_end_resumes_exactly(train_small, method):
    whole = train_small(method, to="whole")
    left = train_small(method, "--nepochs", 1)
    name = left.checkpoint
    assert_same(train_small(method, "--resume", name), whole)
    checkpoint = torch.load(name, weights_only=True)
    assert {"net", "optimizers", "schedules", "scalers", "train", "test", "meters"} == checkpoint["state"].keys()
    modules = 1 if method is END else 3
    assert len(checkpoint["state"]["optimizers"]) == len(checkpoint["state"]["scalers"]) == modules


def test_ctrl_c_with_workers_in_a_terminal(train_small, folder, tmp_path):
    """The signal goes to the whole process group, the workers included."""
    flags = [
        str(flag)
        for flag in (folder, *FLAGS, *VGG[1:], "-j", 2, "-p", 1, "--nepochs", 200, "--save_folder", tmp_path / "logs")
    ]
    command = [sys.executable, "-u", ROOT / "tests/small_imagenet.py", DGL, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("epoch 2, batch 2"):
                    os.killpg(process.pid, signal.SIGINT)
                    break
            _, message = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, message
    assert "SIGINT: finishing this batch" in message and "stopped after epoch" in message and "Traceback" not in message
    place = re.search(r"stopped after epoch (\d+), batch (\d+)", message)
    (log,) = (tmp_path / "logs").glob("*.log")
    checkpoint = torch.load(log.with_suffix(".pt"), weights_only=True)
    assert (checkpoint["epoch"], checkpoint["batch"], checkpoint["within"]) == (int(place[1]), int(place[2]), True)
    assert [meter["sums"][0] for meter in checkpoint["state"]["meters"]] == [min(8 * int(place[2]), TRAIN)] * 3


# Several processes


def torchrun(*command, processes=2):
    """Runs tests/small_imagenet.py under torchrun; returns what it printed to stderr."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    full = [*runner, str(ROOT / "tests/small_imagenet.py"), *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        out, message = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, message


def assert_close(left, whole):
    """Weights and momentum within what double precision with losses in single leaves, results to 4 digits."""
    for mine, its in zip(result_lines(left), result_lines(whole), strict=True):
        numbers = [[float(text) for text in re.findall(r"[\d.]+", line)] for line in (mine, its)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    for mine, its in zip(tensors(left.state), tensors(whole.state), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_two_processes_are_one(train_small, folder, tmp_path):
    """The same global batch gives the same weights and log, though a short batch is shared 3 to 2, and one image of
    val/ is left to one process.
    """
    whole = train_small(VGG, to="whole")
    code, out, message = torchrun(DGL, folder, *FLAGS, *VGG[1:], "--save_folder", tmp_path / "logs")
    assert code == 0, message
    left = Finished(tmp_path / "logs")
    assert_close(left, whole)
    text = left.log.read_text()
    assert "# processes: 2, gloo\n" in text and "# batch norm: over all processes\n" in text
    assert out.count("finished: ") == 1


def test_two_processes_go_on_where_one_stopped(train_small, folder, tmp_path):
    whole = train_small((*END[:2], "resnet50"), to="whole")
    with pytest.raises(SystemExit):
        train_small((*END[:2], "resnet50"), adapt=stopping(5))
    code, _, message = torchrun(
        BACKPROP, folder, *FLAGS, "--arch", "resnet50", "--save_folder", tmp_path / "logs", "--resume", "auto"
    )
    assert code == 0, message
    assert_close(Finished(tmp_path / "logs"), whole)


def test_stages_and_their_replicas_are_one(train_small, folder, tmp_path):
    """With one replica of each stage to the bit. With two within what double precision leaves, where all stop after the
    same mini-batch, for a signal to one of the upper stage, and one process goes on. Ensembles are of all heads.
    """

    def run(processes, to, *flags, **more):
        words = (DGL, folder, *FLAGS, *VGG[1:], "--save_folder", tmp_path / to, *flags)
        return {"processes": processes, "words": [str(word) for word in words], **more}

    (stages, _), (mesh, message) = launch(
        run(3, "stages", "--stages", 3, "--queue", 1),
        run(4, "mesh", "--stages", 2, "--modules-per-stage", "1,2", faults={"3": [4, "SIGTERM"]}),
    )
    assert stages == "finished" and mesh == "[143]" and message.count("stopped after epoch ") == 1, message
    whole = train_small(VGG, to="whole")
    assert_same(Finished(tmp_path / "stages"), whole)
    text = Finished(tmp_path / "mesh").log.read_text()
    assert "# processes: 4, gloo, modules 1,2, 2 replicas of each\n" in text
    assert "# batch norm: over the replicas of each module\n" in text
    left = train_small(VGG, "--resume", to="mesh")
    assert_close(left, whole)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_global_batch_norm_of_one_process_is_batch_norm(alone, shape):
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4).double()
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    ours = global_batch_norm.globalize(nn.Sequential(type(plain)(4).double()), torch.device("cpu"))
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


def test_apex_is_nvidias(train_small, capsys, monkeypatch):
    for module in (None, types.ModuleType("apex")):  # absent; PyPI's, which has no optimizers
        monkeypatch.setitem(sys.modules, "apex", module)
        with pytest.raises(SystemExit) as stop:
            train_small(VGG, "--fused-sgd", "apex")
        message = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and message.count("\n") == 1
            and "the PyPI package called apex is another one" in message
        )
    nvidia = types.ModuleType("apex.optimizers")
    nvidia.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", nvidia)
    with pytest.raises(SystemExit):
        train_small(VGG, "--fused-sgd", "apex")
    assert "--fused-sgd apex needs CUDA" in capsys.readouterr().err


def test_fused_and_plain_sgd_agree(train_small):
    fused, plain = train_small(VGG, "--nepochs", 1), train_small(VGG, "--nepochs", 1, "--fused-sgd", "none", to="plain")
    for mine, its in zip(tensors(fused.weights), tensors(plain.weights), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def test_half_on_the_cpu_is_bf16(run_script, folder, tmp_path, monkeypatch):
    monkeypatch.undo()  # images in single precision
    widths = {
        name: (lambda real: lambda *a, **k: real(*a, **k, width=2))(getattr(script, name))
        for name in ("greedy_vgg", "greedy_resnet")
    }
    seen = set()

    def watched(*args, **settings):
        net = widths["greedy_vgg"](*args, **settings)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda module, inputs, output: seen.add(output.dtype) if module.training else None
                )
        return net

    sys.argv = [
        str(ROOT / DGL),
        *map(str, (folder, *FLAGS, *VGG[1:], "--half", "--dynamic-loss-scale", "--log-dir", tmp_path / "half")),
    ]
    load = load_script(DGL)
    load.greedy_vgg = watched
    load.main()
    assert seen == {torch.bfloat16} and "bf16 mixed" in Finished(tmp_path / "half").log.read_text()


# Bad input


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        (VGG, ("--arch", "vgg12"), "argument -a/--arch: invalid choice: 'vgg12'"),
        (END, ("--arch", "vgg12"), "argument -a/--arch: invalid choice: 'vgg12'"),
        (VGG, ("--block_size", 9), "block size 9 is impossible: the network has 8 layers, so choose from 1 to 8"),
        (VGG, ("--splits", 2), "--splits cuts other networks: choose how vgg11 is cut by --block_size"),
        (RESNET, ("--splits", 18), "17 pieces do not split into 18 parts: choose from 1 to 17 splits"),
        (RESNET, ("--splits", 0), "'0' must be an integer ≥ 1"),
        (RESNET, ("--block_size", 2), "--block_size groups VGG's convolutions: choose how resnet50 is cut by --splits"),
        (
            RESNET,
            ("--image-size", 16),
            "--image-size 16 is too small for resnet50, which halves it five times: choose at least 32",
        ),
        (VGG, ("--image-size", 16), "--image-size 16 is too small for vgg11"),
        (VGG, ("--dynamic-loss-scale",), "a loss scale is for mixed precision: add --half"),
        (VGG, ("--static-loss-scale", 128), "a loss scale is for mixed precision: add --half"),
        (VGG, ("--stages", 2), "--stages 2 needs 2 processes or a multiple of that, not 1: start"),
        (VGG, ("--modules-per-stage", "1,2"), "--modules-per-stage is for several stages: add --stages K"),
        (VGG, ("--local-batch-norm",), "--local-batch-norm is for several processes: start the script with torchrun"),
        (VGG, ("-b", 22), "21 training images are fewer than one batch of 22: choose a smaller -b"),
        (
            VGG,
            ("-b", 10),
            "21 images in batches of 10 leave a batch of 1, where at least 2 are needed: choose another -b",
        ),
        (VGG, ("--train-samples", 22), "--train-samples 22 is more than the 21 images there are"),
        (VGG, ("--val-samples", 18), "--val-samples 18 is more than the 17 images there are"),
        (VGG, ("--resume",), "nothing to resume in "),
        (VGG, ("--device", "cuda:7"), "--device cuda:7 is not on this machine"),
        (VGG, ("-j", -1), "'-1' must be an integer ≥ 0"),
    ],
)
def test_bad_flags(fails, folder, method, flags, message):
    assert message in fails(method[0], folder, *FLAGS, *method[1:], *flags)


def test_a_loss_that_is_not_finite_stops_the_run(train_small, capsys):
    def poison(net):
        net[1].auxiliary.register_forward_hook(
            lambda module, inputs, output: output * float("nan") if module.training else None
        )
        return net

    with pytest.raises(SystemExit) as stop:
        train_small(VGG, adapt=poison)
    assert stop.value.code == 2 and "the loss of module 2 became nan in epoch 1, batch 1" in capsys.readouterr().err


# On a GPU


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("gloo", marks=pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU")),  # shared by the two
        pytest.param("nccl", marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")),
    ],
)
def test_two_processes_on_gpus_are_one(train_small, folder, tmp_path, backend):
    """SyncBatchNorm in the place of GlobalBatchNorm."""
    flags = [flag if flag != "cpu" else "cuda" for flag in FLAGS]
    whole = train_small(VGG, "--device", "cuda", to="whole")
    code, _, message = torchrun(DGL, folder, *flags, *VGG[1:], "--backend", backend, "--save_folder", tmp_path / "logs")
    assert code == 0, message
    assert_close(Finished(tmp_path / "logs"), whole)


@pytest.mark.skipif(GPUS != 1, reason="needs one CUDA GPU")
def test_nccl_with_more_processes_than_gpus_is_refused(folder, tmp_path):
    flags = [flag if flag != "cpu" else "cuda" for flag in FLAGS]
    code, _, message = torchrun(DGL, folder, *flags, *VGG[1:], "--backend", "nccl", "--save_folder", tmp_path / "logs")
    assert code != 0 and "there are more processes than GPUs (1): start fewer, or let them share with" in message
