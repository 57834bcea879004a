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
  waits %       of the clock's time, in which the busiest process waits for
                representations or for room in the queue
  MB, GB/s      what the busiest link carries for a mini-batch, and a second
Medians over rounds, in which the rows take turns, so that a drift of the
machine hits all alike. What is on paper for more GPUs and other links:
benchmarks/module_parallel_paper.py.
"""

import statistics
import time

import pandas as pd
import torch
from benchmark_output import check_output, publish
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F
from torch.optim import SGD

from decoupled.data.batches import Batches
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.networks.modules import DecoupledModule, DecoupledNetwork
from decoupled.parallel.balance import balance, survey
from decoupled.parallel.mesh import Mesh
from decoupled.parallel.processes import Processes
from decoupled.parallel.stages import Stage
from decoupled.training import environment as provenance
from decoupled.training import flags
from decoupled.training.precision import Steps

WARM = 3  # mini-batches before the clock starts
# Row → (method, processes, threads of each, micro-batches)
ROWS = {
    "DGL, 1 process": ("stages", 1, 1, 1),
    "DGL, 2 threads": ("stages", 1, 2, 1),
    "DGL, 2 processes": ("stages", 2, 1, 1),
    "DGL, 4 processes": ("stages", 4, 1, 1),
    "data-parallel DGL": ("replicas", 2, 1, 1),
    "back-propagation": ("pipeline", 1, 1, 1),
    "GPipe 4": (ScheduleGPipe, 2, 1, 4),
    "GPipe 8": (ScheduleGPipe, 2, 1, 8),
    "1F1B 4": (Schedule1F1B, 2, 1, 4),
    "1F1B 8": (Schedule1F1B, 2, 1, 8),
    "data-parallel b.-p.": ("end to end", 2, 1, 1),
}
BASES = {"DGL": "DGL, 1 process", "b.-p.": "back-propagation"}


def parse_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("--steps", type=flags.integer(1), default=12, help="mini-batches a row and round")
    parser.add_argument("--rounds", type=flags.integer(1), default=3, help="of all rows")
    parser.add_argument("--batch-size", type=flags.integer(16), default=128, help="images a mini-batch")
    parser.add_argument("--queue", type=flags.integer(1), default=2, help="as in the scripts")
    parser.add_argument("--half", action="store_true", help="bf16 mixed precision")
    parser.add_argument("--output", type=flags.path, metavar="FILE", help="write the table there too")
    return parser.parse_args()


def mini_batches(count, batch_size):
    """So many of random images: Batches."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count * batch_size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count * batch_size,), generator=generator)
    return Batches(pixels, labels, batch_size, mean=(0.5,) * 3, std=(0.25,) * 3, augment=True)


def sgd(module):
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


class Clock:
    """What a process spends from mini-batch WARM on."""

    def __init__(self, stage=None):
        self.stage = stage

    def over(self, batches, modules=0):
        """Passes on ``batches``; ``seconds`` are those of each of so many modules."""
        for number, batch in enumerate(batches):
            if number == WARM:
                self.wall, self.cpu, self.seconds = time.perf_counter(), time.process_time(), [0.0] * modules
                self.waited = self.stage.waited if self.stage else 0.0
            elif number < WARM:
                self.seconds = [0.0] * modules
            yield batch
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.waited = self.stage.waited - self.waited if self.stage else 0.0


