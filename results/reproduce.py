"""The paper's numbers beside ours: knows every row of the tables, makes the
runs that are missing, writes the tables from the logs.

    python results/reproduce.py --list
    python results/reproduce.py learning_curves-parallel 'dni-*-20' --half
    python results/reproduce.py 'aux_nets-*-64ch' --seeds 1 --jobs 2 --budget 2h
    python results/reproduce.py --table

ROW is a name in rows.csv, or a pattern of names. The first seed of every row is
run before the second of any. A run that a log in results/ or --log-dir is
complete for is not made again; an interrupted one is resumed. Each is a process
with one CPU thread, --jobs of them side by side, started in the repository's
root, from which paths are taken: leave that at its commit until the runs end.
Inside --budget all are stopped as by Ctrl-C, and the same command goes on from
there. Finished logs are copied to results/EXPERIMENT/ROW-seedS.log; --harvest
does that for runs started by hand.

--list says of each row how many seeds are done, running, missing, superseded
(by a commit that changed the results) or of unknown commits, what the rest
costs, and how long it takes at the speed of this machine's own runs in
--log-dir or, without any, of a 5-second trial.
"""

import argparse
import contextlib
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import result_tables
import torch
from filelock import FileLock, Timeout
from result_rows import (
    DATA,
    HOW,
    RESULTS,
    ROOT,
    SEQUENTIAL,
    WHOLE,
    as_log,
    has_history,
    is_run_of,
    progress,
    read_logs,
    read_rows,
    runs_of,
    seconds,
)

from decoupled import InputError
from decoupled.training import checkpoint as checkpoints
from decoupled.training import flags

UNITS = {"s": 1, "m": 60, "h": 3600}
STATES = ("done", "running", "missing", "superseded", "unknown")


def budget(text):
    """An argparse type: 90s, 150m or 2.5h, in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 90s, 150m or 2h")
    return float(match[1]) * UNITS[match[2]]


def parse_args():
    parser = flags.Parser(__doc__)
    positive = flags.integer(1)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="run these; with --list or --harvest, these only")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--list", action="store_true", help="the rows, their states and costs")
    group.add_argument("--harvest", action="store_true", help="copy finished logs from --log-dir into results/")
    group.add_argument("--table", action="store_true", help="write the tables of the pages")
    group.add_argument("--check", action="store_true", help="say which table is not what the logs in results/ give")
    parser.add_argument("--unfinished", action="store_true", help="with --harvest: logs of runs under way too")
    group = parser.add_argument_group("running")
    group.add_argument("--seeds", type=positive, metavar="N", help="the first N of each row's seeds (default: all)")
    group.add_argument(
        "--budget", type=budget, metavar="TIME", help="stop within it: 90s, 150m, 2h (default: no limit)"
    )
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time")
    group.add_argument("--half", action="store_true", help="mixed precision, for runs that start now")
    group.add_argument("--device", default="auto", help="likewise")
    group.add_argument("--data-dir", type=flags.path, default="data", metavar="DIR", help="of the images")
    group.add_argument("--log-dir", type=flags.path, default="runs", metavar="DIR", help="of logs and checkpoints")
    args = parser.parse_args()
    if not (args.rows or args.list or args.harvest or args.table or args.check):
        parser.error("name rows to run, or choose --list, --harvest, --table or --check")
    if args.unfinished and not args.harvest:
        parser.error("--unfinished is for --harvest: add it")
    return args


def chosen(patterns, rows):
    """The rows with one of the names or patterns, in their order; without any, all. Raises InputError for a name that
    is none.
    """
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise InputError(f"no row is called {pattern}: --list shows their names")
    names = [name for pattern in patterns or ["*"] for name in fnmatch.filter(rows, pattern)]
    return [rows[name] for name in dict.fromkeys(names)]


# Which process a log is being written by


def processes():
    """(command line, folder) of this machine's processes, where the system tells (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            found.append((words, (process / "cwd").resolve()))
    return found


