"""The numbers that README and docs/ quote are those of the logs and outputs in results/.

For each section that quotes a measurement, a function computes the numbers from what is stored, or counts them from
the networks. Sentences may change; their numbers may not.
"""

import re
import statistics

import pandas as pd
import pytest
import torch
from running import ROOT, load_script

from decoupled.analysis.costs import costs
from decoupled.logs import final, read_log
from decoupled.networks.layerwise import layerwise_cnn
from decoupled.parallel.balance import balance

load_script("results/reproduce.py")
import result_rows  # noqa: E402
import result_tables  # noqa: E402

load_script("async_buffer/cifar_buffer.py")
import buffer_results  # noqa: E402

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
MEASUREMENT = re.compile(r"\d\.\d|\d ?(?:%|MiB|GiB|GFLOP|PFLOP|points|times|million|ms|s|h)(?!\w)")
NAMES = re.compile(
    r"\b(?:Secs?\.|Figs?\.|Tables?|PyTorch|Python|SLURM|arXiv|ResNet|VGG)[ -][\d.]+(?:(?:–| to | and )[\d.]+)?"
)


def sections(page):
    """{heading: text} of a page without code, tables, the targets of links, and names such as Sec. 5.3."""
    text = re.sub(r"^\|.*?$|```.*?```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
    parts = re.split(r"^#+ (.*)$", NAMES.sub("", text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(text):
    return NUMBER.findall(text)


# What each section says


def status():
    """Reproduced: the largest difference between the authors' last test top-1 of a head and ours, rounded up."""
    differences = []
    for method in ("parallel", "sequential"):
        curve = result_tables.AUTHORS.loc[f"{method}.log"]
        for path in (RESULTS / "learning_curves").glob(f"learning_curves-{method}-seed*.log"):
            for n, top1 in final(read_log(path))["test_top1"].items():
                differences.append(abs(top1 - curve.loc[(n, 50), "test_top1"]))
    return [f"{max(differences):.1f}"]


def speed_ups(*rows):
    """How many times as fast as one process of one thread, by the clock, in fp32 and in bf16."""
    found = []
    for row in rows:
        for precision in ("fp32", "bf16"):
            lines = (RESULTS / f"throughput/module_parallel_{precision}.txt").read_text()
            found.append(re.search(rf"{row} +\S+ +\S+ +\S+ +(\S+)", lines)[1])
    return found


def processes_and_threads():
    return speed_ups("DGL, 2 processes", "DGL, 4 processes", "DGL, 2 threads")


def results():
    """What a replay buffer of one mini-batch costs, what DGL costs in a ResNet-20, and ResNet-152's largest batches."""
    hours = []  # per PFLOP, of all finished runs in bf16 on one thread: about 1 to 4
    for row in result_rows.read_rows().values():
        for log in result_rows.read_runs(row).values():
            if log.threads == "1" and log.precision.startswith("bf16") and result_rows.is_finished(log, row):
                hours.append(result_rows.wall_time(log, row) / 3600 / row.pflop)
    assert min(hours) > 0.5 and max(hours) < 4.5
    largest = {}
    lines = (RESULTS / "imagenet/largest_resnet152_fp32.txt").read_text()
    for line in lines.split("\n\n")[1].splitlines():
        match = re.match(r"([\w-]+) +(\d+) .* (\d+) +(\d+)$", line)  # method, K, images, % more
        if match:
            largest[match[1], int(match[2])] = match.group(3, 4)
    last = {}  # of two seeds
    for run in ("30-layer3-slow1.5", "1-layer3-slow1.5"):
        logs = [RESULTS / f"async_buffer/async_buffer-buffer{run}-32ch-seed{seed}.log" for seed in (0, 1)]
        last[run] = [final(read_log(log))["test_top1"].iloc[-1] for log in logs]
    many, one = last.values()
    resnets = {}
    for method in ("backprop", "ddg-k2", "dgl-k2"):
        log = read_log(RESULTS / f"ddg_comparison/ddg_comparison-{method}-resnet20-seed1.log")
        resnets[method] = final(log)["test_top1"].iloc[-1]
    paper = result_tables.PAPER
    log = read_log(RESULTS / "async_buffer/async_buffer-buffer0-32ch-seed0.log")
    synchronous = final(log)["test_top1"].iloc[-1]
    found = [f"{synchronous:.2f}", f"{statistics.mean(one):.2f}", f"{statistics.mean(many):.2f}"]
    found += [f"{many[seed] - one[seed]:.1f}" for seed in (0, 1)]
    found += list(paper.loc[paper["metric"] == "% more samples than back-propagation", "value"])
    found += [f"{resnets[method] - resnets['dgl-k2']:.1f}" for method in ("backprop", "ddg-k2")]
    found += [largest["back-propagation", 1][0], *largest["DGL", 2], largest["DGL", 4][0]]
    found += [largest["checkpointing", parts][0] for parts in (2, 4)]
    return found


def early_exit():
    numbers = pd.read_csv(RESULTS / "early_exit/digits.csv")
    heads = numbers[numbers["exit"] == "head"]
    early = numbers[(numbers["exit"] == "early") & (numbers["at"] == 0.9)].iloc[0]
    logged = final(read_log(RESULTS / "early_exit/digits_run.txt"))["test_top1"]
    assert list(heads["top1"]) == pytest.approx(list(logged), abs=1e-3)
    with torch.device("meta"):
        frame = costs(
            layerwise_cnn(channels=64, depth=4, downsample=(1, 3), auxiliary="mlp-sr"), torch.empty(2, 3, 32, 32)
        )
    auxiliaries = frame["flops"].xs("auxiliary", level="part")
    more = 100 * auxiliaries.iloc[:-1].sum() / 1e9 / heads["gflops"].iloc[-1]
    found = [f"{top1:.2f}" for top1 in heads["top1"]]
    return [
        *found,
        "0.9",
        f"{early['top1']:.2f}",
        f"{100 - early['saved']:.0f}",
        f"{early['left1']:.0f}",
        f"{more:.0f}",
    ]


def step_costs(network):
    """{(method, K): MiB on the fullest device} of a training step with 32 images in fp32, counted."""
    lines = (RESULTS / f"imagenet/step_costs_{network}.txt").read_text()
    found = {}
    for line in lines.split("\n\n")[1].splitlines():
        match = re.match(r"([\w-]+) +(\d+) .*?([\d,.]+)$", line)
        if match:
            found[match[1], int(match[2])] = float(match[3].replace(",", ""))
    return found


def where_memory_is_not_saved():
    """DGL's fullest device beside the fullest stage of a pipeline, in %."""
    found = []
    for network in ("resnet152", "vgg19"):
        fullest = step_costs(network)
        for k in (2, 4):
            found.append(f"{abs(100 * fullest['DGL', k] / fullest['pipeline', k] - 100):.0f}")
    return found


def memory_of_stages():
    """VGG-19, 4 GPUs: DGL's fullest GPU, back-propagation on one, and data-parallel DGL and back-propagation."""
    text = (RESULTS / "throughput/module_parallel_paper.txt").read_text().split("memory of the fullest GPU")[1]
    one, dgl, _, _, data_parallel, data_parallel_dgl = re.search(r"^ +4 +(.*)$", text, re.MULTILINE)[1].split()
    return [f"{float(gib):.0f}" for gib in (dgl, one, data_parallel_dgl, data_parallel)]


def speed_up_by_flops():
    """Million FLOPs of a training step per image and module, the best speed-ups by them, and those measured."""
    with torch.device("meta"):
        net = layerwise_cnn(channels=64, depth=4, downsample=(1, 3), auxiliary="mlp-sr")
        frame = costs(net, torch.empty(2, 3, 32, 32))
    flops = list(frame["training_flops"].xs("module", level="part"))
    found = [f"{each / 1e6:.0f}" for each in flops]
    for processes in (2, 3):
        start, busiest = 0, 0
        for length in balance(tuple(flops), processes):
            busiest = max(busiest, sum(flops[start : start + length]))
            start += length
        found.append(f"{sum(flops) / busiest:.2f}")
    assert found[-1] == f"{sum(flops) / max(flops):.2f}"  # with 4 processes as well
    return found + speed_ups("DGL, 2 processes")


def pace_beside_a_slow_process():
    """By how much the pace of the others changes where module 3 is slow by 2, in %."""
    pace = buffer_results.paces(RESULTS / "async_buffer/side_by_side", epoch=2)
    others = pace.drop(index=3)
    return [f"{100 * (others[2.0] / others[1.0] - 1).abs().max():.0f}"]


# (page, heading): what computes its numbers, and its other numbers: batch sizes, K, ...
CLAIMS = {
    ("README.md", "Status"): (status, "20 60 32 15 64 40"),
    ("README.md", "Results"): (results, "1 1.5 3 4 15 16 2 20 30 32 40 64"),
    ("README.md", "Several processes"): (processes_and_threads, ""),
    ("docs/early_exit.md", "Measured savings"): (early_exit, "1 359 10"),
    ("docs/memory.md", "Where it saves nothing"): (where_memory_is_not_saved, "2 4 51"),
    ("docs/several_devices.md", "Training on several devices"): (memory_of_stages, "2 256 224 4"),
    ("docs/several_devices.md", "What to expect"): (speed_up_by_flops, "0 1 2 3 4 8"),
    ("docs/several_devices.md", "Asynchronously, with replay buffers"): (pace_beside_a_slow_process, "2"),
}


@pytest.mark.parametrize(("page", "heading"), CLAIMS)
def test_prose(page, heading):
    compute, settings = CLAIMS[page, heading]
    assert set(numbers(sections(ROOT / page)[heading])) == {*compute(), *settings.split()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_other_section_quotes_a_measurement(page):
    name = str(page.relative_to(ROOT))
    for heading, text in sections(page).items():
        if (name, heading) not in CLAIMS:
            assert MEASUREMENT.findall(text) == [], heading


def test_counts_of_the_released_choices():
    output = (RESULTS / "async_buffer/released_choices.txt").read_text()
    rows = ("| reads in which the released", "| mean staleness in steps", "| ours | 0.00")
    lines = [line for line in (RESULTS / "README.md").read_text().splitlines() if line.startswith(rows)]
    lines += [
        line for line in (ROOT / "docs/differences.md").read_text().splitlines() if "the warm-up is repeated" in line
    ]
    assert len(lines) == 4
    quoted = numbers(" ".join(lines).replace(",", ""))
    assert set(quoted) <= set(numbers(output))


# README's table

ROWS = ["learning_curves-parallel", "learning_curves-sequential", "aux_nets-mlp", "aux_nets-mlp-sr", "aux_nets-cnn"]
ROWS += ["dni-backprop", "dni-dgl", "dni-cdni", "dni-dni"]
ROWS += ["ddg_comparison-backprop", "ddg_comparison-ddg-k2", "ddg_comparison-dgl-k2", "async_buffer-buffer30", None]
ROWS += ["imagenet-resnet152-dgl-k2", "imagenet-resnet152-backprop"]
REDUCED = {  # rows whose largest run is smaller than published
    "aux_nets-mlp": "aux_nets-mlp-64ch",
    "aux_nets-mlp-sr": "aux_nets-mlp-sr-64ch",
    "ddg_comparison-backprop": "ddg_comparison-backprop-resnet20",
    "ddg_comparison-ddg-k2": "ddg_comparison-ddg-k2-resnet20",
    "ddg_comparison-dgl-k2": "ddg_comparison-dgl-k2-resnet20",
    "async_buffer-buffer30": "async_buffer-buffer30-32ch",
}


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def readme_table():
    """[{column: cell}] of the table that begins with the column "experiment"."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| experiment |"))
    columns = cells(lines[start])
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return table
        table.append(dict(zip(columns, cells(line), strict=True)))


@pytest.mark.parametrize(("name", "line"), zip(ROWS, readme_table(), strict=True), ids=str)
def test_readmes_table(name, line):
    """Its costs, the paper's numbers and ours are those of rows.csv, paper_numbers.csv and the linked logs."""
    if name is None:  # in several processes: a pace, no accuracy
        assert not numbers(line["CPU"] + line["ours (seeds)"])
        return
    row = result_rows.read_rows()[name]
    paper = result_tables.PAPER
    chosen = (paper["variant"] == row.variant) & (paper["experiment"] == row.experiment)
    chosen &= (paper["metric"] == "test_top1") & (paper["head"] == row.head)
    expected = [" ± ".join(filter(None, [line.value, line.sd])) for line in paper[chosen].fillna("").itertuples()]
    assert line["paper or authors' log"] == (expected[0] if expected else "figures only")
    runs = [result_rows.read_run_log(ROOT / link) for link in re.findall(r"\(([^)]*\.log)\)", line["log"])]
    if "PFLOP" in line["CPU"]:
        pflop = float(numbers(line["CPU"])[0].replace(",", ""))
        assert pflop == pytest.approx(row.pflop, rel=0.02)
    else:
        seconds = statistics.mean(result_rows.wall_time(run, row) for run in runs)
        assert line["CPU"].startswith(result_tables.duration(seconds))
    if not runs:
        assert line["ours (seeds)"] == ""
        return
    measured = result_rows.read_rows()[REDUCED.get(name, name)]
    epoch = min(measured.epochs, *(log.last_epoch(measured.head) for log in runs))
    tops = [result_tables.value_at(log, "test_top1", measured.head, epoch) for log in runs]
    ours = f"{result_tables.cell(tops)} ({len(runs)})"
    if measured.size != "published":
        ours = f"{measured.size}: {ours}"
    elif epoch < row.epochs:
        authors = result_tables.authors_value_at(row.variant, "test_top1", row.head, epoch)
        ours = f"epoch {epoch}: {ours}, authors {authors:.2f}"
    assert line["ours (seeds)"] == ours


# docs/differences.md


def test_differences_quotes_the_logs():
    """The first epochs beside the authors', the FLOPs of DNI's step, and released_choices.txt."""
    text = (ROOT / "docs/differences.md").read_text()
    ours = read_log(RESULTS / "learning_curves/learning_curves-parallel-seed1.log").set_index(["n", "epoch"])
    authors = result_tables.AUTHORS
    assert f"{ours.loc[(4, 2), 'train_top1']:.2f} %" in text
    assert f"authors: {authors.loc[('parallel.log', 4, 2), 'train_top1']:.2f}" in text
    ours = read_log(RESULTS / "dni/dni-backprop-60-seed1.log").set_index(["n", "epoch"])
    assert f"{ours.loc[(3, 1), 'loss']:.3f}" in text
    assert f"authors: {authors.loc[('backprop.log', 3, 1), 'loss']:.3f}" in text
    (gflop,) = re.search(
        r"^DNI step +\S+ +\S+ +(\S+)", (RESULTS / "throughput/dni_fp32.txt").read_text(), re.MULTILINE
    ).groups()
    assert f"{gflop} GFLOP per image" in text
    others, released, ours = re.search(
        r"--buffer 30: .* of which (\S+) % .* mean staleness (\S+) steps, ours (\S+)",
        (RESULTS / "async_buffer/released_choices.txt").read_text(),
    ).groups()
    assert f"{float(others):.0f} % of the reads" in text
    assert f"{float(released):.1f} steps instead of {float(ours):.1f}" in text
