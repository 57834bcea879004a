"""Measures images/s of modules that learn in parallel, each in its own process, and
compares them with pipelined back-propagation and data parallelism, on the
learning_curves network. Needs no data set, but two idle cores: each process has
one thread.

    python benchmarks/module_parallel.py --half --output FILE

Rows:
  DGL, K processes      as learning_curves/cifar_dgl.py runs under torchrun
  DGL, 2 threads        one process; two threads share the work of each operation
  GPipe m, 1F1B m       back-propagation of the same network without the
                        auxiliaries in two processes with m micro-batches
                        (torch.distributed.pipelining)
  data-parallel         two processes with half of each mini-batch, gradients
                        averaged (DistributedDataParallel)
Columns:
  cut           the number of modules in each process
  images/s      by wall time, which needs as many idle cores as processes, and by
                the CPU time of the process that uses the most
  speed-up      of both over one process of the same method
  ideal         the speed-up of a perfect pipeline: the CPU time of all modules in
                "DGL, 1 process", divided by that of the modules of the process
                that has the most to do
  waits %       how much of the wall time the busiest process waits for
                representations or for room in the queue
  MB, GB/s      traffic of the busiest link per mini-batch, and per second
Numbers are medians over rounds. Each round measures every row, so that changes in
the machine's speed affect all rows alike. benchmarks/module_parallel_paper.py computes what to
expect of more GPUs and other links.
"""

import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from decoupled.data.batches import Batches
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.parallel.balance import balance, survey
from decoupled.parallel.mesh import Mesh
from decoupled.parallel.processes import Processes
from decoupled.parallel.stages import Stage
from decoupled.training import flags
from decoupled.training.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_output import check_output, publish
from method_steps import ScaledOptimizer, autocast_on, dgl_step, sgd

CPU = torch.device("cpu")
WARM_UP = 3  # mini-batches before the clock starts


class Row(NamedTuple):
    method: str  # "stages", "replicas", "end to end" or "pipeline": see work
    processes: int
    threads: int = 1  # in each process
    schedule: type | None = None  # for a pipeline
    micro_batches: int = 1  # for a pipeline

    @property
    def greedy(self):
        return self.method in ("stages", "replicas")


ROWS = {
    "DGL, 1 process": Row("stages", 1),
    "DGL, 2 threads": Row("stages", 1, threads=2),
    "DGL, 2 processes": Row("stages", 2),
    "DGL, 4 processes": Row("stages", 4),
    "data-parallel DGL": Row("replicas", 2),
    "back-propagation": Row("end to end", 1),
    "GPipe 4": Row("pipeline", 2, schedule=ScheduleGPipe, micro_batches=4),
    "GPipe 8": Row("pipeline", 2, schedule=ScheduleGPipe, micro_batches=8),
    "1F1B 4": Row("pipeline", 2, schedule=Schedule1F1B, micro_batches=4),
    "1F1B 8": Row("pipeline", 2, schedule=Schedule1F1B, micro_batches=8),
    "data-parallel b.-p.": Row("end to end", 2),
}
DGL_BASE = "DGL, 1 process"
BACKPROP_BASE = "back-propagation"


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--steps", type=flags.integer(1), default=12, help="mini-batches per row and round")
    parser.add_argument("--rounds", type=flags.integer(1), default=3, help="rounds of all rows")
    parser.add_argument("--batch-size", type=flags.integer(16), default=128, help="images per mini-batch")
    parser.add_argument(
        "--queue",
        type=flags.integer(1),
        default=2,
        help="max mini-batches in flight between stages, as in the scripts",
    )
    parser.add_argument("--half", action="store_true", help="bf16 mixed precision")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="also write the table to this file")
    return parser.parse_args()


# What runs in each process


class Clock:
    """Measures the seconds that a process spends on mini-batches after the first WARM_UP: wall time, CPU time, waiting,
    and the CPU time of each of ``num_modules`` modules.
    """

    def __init__(self, stage=None, num_modules=0):
        self.stage = stage
        self.num_modules = num_modules
        self.module_seconds = [0.0] * num_modules

    def timed(self, batches):
        """Yields the mini-batches of ``batches`` and measures the time until the last one is done."""
        for number, batch in enumerate(batches):
            if number == WARM_UP:
                self.module_seconds = [0.0] * self.num_modules
                wall_at_start = time.perf_counter()
                cpu_at_start = time.process_time()
                waited_at_start = self.waited_so_far()
            yield batch
        self.wall = time.perf_counter() - wall_at_start
        self.cpu = time.process_time() - cpu_at_start
        self.waited = self.waited_so_far() - waited_at_start

    def waited_so_far(self):
        if self.stage is None:
            return 0.0
        return self.stage.waited


