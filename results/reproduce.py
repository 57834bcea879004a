"""The paper's numbers beside ours: runs what is missing of the tables' rows, and
writes the tables from the logs.

    python results/reproduce.py list
    python results/reproduce.py run learning_curves-parallel 'dni-*-20' --half
    python results/reproduce.py run 'aux_nets-*-64ch' --seeds 1 --jobs 2 --budget 120
    python results/reproduce.py table
    python results/reproduce.py check

ROW is a name in rows.csv, or a pattern of names.
"""

import fnmatch
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import result_tables
from result_rows import ROOT, Row, check_log, is_finished, read_rows, read_run_log, read_runs

from decoupled import InputError
from decoupled.errors import writing
from decoupled.logs import newest, parse_run_name
from decoupled.training import flags

GRACE = 60  # seconds that runs have to save and leave


class CommandParser(flags.Parser):
    """The parser of one command, which argparse makes with the name of the whole."""

    def __init__(self, prog, description, **options):
        super().__init__(description)
        self.prog = prog


def parse_args():
    parser = flags.Parser(__doc__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=CommandParser, title="commands"
    )
    add_list(commands)
    add_run(commands)
    commands.add_parser(
        "table", description="Writes the tables of the pages from the logs in results/.", help="write the tables"
    )
    commands.add_parser(
        "check",
        description="Fails where the tables are not what the logs in results/ give.",
        help="are the tables what the logs give?",
    )
    return parser.parse_args()


def add_list(commands):
    parser = commands.add_parser(
        "list",
        description="Lists the rows: how many of their seeds are done, and what training one seed costs.",
        help="list the rows: seeds done and missing, cost",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="these only")
    add_results(parser)


def add_run(commands):
    parser = commands.add_parser(
        "run",
        help="run or resume what is missing",
        description="""Runs what is missing of the rows: every seed that results/ has no finished log of.

The first seed of every row comes before the second of any. Each run is a process
with one CPU thread, started in the repository's root, from which --data-dir and
--log-dir are taken. An interrupted run is resumed, with the same --half and
--device. The log of a finished run is copied to results/EXPERIMENT/ROW-seedS.log.""",
    )
    parser.add_argument("rows", nargs="+", metavar="ROW", help="these rows")
    parser.add_argument(
        "--jobs", type=flags.integer(1), default=1, metavar="N", help="how many processes run at the same time"
    )
    parser.add_argument(
        "--budget",
        type=flags.number(above=0),
        metavar="MINUTES",
        help="then stop all runs as Ctrl-C does; the same command resumes them (default: no limit)",
    )
    parser.add_argument(
        "--seeds", type=flags.integer(1), metavar="N", help="the first N seeds of each row (default: all)"
    )
    parser.add_argument("--half", action="store_true", help="mixed precision")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--data-dir", type=flags.path, default="data", metavar="DIR", help="where the images are")
    parser.add_argument(
        "--log-dir", type=flags.path, default="runs", metavar="DIR", help="where logs and checkpoints are written"
    )
    add_results(parser)


def add_results(parser):
    parser.add_argument(
        "--results", type=flags.path, default="results", metavar="DIR", help="the folder of rows.csv and the logs"
    )


def choose_rows(patterns, rows):
    """The ``rows``, {name: Row}, that one of the ``patterns`` matches, in the patterns' order. Raises InputError for a
    pattern that matches none.
    """
    chosen = {}
    for pattern in patterns:
        names = fnmatch.filter(rows, pattern)
        if not names:
            raise InputError(f"no row is called {pattern}: `reproduce.py list` shows their names")
        for name in names:
            chosen[name] = rows[name]
    return list(chosen.values())


# list


def list_rows(args):
    rows = read_rows(Path(args.results) / "rows.csv")
    lines = [("ROW", "DONE", "PFLOP", "WHAT")]
    for row in choose_rows(args.rows or ["*"], rows):
        logs = read_runs(row, Path(args.results)).values()
        done = sum(is_finished(log, row) for log in logs)
        what = f"{row.variant}, {row.size}, {row.data}, {row.epochs} epochs"
        lines.append((row.row, f"{done} of {len(row.seeds)}", f"{row.pflop:g}", what))
    name_width, done_width, cost_width, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, done, cost, what in lines:
        print(f"{name:<{name_width}}  {done:<{done_width}}  {cost:>{cost_width}}  {what}")


# run


class Job(NamedTuple):
    """A run that is under way; ``output`` is the file that it prints to."""

    row: Row
    seed: int
    process: subprocess.Popen
    output: Path

    @property
    def name(self):
        return self.row.run_name(self.seed)


