"""The released scripts' flags: their names, defaults and meaning here, and what is said of those without an effect."""

import sys

import pytest
from running import load_script

from decoupled.training.flags import Parser

COMMON = {"batch_size": 128, "epochs": 50, "seed": 1, "name": ""}
IMAGENET = {
    "workers": 4, "batch_size": 256, "lr": 0.1, "momentum": 0.9, "wd": 1e-4, "print_freq": 10, "resume": None,
    "epochs": 50, "epochdecay": 10, "name": "", "half": False, "static_loss_scale": 1, "dynamic_loss_scale": False,
    "log_dir": ".", "image_size": 224, "debug": 0,
}  # fmt: skip
DNI = {"batch_size": 256, "seed": 1, "log_interval": 10}
# script → (words that it needs, defaults)
DEFAULTS = {
    "learning_curves/cifar_dgl.py": ((), COMMON),
    "learning_curves/cifar_sequential_greedy.py": ((), COMMON),
    "aux_nets/cifar_dgl.py": ((), COMMON | {"type_aux": "mlp-sr", "block_size": 1}),
    "ddg_comparison/cifar_dgl.py": ((), COMMON | {"epochs": 300}),
    "ddg_comparison/cifar_ddg.py": ((), COMMON | {"epochs": 300}),
    "ddg_comparison/cifar_backprop.py": ((), COMMON | {"epochs": 300}),
    "dni/cifar_cnn_dni.py": ((), DNI | {"epochs": 2000, "dni": False, "context": False, "sgd": False}),
    "dni/cifar_dgl.py": ((), DNI | {"epochs": 1500, "name": ""}),
    "imagenet/imagenet.py": (("DIR",), IMAGENET),
    "imagenet/imagenet_dgl.py": (
        ("DIR", "--arch", "vgg13"),
        IMAGENET | {"nlin": 3, "mlp": 3, "block_size": 1, "ensemble": 1},
    ),
    "async_buffer/cifar_buffer.py": (
        (),
        {
            "lr": 0.1, "ncnn": 6, "epochs": 50, "epochdecay": 15, "feature_size": 128, "ds_type": "maxpool", "mlp": 3,
            "nlin": 0, "ensemble": 1, "batch_size": 128, "bn": 1, "buffer": 0, "down": (1, 3), "noise": 0.0,
            "layer_noise": 0, "buffer_sampling": "priority_lifo", "layer_sequence": "random", "max_buffer_reuse": None,
            "seed": 1, "name": "", "avg_size": 16,
        },
    ),
}  # fmt: skip
CIFAR = ("learning_curves/cifar_dgl.py", "aux_nets/cifar_dgl.py", "dni/cifar_cnn_dni.py", "ddg_comparison/cifar_dgl.py")
# (script, words, the arguments they set)
SPELLINGS = [
    *((script, "--batch_size 4 --no_cuda", {"batch_size": 4, "device": "cpu"}) for script in CIFAR),
    ("aux_nets/cifar_dgl.py", "--type-aux cnn --block-size=2", {"type_aux": "cnn", "block_size": 2}),
    ("dni/cifar_dgl.py", "--log_interval 3", {"log_interval": 3}),
    ("imagenet/imagenet_dgl.py", "DIR -a vgg19 -b 8 -j 2 -p 3", {"arch": "vgg19", "batch_size": 8, "workers": 2}),
    ("imagenet/imagenet_dgl.py", "DIR --learning-rate .2 --weight-decay .5", {"lr": 0.2, "wd": 0.5}),
    ("imagenet/imagenet_dgl.py", "DIR --large_size_images 0 --save-folder x", {"image_size": 112, "log_dir": "x"}),
    ("imagenet/imagenet_dgl.py", "DIR --nepochs 3", {"epochs": 3}),
    ("imagenet/imagenet_dgl.py", "DIR --epochs 3 --debug 1", {"epochs": 3, "debug": 1}),
    (
        "imagenet/imagenet.py",
        "DIR --half --static_loss_scale 8 --dynamic_loss_scale",
        {"static_loss_scale": None, "dynamic_loss_scale": True},
    ),
    *(
        ("imagenet/imagenet.py", f"DIR --arch {arch}", {"arch": arch})
        for arch in ("resnet18", "resnet152", "vgg13", "vgg13_bn", "vgg19_bn", "wide_resnet50_2")
    ),
    ("async_buffer/cifar_buffer.py", "--nepochs 2 --feature-size 4 --ds_type psi", {"epochs": 2, "feature_size": 4}),
    (
        "async_buffer/cifar_buffer.py",
        "--buffer 2 --buffer_sampling priority_lifo --max_buffer_reuse 3 --layer-noise 1",
        {"buffer": 2, "max_buffer_reuse": 3, "layer_noise": 1},
    ),
]
DROPPED = [  # script, words, the flag that does the job here
    ("async_buffer/cifar_buffer.py", "-j 4", ""),
    ("async_buffer/cifar_buffer.py", "--prog 1", ""),
    ("async_buffer/cifar_buffer.py", "--decay .1", "--epochdecay"),
    ("async_buffer/cifar_buffer.py", "--debug-parameters", ""),
    *(
        ("imagenet/imagenet_dgl.py", f"DIR {flag} 3", instead)
        for flag, instead in (
            ("--ncnn", "--block_size"),
            ("--feature_size", "--arch"),
            ("--ds_type", "--arch"),
            ("--start_epoch", "--resume"),
            ("--resume-epoch", "--resume"),
            ("--resume_feat", "--resume"),
        )
    ),
]


def parse(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", [script, *words])
    return vars(load_script(script).parse_args())


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_the_published_ones(monkeypatch, script):
    words, expected = DEFAULTS[script]
    args = parse(monkeypatch, script, words)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("script", "words", "expected"), SPELLINGS)
def test_released_names_are_accepted(monkeypatch, script, words, expected):
    args = parse(monkeypatch, script, words.split())
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("script", "words", "instead"), DROPPED)
def test_flags_without_an_effect_say_what_does_their_job(fails, script, words, instead):
    message = fails(script, *words.split()).replace("_", "-")
    flag = next(word for word in words.split() if word.startswith("-"))
    assert flag.replace("_", "-") in message and instead.replace("_", "-") in message


@pytest.mark.parametrize("script", DEFAULTS)
def test_help_fits_80_columns(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(monkeypatch, script, ["--help"])
    _, text = capsys.readouterr().out.split("\n\n", 1)  # after the usage, which argparse cannot break everywhere
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_inside_flags_dashes_and_underscores_are_the_same():
    parser = Parser("")
    parser.add_argument("--batch-size")
    parser.add_argument("--type_aux")
    for words in (["--batch_size", "3", "--type-aux=a_b-c"], ["--batch-size=3", "--type_aux", "a_b-c"]):
        args = parser.parse_args(words)
        assert (args.batch_size, args.type_aux) == ("3", "a_b-c")


def test_words_after_a_double_dash_are_left_alone(monkeypatch):
    parser = Parser("")
    parser.add_argument("--batch-size")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--batch_size", "3", "--", "--batch_size"]).rest == ["--batch_size"]


def test_flags_that_contradict_each_other(fails):
    assert "--resume" in fails("imagenet/imagenet_dgl.py", "DIR", "--debug", 1, "--resume")
    message = fails("imagenet/imagenet_dgl.py", "DIR", "--image-size", 64, "--large_size_images", 0)
    assert "--large_size_images" in message and "--image-size" in message
