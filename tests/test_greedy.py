"""The claims of the algorithms, tested on the scripts themselves."""

import pytest
import torch
from gpu_commands import check_compiled
from running import PARALLEL, SEQUENTIAL
from torch.nn import functional as F

from decoupled.data.datasets import load
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.training import run as runs
from decoupled.training.steps import Steps, compile_modules, compile_to_cuda_graphs

SHORT = (
    *("--dataset", "digits", "--train-samples", 200, "--batch-size", 64, "--test-batch-size", 400, "--epochs", 2),
    *("--device", "cpu", "--channels", 4),
)


def network(**settings):
    """The network of the scripts with --channels 4."""
    return layerwise_cnn(
        **{"channels": 4, "depth": 4, "downsample": (1, 3), "auxiliary": "mlp-sr", "classes": 10, **settings}
    )


@pytest.fixture
def watch_step(monkeypatch):
    """watch_step(before, after): from now on, Run.step calls before(run, loss, optimizer), whose result is passed on to
    after(run, optimizer, result).
    """
    step = runs.Run.step

    def begin(before, after):
        def watched_step(run, loss, optimizer):
            result = before(run, loss, optimizer)
            step(run, loss, optimizer)
            after(run, optimizer, result)

        monkeypatch.setattr(runs.Run, "step", watched_step)

    return begin


@pytest.fixture
def watch_epochs(monkeypatch):
    """watch_epochs(see): from now on, see(net) is called with the network that a script gives to run.epochs."""
    epochs = runs.Run.epochs

    def begin(see):
        def watched_epochs(run, *, net, **state):
            see(getattr(net, "net", net))  # a Stage has its network
            return epochs(run, net=net, **state)

        monkeypatch.setattr(runs.Run, "epochs", watched_epochs)

    return begin


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_no_gradient_crosses_a_module_boundary(run_script, watch_epochs, watch_step, script):
    nets = []
    steps = []

    def remember_others(run, loss, optimizer):
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        others = [parameter for parameter in nets[0].parameters() if id(parameter) not in own]
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in others]
        values = [parameter.detach().clone() for parameter in others]
        return others, gradients, values

    def compare_others(run, optimizer, remembered):
        for parameter, gradient, value in zip(*remembered, strict=True):
            if gradient is None:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, gradient)
            assert torch.equal(parameter, value)
        assert all(parameter.grad.isfinite().all() for parameter in parameters_of(optimizer))
        steps.append(optimizer)

    watch_epochs(nets.append)
    watch_step(remember_others, compare_others)
    run_script(script, *SHORT)
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
    words = [*SHORT, "--depth", 4, "--block_size", 4, "--lr-step", 15, "--type_aux", "mlp-sr", "--seed", 3]
    left = run_script("aux_nets/cifar_dgl.py", *words)
    torch.manual_seed(3)
    net = network(block_size=4).to(memory_format=torch.channels_last)
    assert len(net) == 1
    train, _, _ = load("digits", batch_size=64, train_samples=200, seed=3)
    back_propagation(net, train)
    for key, value in net.state_dict().items():
        assert torch.equal(value, left.weights[key]), key


def test_stepping_each_module_at_once_equals_one_backward_of_the_summed_losses(run_script):
    """Each module's graph is freed before the next forward; the gradients are those of the sum of all losses."""
    left = run_script(PARALLEL, *SHORT)
    torch.manual_seed(1)
    net = network().to(memory_format=torch.channels_last)
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


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that are compiled from now on, by a backend that only collects them and reorders nothing."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    torch.compiler.reset()
    return graphs


def test_compiled_modules_learn_what_plain_ones_do(run_script, compiled_graphs, tmp_path):
    """--compile compiles each module, and changes nothing but what the compiler's backend does."""
    words = [*SHORT, "--channels", 2, "--epochs", 1]
    plain = run_script(SEQUENTIAL, *words, folder=tmp_path / "plain")
    compiled = run_script(SEQUENTIAL, *words, "--compile", folder=tmp_path / "compiled")
    assert len(compiled_graphs) >= 4  # every module's
    assert compiled.lines == plain.lines
    assert compiled.weights.keys() == plain.weights.keys()
    assert all(torch.equal(value, compiled.weights[key]) for key, value in plain.weights.items())


def test_each_of_many_modules_is_compiled(compiled_graphs):
    """PyTorch compiles one forward, which all modules share, 8 times at most unless told otherwise."""
    net = network(channels=2, depth=4, downsample=(1, 2))  # four shapes, in two modes, of two sizes of mini-batch
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_modules(net, cuda_graphs=False)
        for training in (True, False):
            net.train(training)
            for size in (2, 3):
                representation = torch.ones(size, 3, 32, 32)
                for module in net:
                    representation, _ = module(representation)
                    representation = representation.detach()
    assert len(compiled_graphs) > 8


