"""Ten thousand warm tests in a row: does anything grow, does anything stall?

    python benchmarks/soak.py [--tests 10000] [--ranks 2] [--every 1000] [--json FILE]

Runs one pytest session of so many items and prints, as it goes on, what the processes of the session
have: the controller, the zygote, the store and the ranks, each with its resident memory, its open
descriptors and its native threads. Ranks are replaced after `ranks_max_uses`
tests, so a leak of a rank shows between two replacements, one of the others over the whole run. pytest itself
keeps the reports of all tests: what a session of as many plain tests grows by is measured first, and
allowed. The exit status is 1 where something grew by more, or a test took longer than `--stall` seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = """
import os
import pytest, torch
import torch.distributed as dist


@pytest.mark.parametrize("number", range({tests}))
@pytest.mark.ranks({ranks})
def test_all_reduce(number, rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == rank.world_size
"""
PLAIN = """
import pytest, torch


@pytest.mark.parametrize("number", range({tests}))
def test_plain(number):
    assert torch.ones(1) == 1
"""
RECORDER = """
import json, os, time
import pytest

OWN = os.getpid()
EVERY = int(os.environ["SOAK_EVERY"])
seen, slowest, start = 0, (0.0, ""), time.perf_counter()


def children(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def below(pid):
    found = [pid]
    for child in children(pid):
        found += below(child)
    return found


def look(pid):
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = [line.split() for line in file if line.startswith("Rss:")]
        return {
            "pid": pid,
            "kib": sum(int(line[1]) for line in lines),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task")),
        }
    except OSError:
        return None  # it has just ended


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    global seen, slowest
    if "SOAK_FILE" not in os.environ or os.getpid() != OWN:
        return (yield)  # on a rank
    begin = time.perf_counter()
    result = yield
    if seen:  # the first one waits for torch
        slowest = max(slowest, (time.perf_counter() - begin, item.nodeid))
    seen += 1
    if seen % EVERY == 0:
        note()
    return result


def note():
    global slowest
    time.sleep(0.5)  # groups that are being dropped keep their threads for a moment
    processes = [one for pid in below(os.getpid()) if (one := look(pid))]
    row = {
        "tests": seen,
        "seconds": round(time.perf_counter() - start, 1),
        "slowest": slowest,
        "processes": processes,
    }
    with open(os.environ["SOAK_FILE"], "a") as file:
        file.write(json.dumps(row) + "\\n")
    slowest = (0.0, "")
"""


def run(tests: int, ranks: int, every: int, *options: str, text: str = TESTS) -> list[dict]:
    """Return what was seen after each so many tests of one session."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(text.format(tests=tests, ranks=ranks))
        Path(folder, "conftest.py").write_text(RECORDER)
        seen = Path(folder, "seen.jsonl")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "pytest_ranks.plugin"),
                *("-p", "no:cacheprovider", "--rootdir", folder, *options),
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "SOAK_EVERY": str(every),
                "SOAK_FILE": str(seen),
            },
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the session failed:\n{done.stdout[-4000:]}")
        return [json.loads(line) for line in seen.read_text().splitlines()]


def lasting(rows: list[dict], quantity: str) -> list[tuple[int, int, int]]:
    """Return pid, first and last value of each process that was there in every row."""
    first = {one["pid"]: one[quantity] for one in rows[0]["processes"]}
    last = {one["pid"]: one[quantity] for one in rows[-1]["processes"]}
    return [(pid, first[pid], last[pid]) for pid in first if pid in last]


def what_grew(rows: list[dict], *, kib: int, descriptors: int, threads: int) -> list[str]:
    """Return what grew by more than so much, in a process that lasted or in the number of them."""
    found = []
    for quantity, most in (("kib", kib), ("descriptors", descriptors), ("threads", threads)):
        for pid, first, last in lasting(rows, quantity):
            if last - first > most:
                found.append(f"process {pid}: {quantity} {first} -> {last}")
    counts = [len(row["processes"]) for row in rows]
    if max(counts) > counts[0] + 4:  # ranks that are being replaced
        found.append(f"processes: {counts}")
    return found


def show(row: dict) -> str:
    slowest = row["slowest"][0]
    names = ("kib", "descriptors", "threads")
    totals = [sum(one[name] for one in row["processes"]) for name in names]
    return (
        f"{row['tests']:>6} tests  {row['seconds']:>7.1f} s  {len(row['processes'])} processes  "
        f"{totals[0] / 1024:>6.1f} MiB resident  {totals[1]:>4} descriptors  {totals[2]:>3} threads  "
        f"slowest {slowest * 1000:.0f} ms"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--stall", type=float, default=4.0, help="seconds (a DNS stall takes 5)")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    plain = run(chosen.tests, 1, chosen.every, text=PLAIN)
    reports = max(last - first for _, first, last in lasting(plain, "kib"))
    print(f"a session of plain tests grows by {reports / 1024:.1f} MiB")
    rows = run(chosen.tests, chosen.ranks, chosen.every)
    for row in rows:
        print(show(row))
    print(f"load average: {os.getloadavg()[0]:.1f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1))
    problems = what_grew(rows, kib=2 * reports + 8192, descriptors=20, threads=40)
    problems += [
        f"{row['slowest'][1]} took {row['slowest'][0]:.1f} s"
        for row in rows
        if row["slowest"][0] > chosen.stall
    ]
    print("\n".join(problems) or "nothing grew, nothing stalled")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
