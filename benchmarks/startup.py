"""What loading the plugin costs a session that has nothing to do with it.

Runs `pytest` over one empty test with and without the plugin, interleaved so that both meet the
same load on the machine, and prints the least and the middle time of each:

    python benchmarks/startup.py            # 40 runs of each
    python benchmarks/startup.py --runs 100

The budget is 15 ms of processor time over bare pytest (least against least).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BUDGET_MS = 15.0
BARE = ("-p", "no:ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One session: seconds of processor time (user and system) and seconds on the clock."""

    processor: float
    clock: float


def main() -> int:
    """Measure and print; the exit status says whether the budget holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="sessions of each sort")
    runs: int = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_empty.py").write_text("def test_empty(): pass\n")
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        measure(folder)  # writes the byte code that later runs read
        measure(folder, *BARE)
        pairs = []
        for number in range(runs):
            show_progress(number, runs)
            pairs.append((measure(folder, *BARE), measure(folder)))
    show_progress(runs, runs)
    return report(pairs)


def measure(folder: str, *arguments: str) -> Cost:
    """Run one session without the plugins that happen to be installed beside ours."""
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    # An installed package has its byte code; here the first run writes it, wherever sources lie.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ["PYTHONPYCACHEPREFIX"] = os.path.join(folder, "bytecode")
    plugin = () if arguments else ("-p", "pytest_ranks.plugin")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)
    clock = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(processor=processor, clock=clock)


def show_progress(done: int, runs: int) -> None:
    """Keep one line on the terminal up to date."""
    if sys.stderr.isatty():
        print(f"\r{done} of {runs} pairs", end="" if done < runs else "\n", file=sys.stderr)


def report(pairs: list[tuple[Cost, Cost]]) -> int:
    """Print the table and judge the budget."""
    print(f"{len(pairs)} interleaved pairs, milliseconds; one empty test")
    print(f"{'':<24}{'bare':>8}{'plugin':>8}{'cost':>8}")
    costs = {}
    for kind in ("processor", "clock"):
        bare = [getattr(pair[0], kind) * 1000 for pair in pairs]
        with_plugin = [getattr(pair[1], kind) * 1000 for pair in pairs]
        for name, pick in (("least", min), ("median", statistics.median)):
            low, high = pick(bare), pick(with_plugin)
            costs[kind, name] = high - low
            print(f"{kind + ' ' + name:<24}{low:>8.1f}{high:>8.1f}{high - low:>8.1f}")
    cost = costs["processor", "least"]
    print(f"budget {BUDGET_MS:g} ms: {'kept' if cost <= BUDGET_MS else 'broken'} ({cost:.1f} ms)")
    return int(cost > BUDGET_MS)


if __name__ == "__main__":
    sys.exit(main())