def test_the_cpus_compiler_computes_what_plain_modules_do_and_says_that_it_is_slower(capfd):
    torch.compiler.reset()
    check_compiled("cpu", depth=1, sizes=(8, 8))  # a second module, size or mode would each be compiled, for seconds
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "--compile" in message


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
    marks = []
    (module,) = network(depth=1, downsample=(), auxiliary="cnn")
    module.eval()
    expected = [module(torch.full((2, 3, 32, 32), value)) for value in (0.0, 1.0)]
    compile_to_cuda_graphs(module)
    made = [module(torch.full((2, 3, 32, 32), value)) for value in (0.0, 1.0)]
    assert all(
        torch.equal(a, b) for now, then in zip(made, expected, strict=True) for a, b in zip(now, then, strict=True)
    )
    steps = Steps(torch.device("cpu"), half=False)
    for steps.cuda_graphs in (False, True):
        steps.step(next(module.parameters()).sum(), torch.optim.SGD(module.parameters(), lr=0.1))
    assert marks == [1]  # after a step, where there are graphs


def test_the_representation_handed_on_was_computed_before_the_step(run_script, watch_epochs):
    """Algorithm 1: module 2 sees what module 1 made with the weights it had before its step; no second forward."""
    made = []
    seen = []

    def keep_output(module, inputs, output):
        if module.training:
            made.append(output.detach().clone())

    def keep_input(module, inputs):
        if module.training:
            seen.append(inputs[0].clone())

    def watch(net):
        net[0].body.register_forward_hook(keep_output)
        net[1].body.register_forward_pre_hook(keep_input)

    watch_epochs(watch)
    run_script(PARALLEL, *SHORT)
    assert len(made) == len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(made, seen, strict=True))


def test_precise_statistics_are_those_of_all_training_images_and_change_nothing_learned(run_script, tmp_path):
    flags = (*SHORT, "--train-samples", 192)
    usual = run_script(PARALLEL, *flags, folder=tmp_path / "usual")
    precise = run_script(PARALLEL, *flags, "--precise-statistics")
    learned = [key for key in usual.weights if "running" not in key]
    assert learned and all(torch.equal(precise.weights[key], usual.weights[key]) for key in learned)

    train, _, classes = load("digits", batch_size=64, seed=1, train_samples=192)
    net = network(classes=classes)
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


def test_sequential_greedy_freezes_what_is_below(run_script, watch_epochs, monkeypatch):
    """Parameters and batch norm statistics of finished modules stay bit-identical, no graph reaches them, their
    auxiliaries do nothing.
    """
    nets = []
    finished = {}
    auxiliary_calls = []
    reached = []
    logged = []

    def watch(net):
        nets.append(net)
        for index, module in enumerate(net):
            module.auxiliary.register_forward_hook(lambda *_, index=index: auxiliary_calls.append(index))
            module.body.register_forward_hook(
                lambda _, inputs, output, index=index: reached.append((index, output.requires_grad))
            )

    log = runs.Run.log

    def watched_log(run, n, epoch, train, test):
        log(run, n, epoch, train, test)
        logged.append((n, epoch))
        assert set(auxiliary_calls) == {n - 1}
        assert {index for index, requires_grad in reached if requires_grad} == {n - 1}
        auxiliary_calls.clear()
        reached.clear()
        for below, state in finished.items():
            assert all(torch.equal(value, state[key]) for key, value in nets[0][below].state_dict().items())
        if epoch == 2:
            finished[n - 1] = {key: value.clone() for key, value in nets[0][n - 1].state_dict().items()}

    watch_epochs(watch)
    monkeypatch.setattr(runs.Run, "log", watched_log)
    left = run_script(SEQUENTIAL, *SHORT)
    assert logged == [(n, epoch) for n in (1, 2, 3, 4) for epoch in (1, 2)]
    assert [line.split(",")[0] for line in left.lines] == [f"n: {n}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_sequential_first_module_learns_what_parallels_first_module_learns(run_script, tmp_path):
    """Module 1 sees the same images in both: same seed, same weights after the same number of epochs."""
    parallel = run_script(PARALLEL, *SHORT, folder=tmp_path / "parallel")
    sequential = run_script(SEQUENTIAL, *SHORT, folder=tmp_path / "sequential")
    first = [key for key in parallel.weights if key.startswith("0.")]
    assert len(first) > 20
    assert all(torch.equal(parallel.weights[key], sequential.weights[key]) for key in first)


@pytest.mark.parametrize("script", [PARALLEL, SEQUENTIAL])
def test_learning_rate_sequence(run_script, watch_step, monkeypatch, script):
    rates = {}

    def note_rate(run, loss, optimizer):
        (group,) = optimizer.param_groups
        rates.setdefault((run.steps.learner(optimizer).n, run.epoch), group["lr"])
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)

    watch_step(note_rate, lambda run, optimizer, result: None)
    monkeypatch.setattr(runs.Run, "save", lambda run: None)
    tiny = ("--train-samples", 8, "--batch-size", 8, "--validation", 8, "--channels", 1, "--epochs", 50)
    left = run_script(script, *SHORT, *tiny)
    expected = [0.1] * 15 + [0.02] * 15 + [0.004] * 15 + [0.0008] * 5
    for n in (1, 2, 3, 4):
        assert [rates[n, epoch] for epoch in range(1, 51)] == pytest.approx(expected)
    assert len(left.lines) == 200