def is_written(log, processes):
    """Whether one of ``processes`` runs the log's last command in the folder where that writes this log."""
    _, script, *flags = log.command
    places = {log.path.resolve().parent, log.path.resolve().with_suffix(".pt")}
    return any(
        len(words) > len(flags) + 1
        and words[len(words) - len(flags) :] == flags
        and Path(words[-len(flags) - 1]).name == Path(script).name
        and places & {(folder / word).resolve() for word in (".", *flags)}
        for words, folder in processes
    )


def lock(args, row, seed):
    """The lock of a row's run with that seed, which rows that differ in how long they go on share."""
    what = {key: value for key, value in row.arguments.items() if key not in HOW}
    what |= {"data": row.data, "epochs": row.epochs if row.script in WHOLE else None}
    key = zlib.crc32(repr((row.script, sorted(what.items()))).encode())
    return FileLock(Path(args.log_dir) / f"{row.experiment}-{key:08x}-seed{seed}.lock", blocking=False)


def state(row, seed, logs, alive):
    """(one of STATES, the log it is about) of a row's run with that seed: the finished log; the log that ``alive``
    processes write; of the missing, the log that can be resumed, or None.
    """
    found = runs_of(row, seed, logs)
    standing = found.get("stands", [])
    if standing and standing[0].reached(row.head) >= row.epochs:
        return "done", standing[0]
    for log in standing:
        if is_written(log, alive):
            return "running", log
    for log in standing:
        if log.path.with_suffix(".pt").is_file() and log.epochs <= row.epochs:
            return "missing", log
    return next((name for name in ("superseded", "unknown") if name in found and not standing), "missing"), None


# --list


