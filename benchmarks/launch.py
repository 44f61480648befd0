"""How long a test on ranks takes: ours and other harnesses, side by side in one run.

    python benchmarks/launch.py [--ranks 2 4] [--rounds 3] [--quick] [--json FILE] [--write-docs]

The same trivial test everywhere, an all_reduce over N gloo ranks. The harnesses take turns, round by
round, so that whatever else the machine does meets all of them; a row is the median over all rounds, and
its ratio is to our warm test with a fresh process group. Each is a pytest item in a session without
other plugins, timed from the beginning of its protocol to the end of its reports. What is not installed
is said and left out: `expecttest` makes torch's own classes run, `accelerate` its fork launcher.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "explanation"
FILE = """
import pytest, torch
import torch.distributed as dist


@pytest.mark.parametrize("number", range({tests}))
@pytest.mark.ranks({mark})
def test_all_reduce(number, rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == rank.world_size
"""
PLAIN = """
import torch


def test_plain():
    assert torch.ones(1) == 1
"""
FUNCTION = """
import pytest, torch
import torch.distributed as dist


def all_reduce():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()


@pytest.mark.parametrize("number", range({tests}))
def test_all_reduce(number, launch):
    launch(all_reduce, world_size={mark})
"""
FAKE = """
import time
import pytest, torch
from torch.distributed.fsdp import fully_shard


@pytest.mark.ranks(2, fidelity="fake")
def test_warm_up(rank):
    pass


@pytest.mark.ranks(dp=128, tp=64, pp=8, fidelity="fake")
def test_mesh(rank):
    assert rank.mesh.size() == 65536


@pytest.mark.ranks(4096, fidelity="fake")
def test_step(rank):
    from torch.distributed.device_mesh import init_device_mesh

    model = torch.nn.Linear(8192, 8, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (4096,)))
    model(torch.ones(2, 8192)).sum().backward()
"""
TIMER = """
import json, os, time
import pytest

OWN = os.getpid()
rows = []


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    start = time.perf_counter()
    result = yield
    if os.getpid() == OWN:
        rows.append((item.name, time.perf_counter() - start, time.time()))
    return result


def pytest_sessionfinish():
    if os.getpid() == OWN:
        with open(os.environ["TIMES"], "w") as file:
            json.dump(rows, file)
"""


@dataclass
class Row:
    """What one way of running the test took, in seconds."""

    name: str
    ranks: int
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.later or self.first)


def session(
    text: str, *, plugin: str = "pytest_ranks.plugin", limit: float | None = None, **env: str
) -> tuple[list[tuple[str, float]], float]:
    """Return name and seconds of each item of a pytest session, and seconds to the first one's end.

    Args:
        text: of the test file.
        plugin: the only one beside pytest's own.
        limit: seconds to wait.
        env: variables to set.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(text)
        Path(folder, "conftest.py").write_text(TIMER)
        times = Path(folder, "times.json")
        start = time.time()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-rs", "-p", plugin),
                *("-p", "no:cacheprovider", "--rootdir", folder),
            ],
            cwd=folder,
            env={**os.environ, "TIMES": str(times), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **env},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=limit,
        )
        if done.returncode:
            raise RuntimeError(done.stdout)
        rows = json.loads(times.read_text())
        return [(name, seconds) for name, seconds, _ in rows], rows[0][2] - start


def ours(mark: str, tests: int, *, text: str = FILE) -> list[float]:
    return [seconds for _, seconds in session(text.format(mark=mark, tests=tests))[0]]


def theirs(name: str, ranks: int, tests: int, limit: float) -> list[float] | str:
    """Return the seconds of each test in another harness, or why there are none."""
    text = (HERE / "harnesses.py").read_text()
    chosen = {"HARNESS": name, "RANKS": str(ranks), "TESTS": str(tests)}
    try:
        rows, _ = session(text, plugin="no:ranks", limit=limit, **chosen)
    except subprocess.TimeoutExpired:
        return f"not over after {limit:g} s"
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if line.startswith(("SKIPPED", "FAILED"))]
        return said[0] if said else f"failed: {str(error)[-300:]}"
    return [seconds for _, seconds in rows]


