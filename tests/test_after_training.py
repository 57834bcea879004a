"""What one does with a trained network: load it from its checkpoint, predict, leave early, export."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import PARALLEL, ROOT, SEQUENTIAL, Finished, load_script

import decoupled
from decoupled import InputError
from decoupled.analysis import predict
from decoupled.analysis.costs import costs
from decoupled.data import datasets
from decoupled.data.batches import Batches
from decoupled.data.images import InputForm
from decoupled.logs import final, read_log
from decoupled.networks.evaluation import evaluate
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training.flags import start
from decoupled.training.run import Run

DIGITS = "--dataset digits --train-samples 16 --batch-size 8 --epochs 1 --device cpu"
IMAGES = "IMAGES --image-size 32 -b 6 -j 0 --nepochs 1 --device cpu"
AUX = "aux_nets/cifar_dgl.py"
SCRIPTS = {
    PARALLEL: f"{DIGITS} --channels 4",
    SEQUENTIAL: f"{DIGITS} --channels 4",
    AUX: f"{DIGITS} --channels 4 --depth 5 --block_size 2 --type_aux cnn",
    "ddg_comparison/cifar_backprop.py": f"{DIGITS} --depth 8 --checkpointing --splits 3",
    "ddg_comparison/cifar_ddg.py": f"{DIGITS} --depth 8 --splits 3",
    "ddg_comparison/cifar_dgl.py": f"{DIGITS} --depth 8 --splits 3",
    "dni/cifar_cnn_dni.py": f"{DIGITS} --channels 4 --dni --context",
    "dni/cifar_dgl.py": f"{DIGITS} --channels 4",
    "async_buffer/cifar_buffer.py": f"{DIGITS} --feature_size 4 --mlp 1 --nlin 1 --width_aux 4 --buffer 2 --down [1,2]",
    "imagenet/imagenet_dgl.py": f"{IMAGES} --arch squeezenet1_1 --splits 3 --nlin 1 --mlp 1",
    "imagenet/imagenet.py": f"{IMAGES} --arch resnet18",
}

# The others' networks have no layers that are not among these.
EXPORTED = (
    PARALLEL,
    "ddg_comparison/cifar_dgl.py",
    "dni/cifar_cnn_dni.py",
    "async_buffer/cifar_buffer.py",
    "imagenet/imagenet_dgl.py",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet of two classes: three training images each, two for val."""
    draw, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for split, each in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = draw.integers(0, 256, (40, 44 + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_of_every_script_gives_its_network_which_exports(run_script, folder, monkeypatch, script):
    words = [str(folder) if word == "IMAGES" else word for word in SCRIPTS[script].split()]
    left = run_script(script, *words, "--lr", 0.02)
    random_state = torch.get_rng_state()
    net = decoupled.load(left.checkpoint)
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's random numbers are the caller's
    assert not any(module.training for module in net.modules())
    if script.startswith("imagenet/"):
        import imagenet_folders

        _, test, _ = imagenet_folders.load(folder, image_size=32, batch_size=6, workers=0)
    else:
        _, test, _ = datasets.load("digits", batch_size=8)
    logged = final(read_log(left.log))["test_top1"].tolist()
    assert [meter.top1 for meter in evaluate(net, test)] == pytest.approx(logged, abs=1e-4)
    if script in EXPORTED:
        images = next(iter(test))[0][:4]
        exported = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        with torch.no_grad():
            for some in (images, images[:3]):
                assert all(torch.equal(*pair) for pair in zip(exported(some), net(some), strict=True))
    for optimizer in left.state["optimizers"]:
        (group,) = optimizer["param_groups"]
        assert group.get("initial_lr", group["lr"]) == 0.02
    monkeypatch.setattr(sys, "argv", [script, *words])
    published = 3e-5 if script.startswith("dni/") else 0.01 if script.startswith("ddg") else 0.1
    assert load_script(script).parse_args().lr == published


# One run that has learned something


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three small modules on the digits: (checkpoint, network, test images, labels)."""
    folder = tmp_path_factory.mktemp("run")
    words = (
        "--dataset digits --train-samples 600 --batch-size 50 --epochs 4 --lr 0.02 --device cpu --channels 8 --depth 3"
    )
    argv, sys.argv = sys.argv, [str(ROOT / AUX), *words.split(), "--log-dir", str(folder)]
    try:
        start(load_script(AUX).main)
    finally:
        sys.argv = argv
    (checkpoint,) = folder.glob("*.pt")
    _, test, _ = datasets.load("digits", batch_size=50, train_samples=600, test_batch_size=359)
    ((images, labels),) = test
    return checkpoint, decoupled.load(checkpoint), images, labels


@pytest.fixture
def stderr():
    """The lines that say's last command printed to stderr."""
    return []


@pytest.fixture
def say(monkeypatch, capsys, stderr):
    """say(*words): the lines that python -m decoupled predict prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, words), "--device", "cpu"])
        capsys.readouterr()
        start(predict.main)
        printed = capsys.readouterr()
        stderr[:] = printed.err.splitlines()
        return printed.out.splitlines()

    return run


@pytest.fixture
def refused(say, capsys):
    """refused(*words): the one line on stderr with which python -m decoupled predict ends, with exit code 2."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            say(*words)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if not line.startswith("checkpoint: ")]
        assert stop.value.code == 2 and len(lines) == 1 and printed.out == ""
        return lines[0]

    return run


def test_the_heads_accuracies_are_those_of_the_log(run, say, tmp_path):
    checkpoint, net, images, _ = run
    lines = say(checkpoint.parent, "--output", tmp_path / "exits.png")
    assert lines[0] == f"{AUX}, 359 images of digits (scikit-learn), the test set"
    with Image.open(tmp_path / "exits.png") as image:
        assert image.size[0] > 300
    frame = predict.pd.read_csv(tmp_path / "exits.csv")
    heads = frame[frame["exit"] == "head"]
    logged = final(read_log(checkpoint.with_suffix(".log")))["test_top1"]
    assert heads["top1"].tolist() == pytest.approx(logged.tolist(), abs=1e-4) and logged.max() > 50
    flops = costs(net, images[:2])["flops"]
    alone = [sum(flops[k, "body"] for k in range(1, n + 1)) + flops[n, "auxiliary"] for n in (1, 2, 3)]
    assert heads["gflops"].tolist() == pytest.approx([value / 1e9 for value in alone], abs=1e-4)
    assert heads["saved"].tolist() == pytest.approx([100 * (1 - value / alone[-1]) for value in alone], abs=1e-3)


@pytest.mark.parametrize("confidence", [0, 0.5, 0.8])
def test_images_that_have_left_pass_no_further_module(run, confidence):
    _, net, images, labels = run
    counts, hooks = [], []
    for module in net:
        hooks.append(module.body.register_forward_hook(lambda _, inputs, output: counts.append(len(inputs[0]))))
    logits, heads = predict.early_exit(net, images, confidence)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        every_logits = net(images)
    assert torch.equal(heads, predict.exit_heads(every_logits, confidence))
    chosen = torch.stack(every_logits)[heads, torch.arange(len(images))]
    torch.testing.assert_close(logits, chosen)
    sure = [said.softmax(1).amax(1) >= confidence for said in every_logits]
    staying = [len(images), (~sure[0]).sum().item(), (~sure[0] & ~sure[1]).sum().item()]
    assert counts == [count for count in staying if count]
    assert len(counts) == (3 if confidence else 1) and (confidence != 0.5 or len(set(counts)) == 3)
    frame = predict.evaluate_exits(net, [(images, labels)], [confidence])
    early = frame[frame["exit"] == "early"].iloc[0]
    assert early["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    flops = costs(net, images[:2])["flops"]
    modules = [flops[n, "module"] for n in (1, 2, 3)]
    spent = sum(modules[n] * count for n, count in enumerate(counts)) / len(images)
    assert early["gflops"] * 1e9 == pytest.approx(spent)


def test_image_files(run, say, tmp_path):
    checkpoint, net, images, _ = run
    _, test, _ = datasets.load("digits", batch_size=50)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, pixels in zip(paths, test.images[:3], strict=True):
        Image.fromarray(pixels.numpy()).save(path)
    with torch.no_grad():
        every_logits = [logits[:3] for logits in net(images)]
    confidences = [logits.softmax(1).max(1) for logits in every_logits]

    def line(number, head):
        sure, label = (values[number] for values in confidences[head])
        return rf"{re.escape(str(paths[number]))}: {label}, {sure:.3f}, head {head + 1}, (-?\d+\.\d) % of FLOPs saved"

    def matching(lines, expected):
        return [float(re.fullmatch(line(*place), text)[1]) for text, place in zip(lines, expected, strict=True)]

    assert matching(say(checkpoint, *paths), [(0, 2), (1, 2), (2, 2)]) == [0, 0, 0]
    assert matching(say(checkpoint, paths[0], "--heads", 2), [(0, 1)])[0] > 0
    matching(say(checkpoint, paths[1], "--heads", "all"), [(1, 0), (1, 1), (1, 2)])
    heads = predict.exit_heads(every_logits, 0.7).tolist()
    matching(say(checkpoint, *paths, "--early-exit", 0.7), list(enumerate(heads)))
    assert matching(say(checkpoint, paths[0], "--early-exit", 1), [(0, 2)])[0] < 0  # the heads passed cost something
    (tmp_path / "labeled" / "3").mkdir(parents=True)
    shutil.copy(paths[0], tmp_path / "labeled" / "3" / "a.png")
    right = 100 * (confidences[2][1][0] == 3)
    assert re.search(rf"head +3 +{right:.0f} ", "\n".join(say(checkpoint, tmp_path / "labeled")))


def test_an_image_becomes_what_the_network_was_trained_on(tmp_path, folder):
    _, test, _ = datasets.load("digits", batch_size=50)
    Image.fromarray(test.images[5].numpy()).save(tmp_path / "digit.png")
    assert torch.equal(test.form.read(tmp_path / "digit.png"), test.images[5])
    grey = torch.randint(1, 256, (1, 28, 28), dtype=torch.uint8)
    Image.fromarray(grey[0].numpy()).save(tmp_path / "shirt.png")
    form = InputForm(["shirt"], (0,) * 3, (1,) * 3, **datasets.FORMS["fashion-mnist"])
    assert torch.equal(form.read(tmp_path / "shirt.png"), datasets.grey_to_rgb(grey)[0])
    sys.path.insert(0, str(ROOT / "imagenet"))
    import imagenet_folders

    _, val, _ = imagenet_folders.load(folder, image_size=32, batch_size=4, workers=0)
    assert val.form.classes == ["cat", "dog"]
    ((images, _),) = val
    pixels = torch.stack([val.form.read(path.decode()) for path in val.samples.dataset.paths])
    ((mine, _),) = Batches(pixels, torch.zeros(4), 4, mean=val.form.mean, std=val.form.std)
    assert torch.equal(mine, images)


def test_a_script_of_ones_own(run, tmp_path):
    """A copy of a script elsewhere loads by its path; what it lacks is said."""
    checkpoint, net, images, _ = run
    (tmp_path / "mine").mkdir()
    shutil.copy(ROOT / AUX, tmp_path / "mine" / "idea.py")
    other = tmp_path / "other.pt"
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"script": "mine/idea.py"}, other)
    with pytest.raises(InputError, match="script="):
        decoupled.load(other)
    with torch.no_grad():
        mine = decoupled.load(other, script=tmp_path / "mine" / "idea.py")(images)
        assert all(torch.equal(a, b) for a, b in zip(mine, net(images), strict=True))
    (tmp_path / "mine" / "idea.py").write_text("")
    with pytest.raises(InputError, match=r"idea\.py has no build\(args, classes\)"):
        decoupled.load(other, script=tmp_path / "mine" / "idea.py")


@pytest.mark.parametrize(
    "change",
    [
        {"script": "../evil.py"},
        {"data": {}},
        {"data": {"classes": ["a"]}},
        {"state": {"optimizers": []}},
        {"script": PARALLEL},
        {"format": 2},
        {"data": None},
    ],
    ids=str,
)
def test_checkpoints_that_will_not_do(run, tmp_path, change):
    torch.save(torch.load(run[0], weights_only=True) | change, tmp_path / "changed.pt")
    with pytest.raises(InputError):
        decoupled.load(tmp_path / "changed.pt")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("/nonexistent.pt", "/nonexistent.pt"),
        ("RUN /nonexistent.png", "/nonexistent.png"),
        ("RUN LOG", ".log"),
        ("RUN LOG --heads 4", "--heads"),
        ("RUN LOG --heads 1 --early-exit 0.5", "--heads"),
        ("RUN LOG --early-exit 90", "--early-exit"),
        ("RUN LOG --output x.png", "--output"),
        ("RUN --output x.xyz", "--output"),
        ("RUN --heads 1", "--heads"),
        ("RUN FOLDER LOG", "/val"),
        ("RUN FOLDER", "/val/cat"),
        ("RUN FOLDER/cat", "/val/cat"),
        ("FOLDER", "/val"),
    ],
)
def test_what_cannot_be_predicted(run, folder, refused, words, named):
    val = folder / "val"
    names = {"RUN": run[0], "LOG": run[0].with_suffix(".log"), "FOLDER": val, "FOLDER/cat": val / "cat"}
    assert named in refused(*(names.get(word, word) for word in words.split()))


