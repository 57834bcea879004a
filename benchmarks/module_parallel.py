"""Images/s of modules that learn at the same time, each in its process, beside
back-propagation in a pipeline and data parallelism, on the learning_curves
network. Needs no data set, and two idle cores: a thread for each process.

    python benchmarks/module_parallel.py --half --output FILE

Rows:
  DGL, K processes      as learning_curves/cifar_dgl.py runs under torchrun
  DGL, 2 threads        one process, which splits each operation
  GPipe m, 1F1B m       back-propagation of the same network without the
                        auxiliaries in two processes, m micro-batches
                        (torch.distributed.pipelining); m = 1 is one process
  data-parallel         two processes with half of each mini-batch, gradients
                        averaged (DistributedDataParallel)
Columns:
  cut           modules of each process
  images/s      by the clock, which needs as many idle cores as processes; and
                by CPU time, of which the busiest process has most
  speed-up      of both over one process of the same method
  ideal         the sum of the modules' CPU times in DGL's one process, over the
                greatest sum that a process of this row has of them
  waits %       of the clock's time that the busiest process waits for
                representations or for room in the queue
  MB, GB/s      what the busiest link carries per mini-batch, and per second
Medians over rounds, in which the rows take turns, so that a drift of the
machine hits all alike. What is on paper for more GPUs and other links:
benchmarks/module_parallel_paper.py.
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
    method: str  # see work()
    processes: int
    threads: int = 1  # of each process
    schedule: type | None = None  # of a pipeline
    micro_batches: int = 1

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
        "--queue", type=flags.integer(1), default=2, help="max mini-batches in flight between stages, as in the scripts"
    )
    parser.add_argument("--half", action="store_true", help="bf16 mixed precision")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="also write the table to this file")
    return parser.parse_args()


# What runs in each process


class Clock:
    """The seconds that a process spends from mini-batch WARM_UP on: wall time, CPU time, waiting, and the CPU time of
    each of ``num_modules`` modules.
    """

    def __init__(self, stage=None, num_modules=0):
        self.stage = stage
        self.module_seconds = [0.0] * num_modules

    def measure(self, batches):
        """Passes on ``batches``."""
        for number, batch in enumerate(batches):
            if number == WARM_UP:
                self.start()
            yield batch
        self.stop()

    def start(self):
        self.module_seconds = [0.0 for _ in self.module_seconds]
        self.wall = time.perf_counter()
        self.cpu = time.process_time()
        self.waited = self.waited_so_far()

    def stop(self):
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu
        self.waited = self.waited_so_far() - self.waited

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
    """DGL's steps by the modules of this process: a Result."""
    stage = Stage(net, torch.zeros(2, 3, 32, 32), mesh, queue=args.queue, autocast=autocast)
    modules = mesh.data_parallel(stage.modules_here)
    optimizers = [ScaledOptimizer(script_sgd(module)) for module in stage.modules_here]
    clock = Clock(stage, len(modules))
    sent = 0
    stage.train()
    every = mini_batches(WARM_UP + args.steps, args.batch_size // mesh.replicas)
    train, *_ = mesh.load_data(lambda: (every, every, 10))
    for representation, labels in clock.measure(stage.inputs(train)):
        for index, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            started = time.process_time()
            representation = dgl_step([module], [optimizer], representation, labels, autocast)
            clock.module_seconds[index] += time.process_time() - started
        stage.send(representation, labels)
        if not stage.last:
            sent = representation.nbytes + labels.nbytes
    return result_of(clock, sent, stage.lengths)


class Part(nn.Module):
    """Consecutive modules of a pipeline with the head of the last one. Mixed precision is inside, because a schedule
    calls the part. What goes from one part to the next is (B, h, w, C): channels-last memory, as contiguous.
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
    """Back-propagation in one process, or in replicas: a Result."""
    part = Part(net, autocast)
    (module,) = mesh.data_parallel([part])
    optimizer = script_sgd(part)
    clock = Clock()
    for images, labels in clock.measure(mini_batches(WARM_UP + args.steps, args.batch_size // mesh.replicas)):
        loss = loss_of(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result_of(clock, 0, [len(net)])


def pipeline(args, net, autocast, mesh, row):
    """Back-propagation in a pipeline, balanced by FLOPs: a Result."""
    net = without_lower_heads(net)
    surveyed = survey(net, torch.zeros(2, 3, 32, 32), autocast)
    lengths = balance(surveyed.flops, mesh.stages)
    first = sum(lengths[: mesh.stage])
    end = first + lengths[mesh.stage]
    is_first = mesh.stage == 0
    is_last = mesh.stage == mesh.stages - 1
    part = Part(net[first:end], autocast, is_first, is_last)
    stage = PipelineStage(part, mesh.stage, mesh.stages, CPU)
    schedule = row.schedule(stage, row.micro_batches, loss_fn=loss_of)
    optimizer = script_sgd(part)
    clock = Clock()
    for images, labels in clock.measure(mini_batches(WARM_UP + args.steps, args.batch_size)):
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
    """What one process of ``row`` does: a Result."""
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
    """The Results of all processes of ``row``, by rank."""
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
    """Images/s by the clock."""
    return images / max(result.wall for result in results)


def cpu_rate(results, images):
    """Images/s if only the CPU time of the busiest process counted."""
    return images / max(result.cpu for result in results)


def share_waited(results):
    """The share of the clock's time, in %, that the busiest process waits."""
    busiest = max(results, key=lambda result: result.cpu)
    return 100 * busiest.waited / busiest.wall


def greatest_sum(module_seconds, lengths):
    """The most that a process has of the modules' seconds; ``lengths``: the number of modules of each."""
    sums = []
    first = 0
    for length in lengths:
        sums.append(sum(module_seconds[first : first + length]))
        first += length
    return max(sums)


def make_table(rounds, args):
    """A frame with a row for each of ROWS, from the Results of all rounds, [{row: [Result of each process]}], and the
    modules' CPU milliseconds per step.
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
