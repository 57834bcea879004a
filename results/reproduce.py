"""Reproduces the paper's results: runs the experiments in rows.csv that have no
log yet, and writes tables of our results beside the paper's from the logs.

    python results/reproduce.py list
    python results/reproduce.py run learning_curves-parallel 'dni-*-20' --half
    python results/reproduce.py run 'aux_nets-*-64ch' --seeds 1 --jobs 2 --budget 120
    python results/reproduce.py table
    python results/reproduce.py check

ROW is a name in rows.csv, or a pattern that matches several names.
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

GRACE = 60  # seconds that interrupted runs have to save and exit


class CommandParser(flags.Parser):
    """The parser of one command. argparse passes ``prog``, which names the script and the command."""

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
        "table", description="Writes the tables in the README files from the logs in results/.", help="write the tables"
    )
    commands.add_parser(
        "check",
        description="Fails if the tables in the README files do not agree with the logs in results/.",
        help="check the tables against the logs",
    )
    return parser.parse_args()


def add_list(commands):
    parser = commands.add_parser(
        "list",
        description="Lists the rows, how many of their seeds are done, and the cost of training one seed.",
        help="list the rows, their finished seeds and their cost",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="list only these")
    add_results(parser)


def add_run(commands):
    parser = commands.add_parser(
        "run",
        help="run or resume the seeds that have no finished log",
        description="""Runs every seed of the rows that has no finished log in results/.

The first seeds of all rows come before the second ones. Each run is a process with
one CPU thread. It starts in the repository's root, so --data-dir and --log-dir are
relative to the root. An interrupted run is resumed and needs the same --half and
--device. The log of a finished run is copied to results/EXPERIMENT/ROW-seedS.log.""",
    )
    parser.add_argument("rows", nargs="+", metavar="ROW", help="the rows to run")
    parser.add_argument("--jobs", type=flags.integer(1), default=1, metavar="N", help="how many runs at the same time")
    parser.add_argument(
        "--budget",
        type=flags.number(above=0),
        metavar="MINUTES",
        help="stop all runs after this time, as with Ctrl-C; the same command resumes them (default: no limit)",
    )
    parser.add_argument(
        "--seeds", type=flags.integer(1), metavar="N", help="only the first N seeds of each row (default: all)"
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
        "--results", type=flags.path, default="results", metavar="DIR", help="the folder with rows.csv and the logs"
    )


def choose_rows(patterns, rows):
    """The names in ``rows``, {name: Row}, that match one of ``patterns``, in the order of the patterns. Raises
    InputError for a pattern that matches none.
    """
    chosen = {}
    for pattern in patterns:
        names = fnmatch.filter(rows, pattern)
        if not names:
            raise InputError(f"no row is called {pattern}: `reproduce.py list` lists all rows")
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
        lines.append((row.name, f"{done} of {len(row.seeds)}", f"{row.pflop:g}", what))
    names, counts, costs, _ = zip(*lines, strict=True)
    name_width = max(map(len, names))
    done_width = max(map(len, counts))
    cost_width = max(map(len, costs))
    for name, done, cost, what in lines:
        print(f"{name:<{name_width}}  {done:<{done_width}}  {cost:>{cost_width}}  {what}")


# run


class Job(NamedTuple):
    """A run in progress; ``output`` is the file that it prints to."""

    row: Row
    seed: int
    process: subprocess.Popen
    output: Path

    @property
    def name(self):
        return self.row.run_name(self.seed)


def run_missing(args):
    """Runs the missing seeds of the chosen rows until the budget is spent."""
    started = time.monotonic()
    # A shell makes background commands ignore SIGINT, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    missing = missing_runs(args)
    with writing(args.log_dir, "name another --log-dir"):
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    jobs = []
    failed = []
    try:
        while missing or jobs:
            if args.budget is not None and time.monotonic() > started + 60 * args.budget:
                break
            while missing and len(jobs) < args.jobs:
                row, seed = missing.pop(0)
                jobs.append(start_run(row, seed, args))
            time.sleep(0.2)
            ended = [job for job in jobs if job.process.poll() is not None]
            for job in ended:
                jobs.remove(job)
                try:
                    finish_run(job, args)
                except InputError as error:
                    print(error, file=sys.stderr)
                    failed.append(job.name)
    finally:
        stop_runs(jobs)
    for job in jobs:
        print(f"{job.name}: stopped; the same command resumes it")
    if failed:
        raise InputError(f"failed, see above: {', '.join(failed)}")


def missing_runs(args):
    """[(row, seed)] of the chosen rows that have no finished log. Prints the logs of those that have."""
    rows = choose_rows(args.rows, read_rows(Path(args.results) / "rows.csv"))
    missing = []
    for row, seed in first_seeds_first(rows, args.seeds):
        log = read_runs(row, Path(args.results)).get(seed)
        if log is not None and is_finished(log, row):
            print(f"{row.run_name(seed)}: done ({os.path.relpath(log.path)})")
        else:
            missing.append((row, seed))
    return missing


def first_seeds_first(rows, count):
    """[(row, seed)]: the first seed of every row, then the second ones, and so on up to ``count`` (None: all)."""
    ordered = []
    for index in range(max(len(row.seeds) for row in rows)):
        for row in rows:
            if index < len(row.seeds[:count]):
                ordered.append((row, row.seeds[index]))
    return ordered


def run_command(row, seed, args):
    """The words of the command that starts a run, or resumes the newest checkpoint with its name in --log-dir."""
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
    """Starts a run in its own process and returns its Job."""
    words = run_command(row, seed, args)
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
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which stops the runs itself
        )
    return Job(row, seed, process, output)


def stop_runs(jobs):
    """Interrupts the jobs and waits for them. Those that do not exit are killed; their checkpoints remain usable."""
    for job in jobs:
        job.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for job in jobs:
        try:
            job.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def finish_run(job, args):
    """Copies the log of a job whose process has ended to the results. Raises InputError if the run failed or if the log
    is not that of a finished run of its row.
    """
    if job.process.returncode != 0:
        lines = job.output.read_text(errors="replace").strip().splitlines()
        last_line = lines[-1] if lines else "no output"
        raise InputError(f"{job.name} ended with exit code {job.process.returncode}: {last_line}")
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
        path.with_suffix(".pt").unlink(missing_ok=True)  # with replay buffers, a checkpoint has gigabytes


def find_log(job, folder):
    """The newest log of the job's run in ``folder``; None if there is none."""
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
        text = result_tables.fill_tables(page, rows, runs)
        if text != page.read_text():
            page.write_text(text)
            print(f"written: {page.relative_to(ROOT)}")


def check_tables():
    """Raises InputError if a table does not agree with the logs, or if README.md quotes a result that is in no
    table.
    """
    rows, runs = read_all()
    stale = []
    for page in result_tables.PAGES:
        if result_tables.fill_tables(page, rows, runs) != page.read_text():
            stale.append(str(page.relative_to(ROOT)))
    if stale:
        raise InputError(f"the tables in {', '.join(stale)} do not agree with the logs: run `reproduce.py table`")
    untraced = result_tables.results_in_no_table()
    if untraced:
        raise InputError(f"README.md has results that are in no table of results/README.md: {', '.join(untraced)}")


def read_all():
    """The rows, {name: Row}, and their logs, {name: {seed: Log}}."""
    rows = read_rows()
    return rows, {name: read_runs(row) for name, row in rows.items()}


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
