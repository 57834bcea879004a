"""The claims of the algorithms, tested on the scripts themselves."""

import pytest
import torch
from gpu_commands import check_compiled
from running import PARALLEL, SEQUENTIAL, small
from torch.nn import functional as F

from decoupled.data.datasets import load
from decoupled.networks.evaluation import evaluate
from decoupled.training import run as runs
from decoupled.training.precision import Steps, compile_graphs

SHORT = ("--dataset", "digits", "--train-samples", 200, "--batch-size", 64, "--epochs", 2, "--device", "cpu")


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_no_gradient_crosses_a_module_boundary(run_script, monkeypatch, script):
    nets, steps = [], []

    def build(**settings):
        nets.append(small()(**settings))
        return nets[0]

    class Watched(runs.Run):
        def step(self, loss, optimizer):
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            others = [p for p in nets[0].parameters() if id(p) not in mine]
            before = [None if p.grad is None else p.grad.clone() for p in others]
            values = [p.detach().clone() for p in others]
            super().step(loss, optimizer)
            for parameter, grad, value in zip(others, before, values, strict=True):
                assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
                assert torch.equal(parameter, value)
            assert all(
                p.grad is not None and p.grad.isfinite().all()
                for group in optimizer.param_groups
                for p in group["params"]
            )
            steps.append(loss)

    run_script(script, *SHORT, layerwise_cnn=build, Run=Watched)
    assert len(steps) == 2 * 4 * 4  # epochs × modules × batches


def back_propagation(net, images, epochs=2):
    """Plain end-to-end training with the recipe of the script, written without any of its code but the images."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    for _ in range(epochs):
        for batch, labels in images:
            optimizer.zero_grad()
            F.cross_entropy(net[0].auxiliary(net[0].body(batch)), labels).backward()
            optimizer.step()


def test_one_module_is_back_propagation_bit_for_bit(run_script):
    whole = small(block_size=4)
    left = run_script(PARALLEL, *SHORT, "--seed", 3, layerwise_cnn=whole)
    torch.manual_seed(3)
    net = whole().to(memory_format=torch.channels_last)
    train, _, _ = load("digits", batch_size=64, train_samples=200, seed=3)
    back_propagation(net, train)
    assert len(net) == 1
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


def test_stepping_each_module_at_once_equals_one_backward_of_the_summed_losses(run_script):
    """Each module's graph is freed before the next forward; the gradients are those of the sum of all losses."""
    left = run_script(PARALLEL, *SHORT, layerwise_cnn=small())
    torch.manual_seed(1)
    net = small()().to(memory_format=torch.channels_last)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True) for module in net
    ]
    train, _, _ = load("digits", batch_size=64, train_samples=200, seed=1)
    for _ in range(2):
        for images, labels in train:
            representation, losses = images, []
            for module in net:
                representation, logits = module(representation.detach())
                losses.append(F.cross_entropy(logits, labels))
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(losses).backward()
            for optimizer in optimizers:
                optimizer.step()
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_compiled_modules_learn_what_plain_ones_do(run_script, monkeypatch, tmp_path, script):
    """--compile compiles each module; with Dynamo's eager backend, which reorders nothing, logs and weights are those
    of the plain run to the bit.
    """
    plain = run_script(script, *SHORT, folder=tmp_path / "plain", layerwise_cnn=small())
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    torch.compiler.reset()
    compiled = run_script(script, *SHORT, "--compile", folder=tmp_path / "compiled", layerwise_cnn=small())
    assert len(graphs) >= 4  # every module's
    assert compiled.lines == plain.lines
    assert compiled.weights.keys() == plain.weights.keys()
    assert all(torch.equal(value, compiled.weights[key]) for key, value in plain.weights.items())


def test_the_cpus_compiler_computes_what_plain_modules_do_and_says_that_it_is_slower(capfd):
    torch.compiler.reset()
    check_compiled("cpu", depth=1, sizes=(8, 8))  # a second module, size or mode would each be compiled, for seconds
    assert capfd.readouterr().err == "--compile: on CPUs modules ran slower compiled than plain; it is meant for CUDA\n"


def test_what_leaves_a_replayed_module_is_a_copy(monkeypatch):
    """A stand-in for CUDA graphs: outputs of every call in the same memory."""

    def compiled(forward, mode, dynamic):
        assert (mode, dynamic) == ("reduce-overhead", False)
        pool = {}

        def replay(images):
            for n, output in enumerate(forward(images)):
                pool.setdefault(n, output.detach()).copy_(output.detach())
            return tuple(pool.values())

        return replay

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    marks, (module,) = [], small(depth=1)(auxiliary="cnn")
    module.eval()
    expected = [module(torch.full((2, 3, 32, 32), value)) for value in (0.0, 1.0)]
    compile_graphs(module)
    made = [module(torch.full((2, 3, 32, 32), value)) for value in (0.0, 1.0)]
    assert all(
        torch.equal(a, b) for now, then in zip(made, expected, strict=True) for a, b in zip(now, then, strict=True)
    )
    steps = Steps(torch.device("cpu"), half=False)
    for steps.replays in (False, True):
        steps.step(next(module.parameters()).sum(), torch.optim.SGD(module.parameters(), lr=0.1))
    assert marks == [1]  # after a step, where there are graphs


def test_each_of_many_modules_is_compiled(run_script, monkeypatch):
    """PyTorch compiles one forward, which all modules share, 8 times at most unless told otherwise."""
    graphs, compile_module = [], torch.nn.Module.compile
    backend = lambda graph, example_inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    torch.compiler.reset()
    deep = small(channels=2, depth=10)
    with torch._dynamo.config.patch(recompile_limit=8):
        run_script(PARALLEL, *SHORT, "--epochs", 1, "--compile", layerwise_cnn=deep, evaluate=first_images)
    assert len(graphs) >= 10


