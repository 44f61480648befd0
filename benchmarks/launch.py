"""How long a test on ranks takes, against a process spawned for each rank of each test.

    python benchmarks/launch.py [--tests 20] [--ranks 2 4]

Three ways to run the same trivial test, an all_reduce over N gloo ranks, one after the other in
one run, so that the ratio means something on any machine:

* pytest-ranks: `@pytest.mark.ranks(N)`, from a whole pytest session, per test once ranks are warm;
* isolated: `@pytest.mark.ranks(N, isolate=True)`, freshly forked ranks for each test;
* spawn: `torch.multiprocessing.spawn` for each test, what torch's own MultiProcessTestCase and the
  harnesses that descend from it do.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = """
import pytest, torch
import torch.distributed as dist


@pytest.mark.parametrize("number", range({tests}))
@pytest.mark.ranks({ranks}{isolate})
def test_all_reduce(number, rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == rank.world_size
"""
PLUGIN = """
import json, os
rows = []
def pytest_runtest_logreport(report):
    if report.when == "call":
        assert report.outcome == "passed", report.longreprtext
        rows.append(report.duration)
def pytest_sessionfinish():
    if rows:
        with open(os.environ["DURATIONS"], "w") as file:
            json.dump(rows, file)
"""


def measure_ours(ranks: int, tests: int, *, isolate: bool) -> list[float]:
    """Return the seconds of each test of a pytest session."""
    with tempfile.TemporaryDirectory() as folder:
        text = FILE.format(tests=tests, ranks=ranks, isolate=", isolate=True" * isolate)
        Path(folder, "test_it.py").write_text(text)
        Path(folder, "conftest.py").write_text(PLUGIN)
        durations = Path(folder, "durations.json")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder],
            cwd=folder,
            env={**os.environ, "DURATIONS": str(durations)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found: list[float] = json.loads(durations.read_text())
        return found


def spawned(rank: int, world_size: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == world_size
    dist.destroy_process_group()


def measure_spawn(ranks: int, tests: int) -> list[float]:
    """Return the seconds of each spawn of all ranks."""
    import torch.multiprocessing

    found = []
    for _ in range(tests):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start = time.perf_counter()
        torch.multiprocessing.spawn(spawned, args=(ranks, port), nprocs=ranks)
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=20, help="tests a session (default 20)")
    parser.add_argument("--spawns", type=int, default=3, help="spawned tests (default 3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print("milliseconds a test, median; the first test also waits for torch to be imported")
    print(f"{'ranks':>5}  {'first':>8}  {'warm':>8}  {'isolated':>8}  {'spawn':>8}  spawn / warm")
    for ranks in chosen.ranks:
        warm = measure_ours(ranks, chosen.tests, isolate=False)
        isolated = measure_ours(ranks, chosen.tests, isolate=True)
        spawn = measure_spawn(ranks, chosen.spawns)
        row = [warm[0], *(statistics.median(one) for one in (warm[1:], isolated[1:], spawn))]
        cells = "  ".join(f"{1000 * value:8.1f}" for value in row)
        print(f"{ranks:>5}  {cells}  {row[3] / row[1]:8.0f} x", flush=True)


if __name__ == "__main__":
    main()