def greedy(args, net, steps, mesh):
    """DGL's steps by the modules of this process, in ``mesh``."""
    stage = Stage(net, (3, 32, 32), mesh, queue=args.queue, autocast=steps.autocast)
    modules, optimizers = mesh.parallel(stage.modules_here), [sgd(module) for module in stage.modules_here]
    clock, sent = Clock(stage), 0
    stage.train()
    whole = mini_batches(WARM + args.steps, args.batch_size // mesh.replicas)
    train, *_ = mesh.images(lambda: (whole, whole, 10))
    for representation, labels in clock.over(stage.inputs(train), len(modules)):
        for index, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            since = time.process_time()
            with steps.autocast():
                representation, logits = module(representation)
            steps.step(F.cross_entropy(logits.float(), labels), optimizer)
            representation = representation.detach()
            clock.seconds[index] += time.process_time() - since
        stage.send(representation, labels)
        sent = 0 if stage.last else representation.nbytes + labels.nbytes
        steps.watched.clear()
    return clock, sent, stage.lengths


class Piece(nn.Module):
    """Consecutive ``modules`` with the last one's head. Mixed precision is inside, as a schedule calls the pieces.
    Between two pieces (B, h, w, C) goes, channels-last memory as contiguous.
    """

    def __init__(self, modules, autocast, lowest=True, last=True):
        super().__init__()
        self.lowest, self.last = lowest, last
        self.bodies, self.head = nn.Sequential(*(module.body for module in modules)), modules[-1].auxiliary
        self.autocast = autocast

    def forward(self, representation):
        with self.autocast():
            result = self.head(self.bodies(representation if self.lowest else representation.permute(0, 3, 1, 2)))
        return result if self.last else result.permute(0, 2, 3, 1).contiguous()


def loss_of(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def end_to_end(args, net, steps, mesh):
    """Back-propagation in one process, or in replicas."""
    piece = Piece(net, steps.autocast)
    (module,), optimizer = mesh.parallel([piece]), sgd(piece)
    clock = Clock()
    for images, labels in clock.over(mini_batches(WARM + args.steps, args.batch_size // mesh.replicas)):
        loss = loss_of(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock, 0, [len(net)]


def pipeline(args, net, steps, mesh, schedule, parts):
    """Back-propagation in a pipeline of ``parts`` micro-batches, cut where the busiest has fewest FLOPs."""
    heads = [*(nn.Identity() for _ in net[:-1]), net[-1].auxiliary]
    net = DecoupledNetwork([DecoupledModule(module.body, head) for module, head in zip(net, heads, strict=True)])
    flops, layouts, _ = survey(net, torch.zeros(2, 3, 32, 32), steps.autocast)
    lengths = balance(flops, mesh.stages)
    first = sum(lengths[: mesh.stage])
    lowest, last = mesh.stage == 0, mesh.stage == mesh.stages - 1
    piece = Piece(net[first : first + lengths[mesh.stage]], steps.autocast, lowest, last)
    run = schedule(PipelineStage(piece, mesh.stage, mesh.stages, torch.device("cpu")), parts, loss_fn=loss_of)
    optimizer, clock = sgd(piece), Clock()
    for images, labels in clock.over(mini_batches(WARM + args.steps, args.batch_size)):
        optimizer.zero_grad()
        run.step(*([images] if lowest else []), **({"target": labels} if last else {}))
        optimizer.step()
    layout = None if last else layouts[first + lengths[mesh.stage]]
    sent = 0 if last else layout.empty(args.batch_size, "cpu").nbytes
    return clock, sent, lengths


def work(args, row):
    """What one process measures: a dict."""
    method, _, threads, parts = ROWS[row]
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    processes = Processes(torch.device("cpu"))
    steps = Steps(processes.device, args.half)
    net = steps.prepare(layerwise_cnn(), False)
    mesh = Mesh(processes, 1 if method in ("replicas", "end to end") else processes.size)
    if method in ("stages", "replicas"):
        clock, sent, lengths = greedy(args, net, steps, mesh)
    elif mesh.stages == 1:
        clock, sent, lengths = end_to_end(args, net, steps, mesh)
    else:
        clock, sent, lengths = pipeline(args, net, steps, mesh, method, parts)
    processes.wait()
    processes.close()
    return {
        **{name: getattr(clock, name) for name in ("wall", "cpu", "waited", "seconds")},
        "sent": sent,
        "cut": lengths,
    }


def measure(row, args):
    """What the processes of ``row`` measure: a list of dicts."""
    how = {"start_method": "fork", "monitor_interval": 0.05, "max_restarts": 0}
    where = {"run_id": "benchmark", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, ROWS[row][1], **how, **where)
    return [result for _, result in sorted(elastic_launch(config, work)(args, row).items())]


def table(rounds, args):
    """A frame with a line for each row, from the measurements of all rounds, and the modules' CPU times in a step."""
    total = args.steps * args.batch_size

    def median(row, of):
        return statistics.median(of(results[row]) for results in rounds)

    one = BASES["DGL"]
    modules = [
        median(one, lambda results, n=n: results[0]["seconds"][n]) for n in range(len(rounds[0][one][0]["seconds"]))
    ]
    lines = {}
    for row, (method, *_) in ROWS.items():
        lengths = rounds[0][row][0]["cut"]
        clock = median(row, lambda results: total / max(result["wall"] for result in results))
        cpu = median(row, lambda results: total / max(result["cpu"] for result in results))
        link = max(result["sent"] for result in rounds[0][row])
        busiest = median(row, lambda results: max((r["cpu"], 100 * r["waited"] / r["wall"]) for r in results)[1])
        sums = [sum(modules[sum(lengths[:n]) : sum(lengths[: n + 1])]) for n in range(len(lengths))]
        staged = method == "stages" and len(lengths) > 1
        base = lines.get(
            BASES["DGL" if method in ("stages", "replicas") else "b.-p."], {"images/s, clock": clock, "CPU": cpu}
        )
        lines[row] = {
            "cut": ",".join(map(str, lengths)),
            "images/s, clock": clock,
            "CPU": cpu,
            "speed-up, clock": clock / base["images/s, clock"],
            "by CPU": cpu / base["CPU"],
            "ideal": sum(modules) / max(sums) if staged else None,
            "waits %": busiest if staged else None,
            "MB": link / 1e6 if link else None,
            "GB/s": clock / args.batch_size * link / 1e9 if link else None,
        }
    return pd.DataFrame.from_dict(lines, orient="index"), [1e3 * seconds / args.steps for seconds in modules]


def main():
    args = parse_args()
    check_output(args.output)
    rounds = [{row: measure(row, args) for row in ROWS} for _ in range(args.rounds)]
    frame, modules = table(rounds, args)
    ratios = {"speed-up, clock": 2, "by CPU": 2, "ideal": 2}
    places = {"images/s, clock": 0, "CPU": 0, **ratios, "waits %": 1, "MB": 1, "GB/s": 3}
    formats = {name: f"{{:,.{count}f}}".format for name, count in places.items()}
    about = f"# batch {args.batch_size}, {args.steps} mini-batches, {args.rounds} rounds, queue {args.queue}"
    lines = [
        *provenance.environment(torch.device("cpu"), args.half),
        f"{about}, a thread for each process",
        f"# CPU ms of modules 1 to {len(modules)} in a step: {', '.join(f'{count:.1f}' for count in modules)}",
        "",
        frame.to_string(formatters=formats, na_rep=""),
    ]
    publish("\n".join(lines) + "\n", args.output)


if __name__ == "__main__":
    flags.start(main)