def test_the_representation_handed_on_was_computed_before_the_step(run_script, monkeypatch):
    """Algorithm 1: module 2 sees what module 1 made with the weights it had before its step; no second forward."""
    made, seen = [], []

    def build(**settings):
        net = small()(**settings)
        net[0].body.register_forward_hook(
            lambda module, inputs, output: made.append(output.detach().clone()) if module.training else None
        )
        net[1].body.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].clone()) if module.training else None
        )
        return net

    run_script(PARALLEL, *SHORT, layerwise_cnn=build)
    assert len(made) == len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(made, seen, strict=True))


def test_precise_statistics_are_those_of_all_training_images_and_change_nothing_learned(run_script, tmp_path):
    flags = ("--dataset", "digits", "--train-samples", 192, "--batch-size", 64, "--epochs", 2, "--device", "cpu")
    usual = run_script(PARALLEL, *flags, folder=tmp_path / "usual", layerwise_cnn=small())
    precise = run_script(PARALLEL, *flags, "--precise-statistics", layerwise_cnn=small())
    learned = [key for key in usual.weights if "running" not in key]
    assert learned and all(torch.equal(precise.weights[key], usual.weights[key]) for key in learned)

    train, _, classes = load("digits", batch_size=64, seed=1, train_samples=192)
    net = small()(classes=classes)
    net.load_state_dict(precise.weights)
    expected = {key: torch.zeros_like(value) for key, value in net.state_dict().items() if "running" in key}
    for norm in net.modules():
        if isinstance(norm, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0  # the statistics of the latest mini-batch
    for first in range(0, 192, 64):  # as in the training set's own order, neither cropped nor mirrored
        representation = train.normalize(train.images[first : first + 64, 4:-4, 4:-4])
        for module in net.train():
            representation = module(representation)[0].detach()
        for key, value in net.state_dict().items():
            if key in expected:
                expected[key] += value / 3
    for key, value in expected.items():
        torch.testing.assert_close(precise.weights[key], value)
        assert not torch.equal(precise.weights[key], usual.weights[key])


def test_sequential_greedy_freezes_what_is_below(run_script, monkeypatch):
    """Parameters and batch norm statistics of finished modules stay bit-identical, no graph reaches them, their
    auxiliaries do nothing.
    """
    nets, finished, auxiliary_calls = [], {}, []

    def build(**settings):
        nets.append(small()(**settings))
        for index, module in enumerate(nets[0]):
            module.auxiliary.register_forward_hook(lambda *_, index=index: auxiliary_calls.append(index))
            module.body.register_forward_hook(
                lambda _, inputs, output, index=index: reached.append((index, output.requires_grad))
            )
        return nets[0]

    reached, stages = [], []

    class Watched(runs.Run):
        def log(self, n, epoch, train, test):
            super().log(n, epoch, train, test)
            stages.append((n, epoch))
            assert set(auxiliary_calls) == {n - 1}
            assert {index for index, requires_grad in reached if requires_grad} == {n - 1}
            auxiliary_calls.clear()
            reached.clear()
            for below, state in finished.items():
                assert all(torch.equal(value, state[key]) for key, value in nets[0][below].state_dict().items())
            if epoch == 2:
                finished[n - 1] = {key: value.clone() for key, value in nets[0][n - 1].state_dict().items()}

    left = run_script(SEQUENTIAL, *SHORT, layerwise_cnn=build, Run=Watched)
    assert stages == [(n, epoch) for n in (1, 2, 3, 4) for epoch in (1, 2)]
    assert [line.split(",")[0] for line in left.lines] == [f"n: {n}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_sequential_first_module_learns_what_parallels_first_module_learns(run_script, tmp_path):
    """Module 1 sees the same images in both: same seed, same weights after the same number of epochs."""
    parallel = run_script(PARALLEL, *SHORT, folder=tmp_path / "parallel", layerwise_cnn=small())
    sequential = run_script(SEQUENTIAL, *SHORT, folder=tmp_path / "sequential", layerwise_cnn=small())
    first = [key for key in parallel.weights if key.startswith("0.")]
    assert len(first) > 20
    assert all(torch.equal(parallel.weights[key], sequential.weights[key]) for key in first)


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_learning_rate_sequence(run_script, monkeypatch, script):
    rates, flags = (
        {},
        ("--dataset", "digits", "--train-samples", 16, "--batch-size", 16, "--epochs", 50, "--device", "cpu"),
    )

    class Watched(runs.Run):
        def step(self, loss, optimizer):
            super().step(loss, optimizer)
            rates.setdefault((self.steps.learner(optimizer)[0], self.epoch), optimizer.param_groups[0]["lr"])
            assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.9, 5e-4)

        def save(self):
            pass

    shallow = small(channels=2, depth=2, downsample=(0, 1))
    left = run_script(script, *flags, layerwise_cnn=shallow, evaluate=first_images, Run=Watched)
    expected = [0.1] * 15 + [0.02] * 15 + [0.004] * 15 + [0.0008] * 5
    for n in (1, 2):
        assert [rates[n, epoch] for epoch in range(1, 51)] == pytest.approx(expected)
    assert len(left.lines) == 100


def first_images(net, batches, heads=None):
    """Evaluation on a few images: the test is about the learning rate."""
    images, labels = next(iter(batches))
    return evaluate(net, [(images[:8], labels[:8])], heads)
