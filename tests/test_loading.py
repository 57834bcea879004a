"""decoupled.load: the network of a checkpoint, by its script or by a function, whatever the program has imported."""

import sys
import types

import pytest
import torch
from running import PARALLEL, ROOT

import decoupled
from decoupled import InputError
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import loading

TOY = "--dataset digits --train-samples 64 --batch-size 32 --device cpu --epochs 1 --channels 2"


@pytest.fixture
def trained(run_script):
    return run_script(PARALLEL, *TOY.split())


def build(args, classes):
    return layerwise_cnn(channels=args.channels, depth=4, downsample=(1, 3), auxiliary="mlp-sr", classes=classes)


def test_by_its_script_or_by_a_function(trained, monkeypatch, tmp_path):
    by_script = decoupled.load(trained.checkpoint)
    monkeypatch.setattr(loading, "ROOT", tmp_path)  # as in a wheel, which has no scripts
    with pytest.raises(InputError, match="build="):
        decoupled.load(trained.checkpoint)
    by_function = decoupled.load(trained.checkpoint, build=build)
    images = torch.randn(3, 3, 32, 32)
    for net in (by_script, by_function):
        assert not net.training
        assert all(torch.equal(value, trained.weights[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(by_script(images), by_function(images), strict=True))
    with pytest.raises(InputError, match=str(trained.checkpoint)):
        decoupled.load(trained.checkpoint, build=lambda args, classes: layerwise_cnn(channels=3, classes=classes))


def test_a_script_gets_its_own_neighbors_and_the_program_keeps_its_modules(trained, monkeypatch, tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "neighbor.py").write_text((ROOT / PARALLEL).read_text())
    (folder / "later.py").write_text("HERE = True\n")
    script = folder / "script.py"
    script.write_text(
        "import neighbor\n\ndef build(args, classes):\n    import later\n    return neighbor.build(args, classes)\n"
    )
    own = types.ModuleType("neighbor")
    monkeypatch.setitem(sys.modules, "neighbor", own)
    path = list(sys.path)
    net = decoupled.load(trained.checkpoint, script=script)
    assert len(net) == 4
    assert sys.path == path and sys.modules["neighbor"] is own and "later" not in sys.modules


def test_a_script_without_build_or_none_at_all(trained, tmp_path):
    script = tmp_path / "script.py"
    with pytest.raises(InputError, match=str(script)):
        decoupled.load(trained.checkpoint, script=script)
    script.write_text("")
    with pytest.raises(InputError, match=r"build\(args, classes\)"):
        decoupled.load(trained.checkpoint, script=script)