def run_missing(args):
    """Runs what is missing of the rows chosen, within the budget."""
    started = time.monotonic()
    # A shell ignores SIGINT for what it starts in the background, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    missing = missing_runs(args)
    with writing(args.log_dir, "name another --log-dir"):
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    jobs = []
    complaints = []
    try:
        while missing or jobs:
            if args.budget is not None and time.monotonic() > started + 60 * args.budget:
                break
            while missing and len(jobs) < args.jobs:
                row, seed = missing.pop(0)
                jobs.append(start_run(row, seed, args))
            time.sleep(0.2)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                try:
                    finish_run(job, args)
                except InputError as error:
                    print(error, file=sys.stderr)
                    complaints.append(job.name)
    finally:
        stop_runs(jobs)
    for job in jobs:
        print(f"{job.name}: stopped; the same command resumes it")
    if complaints:
        raise InputError(f"failed, see above: {', '.join(complaints)}")


def missing_runs(args):
    """[(row, seed)] of the rows chosen, without a finished log, the first seeds of all rows first."""
    rows = choose_rows(args.rows, read_rows(Path(args.results) / "rows.csv"))
    missing = []
    for place in range(max(len(row.seeds) for row in rows)):
        for row in rows:
            if place >= len(row.seeds[: args.seeds]):
                continue
            seed = row.seeds[place]
            log = read_runs(row, Path(args.results)).get(seed)
            if log is not None and is_finished(log, row):
                print(f"{row.run_name(seed)}: done ({os.path.relpath(log.path)})")
            else:
                missing.append((row, seed))
    return missing


def command(row, seed, args):
    """The words of a run's command, which begins it or resumes the newest checkpoint of its name in --log-dir."""
    words = ["python", row.script]
    if row.experiment == "imagenet":
        words.append(args.data_dir)
    else:
        words += ["--data-dir", args.data_dir]
    words += shlex.split(row.flags)
    words += ["--seed", str(seed), "--name", row.run_name(seed), "--log-dir", args.log_dir, "--resume", "auto"]
    if args.half and "--half" not in words:
        words.append("--half")
    if args.device != "auto":
        words += ["--device", args.device]
    return words


def start_run(row, seed, args):
    """Starts a run in a process of its own: a Job."""
    words = command(row, seed, args)
    print(shlex.join(words), flush=True)
    output = Path(args.log_dir) / f"{row.run_name(seed)}.out"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *words[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which stops the runs itself
        )
    return Job(row, seed, process, output)


def stop_runs(jobs):
    """Interrupts the jobs and waits for them; those that do not leave are killed, which their checkpoints survive."""
    for job in jobs:
        job.process.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for job in jobs:
        try:
            job.process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def finish_run(job, args):
    """Copies the log of a job whose process has ended. Raises InputError where it failed, or is no run of its row."""
    if job.process.returncode != 0:
        last = (job.output.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{job.name} ended with exit code {job.process.returncode}: {last}")
    path = find_log(job, args.log_dir)
    if path is None:
        raise InputError(f"{job.name} left no log in {args.log_dir}: see {job.output}")
    log = read_run_log(path)
    check_log(job.row, log)
    if not is_finished(log, job.row):
        raise InputError(f"{job.name} ended before its last epoch: see {job.output}")
    folder = Path(args.results) / job.row.experiment
    folder.mkdir(exist_ok=True)
    target = folder / f"{job.name}.log"
    shutil.copyfile(path, target)
    print(f"{job.name}: {os.path.relpath(target)}")
    if job.row.experiment == "async_buffer":
        path.with_suffix(".pt").unlink(missing_ok=True)  # its replay buffers take gigabytes


def find_log(job, folder):
    """The newest log of the job's run in ``folder``; None where there is none."""
    prefix = f"{job.row.script.removesuffix('.py').replace('/', '-')}-{job.name}"
    logs = []
    for path in Path(folder).glob("*.log"):
        name = parse_run_name(path)
        if name is not None and name.prefix == prefix:
            logs.append(path)
    return newest(logs)


# table, check


def write_tables():
    rows, runs = read_all()
    for page in result_tables.PAGES:
        text = result_tables.filled(page, rows, runs)
        if text != page.read_text():
            page.write_text(text)
            print(f"written: {page.relative_to(ROOT)}")


def check_tables():
    """Raises InputError for the pages whose tables are not what the logs give, and for results in no table."""
    rows, runs = read_all()
    stale = []
    for page in result_tables.PAGES:
        if result_tables.filled(page, rows, runs) != page.read_text():
            stale.append(str(page.relative_to(ROOT)))
    if stale:
        raise InputError(f"the tables in {', '.join(stale)} are not what the logs give: `table` writes them")
    unfounded = result_tables.unfounded()
    if unfounded:
        raise InputError(f"README.md has results that no table in results/README.md has: {', '.join(unfounded)}")


def read_all():
    """The rows, {name: Row}, and their logs, {name: {seed: Log}}."""
    rows = read_rows()
    return rows, {row.row: read_runs(row) for row in rows.values()}


def main():
    args = parse_args()
    os.chdir(ROOT)
    if args.command == "list":
        list_rows(args)
    elif args.command == "run":
        run_missing(args)
    elif args.command == "table":
        write_tables()
    else:
        check_tables()


if __name__ == "__main__":
    flags.start(main)
