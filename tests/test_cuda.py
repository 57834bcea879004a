"""Every script on a GPU: fp16 mixed precision with a loss scale for each module, and resuming. Skipped without one."""

import pytest
import torch

from decoupled.logs import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOY = ("--dataset", "digits", "--train-samples", 200, "--batch-size", 64)
SCRIPTS = [
    ("learning_curves/cifar_dgl.py", *TOY),
    ("learning_curves/cifar_sequential_greedy.py", *TOY),
    ("aux_nets/cifar_dgl.py", *TOY, "--channels", 16),
    ("aux_nets/cifar_dgl.py", *TOY, "--channels", 16, "--type_aux", "cnn"),
    ("dni/cifar_dgl.py", *TOY, "--channels", 16),
    ("ddg_comparison/cifar_dgl.py", *TOY, "--depth", 20, "--splits", 3),
    ("ddg_comparison/cifar_ddg.py", *TOY, "--depth", 20, "--splits", 3),
    ("ddg_comparison/cifar_backprop.py", *TOY, "--depth", 20),
    ("ddg_comparison/cifar_backprop.py", *TOY, "--depth", 20, "--checkpointing"),
    ("async_buffer/cifar_buffer.py", *TOY, "--feature_size", 16, "--buffer", 3),
    ("async_buffer/cifar_buffer.py", *TOY, "--feature_size", 16, "--buffer", 3, "--compress", 4),
    ("async_buffer/cifar_buffer.py", *TOY, "--feature_size", 16, "--buffer", 3, "--buffer-device", "cpu"),
]
IMAGENET = [
    ("imagenet/imagenet_dgl.py", "--arch", "vgg11", "--block_size", 3),
    ("imagenet/imagenet_dgl.py", "--arch", "resnet50"),
    ("imagenet/imagenet.py", "--arch", "resnet18"),
]


def check(left, epochs):
    """Finite results for each epoch, as many lines in each, and finite weights."""
    frame = read_log(left.log)
    assert sorted(frame.epoch.unique()) == [*range(1, epochs + 1)]
    assert len(frame) == epochs * (frame.epoch == 1).sum() and frame.test_top1.between(0, 100).all()
    assert "fp16 mixed" in left.log.read_text()
    assert all(weight.isfinite().all() for weight in left.weights.values())


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: " ".join(map(str, command)))
def test_half_then_resume(run_script, command):
    flags = (*command, "--device", "cuda", "--half")
    epochs = 1 if "sequential" in command[0] else 2  # of a later module no other number of epochs can be resumed
    check(run_script(*flags, "--epochs", 1), 1)
    check(run_script(*flags, "--epochs", epochs, "--resume"), epochs)


@pytest.mark.parametrize("command", IMAGENET, ids=lambda command: " ".join(map(str, command)))
def test_imagenet_half_then_resume(run_script, tmp_path, command):
    from test_imagenet import write_folders

    write_folders(tmp_path / "images")
    script, *arch = command
    flags = (script, tmp_path / "images", *arch, "--image-size", 64, "-b", 8, "-j", 2, "--lr", 1e-3)
    flags += ("--device", "cuda", "--half", "--dynamic-loss-scale")
    check(run_script(*flags, "--nepochs", 1), 1)
    check(run_script(*flags, "--nepochs", 2, "--resume"), 2)


def test_dni_refuses_fp16(fails):
    message = fails("dni/cifar_cnn_dni.py", *TOY, "--channels", 4, "--dni", "--device", "cuda", "--half")
    assert "--half means fp16 on CUDA" in message


def test_cifar_cnn_dni_then_resume(run_script):
    flags = ("dni/cifar_cnn_dni.py", *TOY, "--channels", 16, "--dni", "--context", "--device", "cuda")
    run_script(*flags, "--epochs", 1)
    left = run_script(*flags, "--epochs", 2, "--resume")
    assert len(read_log(left.log)) == 2