def speed(row, rows, logs, half):
    """TFLOP/s of a run of ``row`` on this machine: the median of the ``logs`` of its script, else of any, in that
    precision; None without.
    """
    speeds = {}
    for log in logs:
        its = [other for other in rows.values() if is_run_of(log, other, log.arguments.get("seed"))]
        if its and log.seconds and (log.precision != "fp32") == half:
            done = progress(log, its[0])
            if done == 1 or log.script != SEQUENTIAL:  # whose modules cost more and more
                speeds.setdefault(log.script, []).append(1000 * its[0].pflop * done / seconds(log, its[0]))
    own = speeds.get(row.script) or [rate for rates in speeds.values() for rate in rates]
    return sorted(own)[len(own) // 2] if own else None


def probe(half):
    """TFLOP/s of one thread, or the GPU, in training the last module of the learning_curves network for 5 seconds."""
    from decoupled.analysis.costs import training_step
    from decoupled.networks.flops import count_flops
    from decoupled.networks.layerwise import layerwise_cnn

    device = flags.pick_device("auto")
    torch.set_num_threads(1)
    module = layerwise_cnn(channels=64, depth=3, downsample=(1,), auxiliary="mlp-sr", classes=10)[1].to(device)
    images = torch.randn(128, 64, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(128, dtype=torch.int64, device=device)

    def outputs():
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            representation, logits = module(images)
        return representation, torch.nn.functional.cross_entropy(logits.float(), labels)

    step, count = training_step(outputs, module), 0
    flops, started = count_flops(step), time.perf_counter()
    while time.perf_counter() - started < 5:
        step()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return flops * count / (time.perf_counter() - started) / 1e12


def show(args, rows):
    own, alive = read_logs(args.log_dir) if Path(args.log_dir).is_dir() else [], processes()
    logs = [*read_logs(RESULTS), *own]
    if not has_history():
        print("The commits of the logs cannot be looked up (no git, or a shallow clone): such runs are unknown.")
    lines, total, probed = [], 0, None
    for row in chosen(args.rows, rows):
        states = [state(row, seed, logs, alive) for seed in row.seeds[: args.seeds]]
        rest = sum(1 - (progress(log, row) if log else 0) for name, log in states if name != "done")
        rate = speed(row, rows, own, args.half)
        if rate is None:
            rate = probed = probed or probe(args.half)
        hours = row.pflop * 1000 * rest / rate / 3600
        total += hours
        counts = ", ".join(f"{n} {name}" for name in STATES if (n := [s for s, _ in states].count(name)))
        at = [
            f"seed {seed}: {progress(log, row):.0%}"
            for seed, (name, log) in zip(row.seeds, states, strict=False)
            if log and name != "done"
        ]
        lines.append(
            (
                row.row,
                counts,
                f"{row.pflop * len(states):.3g}",
                f"{hours:.1f}",
                f"{row.variant}, {row.size}, {row.data}, {row.epochs} epochs",
                "; ".join(at),
            )
        )
    header = ("row", "seeds", "PFLOP", "h left", "what", "")
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"{total:.1f} h of one process at this machine's speed are left")


# Running


class Job(NamedTuple):
    """A run that is under way."""

    row: object
    seed: int
    process: subprocess.Popen
    output: Path
    lock: FileLock
    started: float


def command(row, seed, log, args):
    """The words of the run's command: from the start, or from the checkpoint beside ``log``, computing as that run
    does.
    """
    how = {"name": f"{row.row}-seed{seed}", "half": args.half, "device": args.device, "compile": False}
    resume = []
    if log is not None:
        how |= {key: log.arguments[key] for key in how if key in log.arguments}
        resume = ["--resume", str(log.path.with_suffix(".pt"))]
    place = [args.data_dir] if row.experiment == "imagenet" else ["--data-dir", args.data_dir]
    folder = "--save_folder" if row.experiment == "imagenet" else "--log-dir"
    flags = [*place, *shlex.split(row.flags), "--seed", str(seed), "--name", how["name"], folder, args.log_dir]
    flags += ["--half"] * (how["half"] and "--half" not in flags) + ["--compile"] * how["compile"]
    flags += ["--device", how["device"]] * (how["device"] != "auto")
    return ["python", row.script, *flags, *resume]


def start(row, seed, log, args):
    """Starts the run in a process of its own. None when it is under way already, here or from another call."""
    own = lock(args, row, seed)
    try:
        own.acquire()
    except Timeout:
        print(f"{row.row}, seed {seed}: under way already")
        return None
    words = command(row, seed, log, args)
    print(shlex.join(words), flush=True)
    output = Path(args.log_dir) / f"{row.row}-seed{seed}.out"
    path = filter(None, [os.environ.get("PYTHONPATH")])
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *path])},
            start_new_session=True,  # Ctrl-C is for this process, which hands it on
        )
    return Job(row, seed, process, output, own, time.time())


def stop(jobs, seconds):
    """Interrupts the jobs and waits for them; those still there after ``seconds`` are killed, which their checkpoints
    survive.
    """
    for job in jobs:
        job.process.send_signal(signal.SIGINT)
    end = time.monotonic() + seconds
    for job in jobs:
        try:
            job.process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def knows_data(job, args):
    """Whether the log of a job that has just started is there. Raises InputError when its images are not its row's."""
    for path in Path(args.log_dir).glob(f"*-{job.row.row}-seed{job.seed}-*.log"):
        if path.stat().st_mtime >= job.started and (log := as_log(path)) is not None:
            if not re.fullmatch(DATA[job.row.data], log.data):
                raise InputError(
                    f"{job.row.row} is of {job.row.data}, and {args.data_dir} has {log.data}: name another --data-dir"
                )
            return True
    return False


def finish(job, args):
    """Ends a job whose process is over: returns the complaint when it failed, else harvests its log."""
    job.lock.release()
    if job.process.returncode:
        last = (job.output.read_text().strip().splitlines() or ["no output"])[-1]
        return f"{job.row.row}, seed {job.seed} ended with exit code {job.process.returncode}: {last}"
    name, log = state(job.row, job.seed, read_logs(args.log_dir), [])
    if name != "done":
        return f"{job.row.row}, seed {job.seed} ended, but its log does not count: see {job.output}"
    copy(log, job.row, job.seed)
    if job.row.script in WHOLE:  # cannot go on to more epochs; async_buffer's hold gigabytes of buffers
        log.path.with_suffix(".pt").unlink(missing_ok=True)
    return None