OURS = (
    ("fresh group", "{n}", 200, FILE),
    ("kept group", "{n}, keep_group=True", 200, FILE),
    ("isolated", "{n}, isolate=True", 20, FILE),
    ("launch(function)", "{n}", 20, FUNCTION),
)
# how many tests a round: those that start processes for each test take seconds
THEIRS = (
    ("threads (MultiThreadedTestCase)", "MultiThreadedTestCase", 200),
    ("MultiProcContinuousTest", "MultiProcContinuousTest", 200),
    ("multiprocessing.Pool, kept", "pool kept", 200),
    ("accelerate debug_launcher", "debug_launcher", 5),
    ("multiprocessing.Pool", "pool", 2),
    ("torch.multiprocessing.spawn", "spawn", 2),
    ("torchrun", "torchrun", 2),
    ("MultiProcessTestCase", "MultiProcessTestCase", 2),
)


def compare(chosen: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Return the rows, and what is missing and why."""
    rows: dict[tuple[str, int], Row] = {}
    missing: dict[str, str] = {}

    def add(name: str, ranks: int, found: list[float]) -> None:
        row = rows.setdefault((name, ranks), Row(name, ranks))
        row.first.append(found[0])
        row.later += found[1:]

    for number in range(chosen.rounds):
        for ranks in chosen.ranks:
            for name, mark, tests, text in OURS:
                count = max(3, tests // chosen.share)
                add(name, ranks, ours(mark.format(n=ranks), count, text=text))
            print(f"round {number + 1}, {ranks} ranks", file=sys.stderr, flush=True)
            for title, name, tests in THEIRS:
                is_chosen = not chosen.harnesses or name in chosen.harnesses
                if title in missing or not is_chosen or (ranks not in (2, 4) and tests < 5):
                    continue
                found = theirs(name, ranks, max(2, tests // chosen.share), chosen.limit)
                if isinstance(found, str):
                    missing[title] = found
                else:
                    add(title, ranks, found)
    return list(rows.values()), [f"{name}: {why}" for name, why in missing.items()]


def from_nothing(rounds: int) -> dict[str, float]:
    """Return the seconds from the start of pytest to the end of the first test."""
    ways = {
        "a plain test that imports torch": PLAIN,
        "first test on 2 ranks": FILE.format(mark="2", tests=1),
        "first test on 8 ranks": FILE.format(mark="8", tests=1),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, text in ways.items():
            found[name].append(session(text)[1])
    return {name: statistics.median(values) for name, values in found.items()}


def many_ranks(tests: int) -> dict[str, float]:
    """Return milliseconds-scale facts of wide worlds, in seconds."""
    found = {}
    for name, mark in (
        ("32 ranks (dp=4, tp=2, pp=4)", "dp=4, tp=2, pp=4"),
        ("32 ranks (dp=4, tp=2, pp=4), kept group", "dp=4, tp=2, pp=4, keep_group=True"),
        ("64 ranks", "64"),
    ):
        first, *later = ours(mark, tests)
        found[f"{name}: first test"] = first
        found[f"{name}: warm test"] = statistics.median(later)
    _, (_, mesh), (_, step) = session(FAKE)[0]
    found["fake: a mesh of 65,536 ranks"] = mesh
    found["fake: one FSDP2 step on 4,096 ranks"] = step
    return found


@dataclass
class Report:
    """All that one run of the benchmark found."""

    machine: str
    date: str
    load: str
    rows: list[Row]
    missing: list[str]
    start: dict[str, float]
    many: dict[str, float]


def machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    import torch

    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores of {model}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def table(report: Report) -> list[str]:
    """Return the report as Markdown."""
    sizes = sorted({row.ranks for row in report.rows})
    by_name: dict[str, dict[int, Row]] = {}
    for row in report.rows:
        by_name.setdefault(row.name, {})[row.ranks] = row
    base = {ranks: row.median for ranks, row in by_name["fresh group"].items()}
    heads = [f"{size} ranks, ms | ratio" for size in sizes]
    lines = [f"| a test | {' | '.join(heads)} |", "| --- " * (1 + 2 * len(sizes)) + "|"]
    for name, found in by_name.items():
        cells = [
            f"{found[size].median * 1000:,.1f} | {found[size].median / base[size]:,.1f}"
            if size in found
            else " | "
            for size in sizes
        ]
        shown = f"**ours, {name}**" if name in {one[0] for one in OURS} else name
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    lines += ["", *(f"Left out: {text}." for text in report.missing), ""] * bool(report.missing)
    if report.start:
        plain = report.start["a plain test that imports torch"]
        lines += ["", "| from nothing to the end of | ms | ratio |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {seconds * 1000:,.0f} | {seconds / plain:.2f} |"
            for name, seconds in report.start.items()
        ]
    if report.many:
        lines += ["", "| many ranks | ms |", "| --- | --- |"]
        lines += [f"| {name} | {seconds * 1000:,.0f} |" for name, seconds in report.many.items()]
    return lines


def picture(report: Report) -> str:
    """Return the rows at two ranks as bars on a logarithmic scale, as SVG."""
    import math

    rows = sorted((row for row in report.rows if row.ranks == 2), key=lambda row: row.median)
    height, left, width = 26, 250, 420
    values = [row.median * 1000 for row in rows]
    low, high = math.log10(min(values) / 2), math.log10(max(values) * 1.2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 100}" '
        f'height="{height * len(rows) + 40}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    names = {one[0] for one in OURS}
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        y = 8 + index * height
        length = width * (math.log10(value) - low) / (high - low)
        is_ours = row.name in names
        label = f"ours, {row.name}" if is_ours else row.name
        colour = "#0a7d55" if is_ours else "#9aa4ad"
        parts += [
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y + 3}" width="{length:.0f}" height="18" fill="{colour}"/>',
            f'<text x="{left + length + 6:.0f}" y="{y + 16}">{value:,.1f} ms</text>',
        ]
    y = 8 + len(rows) * height + 20
    parts.append(
        f'<text x="{left}" y="{y}" fill="#555">a warm test on 2 ranks, logarithmic scale; '
        f"{report.date}, load {report.load}</text></svg>"
    )
    return "\n".join(parts) + "\n"


def write_docs(report: Report, page: Path) -> None:
    """Put the table between the page's two marks, and the picture beside the page."""
    text = page.read_text()
    begin, end = "<!-- measured -->\n", "<!-- end of measured -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    said = f"Measured on {report.date}: {report.machine}. Load average {report.load}.\n"
    body = "\n".join([said, "![a warm test on 2 ranks](speed.svg)", "", *table(report), ""])
    page.write_text(f"{head}{begin}\n{body}\n{end}{tail}")
    page.with_name("speed.svg").write_text(picture(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="world sizes")
    names = [name for _, name, _ in THEIRS]
    parser.add_argument("--harnesses", nargs="+", choices=names, help="of others (default all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--share", type=int, default=1, help="run 1 in so many tests")
    parser.add_argument("--quick", action="store_true", help="one round, few tests, no wide worlds")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one harness")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/explanation/speed.md")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.share = 1, max(chosen.share, 10)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    load = os.getloadavg()[0]
    rows, missing = compare(chosen)
    report = Report(
        machine=machine(),
        date=datetime.date.today().isoformat(),
        load=f"{load:.1f} at the start",
        rows=rows,
        missing=missing,
        start=from_nothing(chosen.rounds),
        many={} if chosen.quick else many_ranks(10),
    )
    print("\n".join([report.machine, f"load {report.load}", "", *table(report)]))
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(report), indent=1))
    if chosen.write_docs:
        write_docs(report, DOCS / "speed.md")


if __name__ == "__main__":
    main()