def test_of_a_folder_of_runs_the_newest_by_name_is_taken_whenever_it_was_copied(run, say, tmp_path):
    for name in ("a-20260102-000000-1.pt", "a-20260102-000000.pt", "z-20260101-000000.pt", "other.pt"):
        shutil.copy(run[0], tmp_path / name)
        os.utime(tmp_path / name, (len(name), len(name)))
    saved = torch.load(run[0], weights_only=True)
    torch.save(saved | {"script": "mine/newest.py"}, tmp_path / "a-20260102-000000-1.pt")
    with pytest.raises(SystemExit):
        say(tmp_path)  # its script is missing
    (tmp_path / "a-20260102-000000-1.pt").unlink()
    assert say(tmp_path)[0].startswith(f"{AUX}, 359 images")


def draw_folder(root, splits, classes, count, start=0):
    """Writes ``count`` images of noise per class, 32×32, as root/SPLIT/CLASS/NUMBER.png."""
    draw = np.random.default_rng(start)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(start, start + count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_folder_of_ones_own_is_compared_with_what_the_run_saw(run_script, say, stderr, refused, tmp_path):
    images = tmp_path / "images"
    draw_folder(images, ("train", "test"), ("b", "c"), 4)
    (images / "test/b/.DS_Store").touch()
    (images / "test/c/Thumbs.db").touch()
    flags = ("--dataset", "folder", "--data-dir", images, "--batch-size", 4, "--epochs", 1, "--device", "cpu")
    left = run_script(AUX, *flags, "--channels", 2, "--depth", 2)
    own = say(left.checkpoint)
    assert stderr == []
    named = say(left.checkpoint, images / "test")
    assert "8 images" in own[0] and "8 images" in named[0] and own[1:] == named[1:]  # read in the same way
    draw_folder(images, ("test",), ("b",), 1, start=9)
    say(left.checkpoint)
    (note,) = stderr  # other images than those that the run was tested on
    assert str(images) in note
    for split in ("train", "test"):
        shutil.move(images / split / "b", images / split / "d")
    assert "'b'" in refused(left.checkpoint)
    assert "/test/d" in refused(left.checkpoint, images / "test")


@pytest.mark.parametrize("script", [AUX, SEQUENTIAL])
def test_an_unfinished_run_is_noted(run_script, say, stderr, monkeypatch, script):
    left = run_script(script, *DIGITS.split(), "--channels", 2, "--name", "whole")
    say(left.checkpoint)
    assert stderr == []
    real = Run.save

    def save_and_stop(run):
        real(run)
        if run.epoch == 1:  # of the sequential run's first module
            sys.exit(1)

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(SystemExit):
        run_script(script, *DIGITS.split(), "--channels", 2, *(["--epochs", 2] if script == AUX else []))
    left = Finished(left.folder)
    say(left.checkpoint)
    (note,) = stderr
    assert str(left.checkpoint) in note


def test_flops_of_attention_are_counted():
    attention = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    (flops,) = predict.exit_flops(attention, torch.zeros(1, 5, 16)).alone
    assert flops >= 5 * 2 * (4 * 16 * 16 + 2 * 16 * 32)  # projections and the two linear layers
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_network_without_modules_below_has_one_head(tmp_path):
    net = layerwise_cnn(channels=4, depth=2, downsample=(), block_size=2).eval()
    images = torch.randn(6, 3, 32, 32)
    frame = predict.evaluate_exits(net, [(images, torch.zeros(6, dtype=torch.int64))])
    assert frame["exit"].tolist() == ["head"] and frame["saved"].tolist() == [0]


# Tuning without the test set


def test_validation_images_are_training_images_the_same_for_every_seed():
    whole, test, _ = datasets.load("digits", batch_size=8)
    train, held, _ = datasets.load("digits", batch_size=8, validation=200, seed=1)
    again, same, _ = datasets.load("digits", batch_size=8, validation=200, seed=2, train_samples=100)
    assert torch.equal(held.images, same.images) and torch.equal(held.labels, same.labels)
    assert torch.equal(again.images, train.images[:100])
    inner = whole.images[:, 4:36, 4:36]
    everything = torch.cat([train.images[:, 4:36, 4:36], held.images]).flatten(1)
    assert sorted(everything.tolist()) == sorted(inner.flatten(1).tolist())
    assert held.fingerprint != test.fingerprint and len(held.labels.unique()) == 10
    assert str(held) == "200 images of digits (scikit-learn), held out of the training images"


def test_a_run_with_validation_never_evaluates_test_images(run_script):
    evaluated = []

    def few(net, batches):
        evaluated.extend(images for images, _ in batches)
        return evaluate(net, [(evaluated[0][:2], torch.zeros(2, dtype=torch.int64))])

    left = run_script(AUX, *DIGITS.split(), "--channels", 2, "--depth", 2, "--validation", 30, evaluate=few)
    _, held, _ = datasets.load("digits", batch_size=8, validation=30, train_samples=16)
    assert torch.equal(torch.cat(evaluated), next(iter(held))[0])
    text = left.log.read_text()
    assert "# test: 30 images of digits (scikit-learn), held out of the training images\n" in text
    assert "# train: 16 images of digits (scikit-learn)\n" in text


def test_validation_that_leaves_too_little():
    with pytest.raises(InputError, match="--validation 1438 leaves none of the 1438 training images"):
        datasets.load("digits", batch_size=8, validation=1438)
    with pytest.raises(InputError, match="1400 is more than the 1338 training images of digits that --validation"):
        datasets.load("digits", batch_size=8, validation=100, train_samples=1400)