def run(args, rows):
    """Runs what is missing of the rows chosen, within the budget."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, and so would the runs
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() - time.process_time() + args.budget if args.budget else float("inf")  # imports took a while
    grace = min(30, (args.budget or 0) / 5)
    which = chosen(args.rows, rows)
    todo = [
        (row, row.seeds[n])
        for n in range(max(len(row.seeds) for row in which))
        for row in which
        if n < len(row.seeds[: args.seeds])
    ]
    checkpoints.writable_folder(args.log_dir).mkdir(parents=True, exist_ok=True)
    jobs, unsure, complaints = [], [], []
    try:
        while (todo or jobs) and time.monotonic() < end - grace:
            while todo and len(jobs) < args.jobs:
                row, seed = todo.pop(0)
                name, log = state(row, seed, read_logs(RESULTS, args.log_dir), processes())
                if name in ("done", "running"):
                    print(f"{row.row}, seed {seed}: {name} ({log.path})")
                elif job := start(row, seed, log, args):
                    jobs.append(job)
                    unsure += [job] * (log is None)
            time.sleep(0.5)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                complaints += filter(None, [finish(job, args)])
            unsure = [job for job in jobs if job in unsure and not knows_data(job, args)]
    finally:
        stop(jobs, min(60, max(5, end - time.monotonic())))
        for job in jobs:
            job.lock.release()
    for job in jobs:
        print(f"{job.row.row}, seed {job.seed}: stopped; the same command goes on from there")
    if complaints:
        raise InputError("; ".join(complaints))


# Logs and tables


def copy(log, row, seed):
    target = RESULTS / row.experiment / f"{row.row}-seed{seed}.log"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(log.path, target)
    print(f"{row.row}, seed {seed}: {os.path.relpath(target)}")


def harvest(args, rows):
    """Copies the finished logs in --log-dir that results/ has no finished run of; with --unfinished, those of runs made
    for a row and still under way too.
    """
    there, own, alive = read_logs(RESULTS), read_logs(args.log_dir), processes()
    for row in chosen(args.rows, rows):
        for seed in row.seeds[: args.seeds]:
            name, log = state(row, seed, own, alive)
            if state(row, seed, there, [])[0] == "done" or log is None or log.frame.empty:
                continue
            if not is_written(log, alive) if name == "done" else args.unfinished and log.epochs == row.epochs:
                copy(log, row, seed)


def main():
    args = parse_args()
    os.chdir(ROOT)
    rows = read_rows()
    if args.list:
        show(args, rows)
    elif args.harvest:
        harvest(args, rows)
    elif args.table or args.check:
        if not has_history():
            raise InputError(
                "the commits of the logs cannot be looked up: tables need git and a clone that is not shallow"
            )
        tables(rows, write=args.table)
    else:
        run(args, rows)


def tables(rows, write):
    """Writes the tables, or raises InputError for the pages whose tables, or whose results, no log gives."""
    logs, stale = read_logs(RESULTS), []
    for page in result_tables.PAGES:
        text = result_tables.filled(page, rows, logs)
        if text != page.read_text():
            stale.append(str(page.relative_to(ROOT)))
            if write:
                page.write_text(text)
    if stale:
        if not write:
            raise InputError(f"the tables in {', '.join(stale)} are not what the logs give: --table writes them")
        print(f"written: {', '.join(stale)}")
    if strange := result_tables.unfounded():
        raise InputError(f"README.md has results that no table in results/README.md has: {', '.join(strange)}")


if __name__ == "__main__":
    flags.start(main)