class Result(NamedTuple):
    """What one process measured."""

    wall: float  # seconds
    cpu: float  # seconds
    waited: float  # seconds
    module_seconds: list  # CPU time of each of its modules; empty where they are not timed
    sent: int  # bytes per mini-batch
    lengths: list  # the number of modules of each process


def result_of(clock, sent, lengths):
    return Result(clock.wall, clock.cpu, clock.waited, clock.module_seconds, sent, list(lengths))


def mini_batches(count, batch_size):
    """``count`` mini-batches of random images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count * batch_size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count * batch_size,), generator=generator)
    return Batches(pixels, labels, batch_size, mean=(0.5,) * 3, std=(0.25,) * 3, augment=True)


def script_sgd(module):
    return sgd(module, lr=0.1, weight_decay=5e-4)


def greedy(args, net, autocast, mesh):
    """Runs DGL's steps of the modules of this process. Returns a Result."""
    stage = Stage(net, torch.zeros(2, 3, 32, 32), mesh, queue=args.queue, autocast=autocast)
    modules = mesh.data_parallel(stage.modules_here)
    optimizers = [ScaledOptimizer(script_sgd(module)) for module in stage.modules_here]
    clock = Clock(stage, len(modules))
    sent = 0
    stage.train()
    batches = mini_batches(WARM_UP + args.steps, args.batch_size // mesh.replicas)
    train, _, _ = mesh.load_data(lambda: (batches, batches, 10))
    for representation, labels in clock.timed(stage.inputs(train)):
        for index, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            started = time.process_time()
            representation = dgl_step([module], [optimizer], representation, labels, autocast)
            clock.module_seconds[index] += time.process_time() - started
        stage.send(representation, labels)
        if not stage.highest:
            sent = representation.nbytes + labels.nbytes
    return result_of(clock, sent, stage.modules_per_stage)


class Part(nn.Module):
    """Consecutive modules with the head of the last one, as a stage of a pipeline. Autocast is inside, because the
    pipeline schedule calls the part. Parts pass representations on as (B, h, w, C), a contiguous view of
    channels-last memory.
    """

    def __init__(self, modules, autocast, is_first=True, is_last=True):
        super().__init__()
        self.is_first = is_first
        self.is_last = is_last
        self.bodies = nn.Sequential(*(module.body for module in modules))
        self.head = modules[-1].auxiliary
        self.autocast = autocast

    def forward(self, inputs):
        if not self.is_first:
            inputs = inputs.permute(0, 3, 1, 2)
        with self.autocast():
            outputs = self.head(self.bodies(inputs))
        if not self.is_last:
            outputs = outputs.permute(0, 2, 3, 1).contiguous()
        return outputs


def loss_of(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def end_to_end(args, net, autocast, mesh):
    """Runs back-propagation in one process or in replicas. Returns a Result."""
    part = Part(net, autocast)
    (module,) = mesh.data_parallel([part])
    optimizer = script_sgd(part)
    clock = Clock()
    for images, labels in clock.timed(mini_batches(WARM_UP + args.steps, args.batch_size // mesh.replicas)):
        loss = loss_of(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result_of(clock, 0, [len(net)])


def pipeline(args, net, autocast, mesh, row):
    """Runs back-propagation in a pipeline balanced by FLOPs. Returns a Result."""
    net = without_lower_heads(net)
    surveyed = survey(net, torch.zeros(2, 3, 32, 32), autocast)
    lengths = balance(surveyed.flops, mesh.stages)
    first = sum(lengths[: mesh.stage_index])
    end = first + lengths[mesh.stage_index]
    is_first = mesh.stage_index == 0
    is_last = mesh.stage_index == mesh.stages - 1
    part = Part(net[first:end], autocast, is_first, is_last)
    stage = PipelineStage(part, mesh.stage_index, mesh.stages, CPU)
    schedule = row.schedule(stage, row.micro_batches, loss_fn=loss_of)
    optimizer = script_sgd(part)
    clock = Clock()
    for images, labels in clock.timed(mini_batches(WARM_UP + args.steps, args.batch_size)):
        inputs = [images] if is_first else []
        target = {"target": labels} if is_last else {}
        optimizer.zero_grad()
        schedule.step(*inputs, **target)
        optimizer.step()
    sent = 0
    if not is_last:
        sent = surveyed.inputs[end].empty(args.batch_size, "cpu").nbytes
    return result_of(clock, sent, lengths)


def without_lower_heads(net):
    """The network for back-propagation: only the last module has a head."""
    *lower, last = net
    return DecoupledNetwork([*(DecoupledModule(module.body, nn.Identity()) for module in lower), last])


def work(args, row):
    """Runs one process of ``row``. Returns a Result."""
    torch.set_num_threads(row.threads)
    torch.manual_seed(1)
    processes = Processes(CPU)
    autocast = autocast_on(CPU, args.half)
    net = layerwise_cnn().to(memory_format=torch.channels_last)
    stages = processes.size if row.method in ("stages", "pipeline") else 1
    mesh = Mesh(processes, stages)
    if row.greedy:
        result = greedy(args, net, autocast, mesh)
    elif row.method == "end to end":
        result = end_to_end(args, net, autocast, mesh)
    else:
        result = pipeline(args, net, autocast, mesh, row)
    processes.wait()
    processes.close()
    return result


# All processes


def measure(row, args):
    """Runs ``row``. Returns a list of the Results of its processes, by rank."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=row.processes,
        run_id="benchmark",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.05,
        max_restarts=0,
    )
    results = elastic_launch(config, work)(args, row)
    return [results[rank] for rank in sorted(results)]


def clock_rate(results, images):
    """Images/s by wall time."""
    return images / max(result.wall for result in results)


def cpu_rate(results, images):
    """Images/s by the CPU time of the busiest process."""
    return images / max(result.cpu for result in results)


def share_waited(results):
    """How much of the wall time the busiest process waits, in %."""
    busiest = max(results, key=lambda result: result.cpu)
    return 100 * busiest.waited / busiest.wall


def greatest_sum(module_seconds, lengths):
    """The largest sum of ``module_seconds`` of any process. ``lengths``: the number of modules in each."""
    sums = []
    first = 0
    for length in lengths:
        sums.append(sum(module_seconds[first : first + length]))
        first += length
    return max(sums)


def make_table(rounds, args):
    """(frame with a row for each of ROWS, the modules' CPU milliseconds per step). ``rounds``: the Results of each
    round, [{row: [Result of each process]}].
    """
    images = args.steps * args.batch_size
    timed = [results[DGL_BASE][0].module_seconds for results in rounds]
    module_seconds = [median(seconds) for seconds in zip(*timed, strict=True)]
    rates = {}
    for name in ROWS:
        rates[name] = {
            "images/s, clock": median(clock_rate(results[name], images) for results in rounds),
            "CPU": median(cpu_rate(results[name], images) for results in rounds),
        }
    lines = {}
    for name, row in ROWS.items():
        base = rates[DGL_BASE if row.greedy else BACKPROP_BASE]
        first_round = rounds[0][name]
        lengths = first_round[0].lengths
        sent = max(result.sent for result in first_round)
        clock = rates[name]["images/s, clock"]
        line = {
            "cut": ",".join(map(str, lengths)),
            **rates[name],
            "speed-up, clock": clock / base["images/s, clock"],
            "by CPU": rates[name]["CPU"] / base["CPU"],
            "ideal": None,
            "waits %": None,
            "MB": None,
            "GB/s": None,
        }
        if row.method == "stages" and len(lengths) > 1:
            line["ideal"] = sum(module_seconds) / greatest_sum(module_seconds, lengths)
            line["waits %"] = median(share_waited(results[name]) for results in rounds)
        if sent:
            line["MB"] = sent / 1e6
            line["GB/s"] = clock / args.batch_size * sent / 1e9
        lines[name] = line
    return pd.DataFrame.from_dict(lines, orient="index"), [1e3 * seconds / args.steps for seconds in module_seconds]


DECIMALS = {
    "images/s, clock": 0,
    "CPU": 0,
    "speed-up, clock": 2,
    "by CPU": 2,
    "ideal": 2,
    "waits %": 1,
    "MB": 1,
    "GB/s": 3,
}


def main():
    args = parse_args()
    check_output(args.output)
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: measure(row, args) for name, row in ROWS.items()})
    frame, milliseconds = make_table(rounds, args)
    formats = {name: f"{{:,.{decimals}f}}".format for name, decimals in DECIMALS.items()}
    lines = [
        *environment(CPU, args.half),
        f"# batch {args.batch_size}, {args.steps} mini-batches, {args.rounds} rounds, queue {args.queue}, a thread for "
        f"each process",
        f"# CPU ms of modules 1 to {len(milliseconds)} in a step: {', '.join(f'{each:.1f}' for each in milliseconds)}",
        "",
        frame.to_string(formatters=formats, na_rep=""),
    ]
    publish("\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    flags.start(main)
