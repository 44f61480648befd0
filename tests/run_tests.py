"""Run everything: all tests, then the performance comparisons of `benchmarks/` in a short form.

    python tests/run_tests.py [--only tests packing launch] [--list] [-- arguments of pytest]

Tests come from `tests/`, on both cores of a small machine, those for GPUs included: where there is none they
are skipped with the reason. The comparisons print tables and hold nothing: a slow machine is no failure, a
comparison that breaks is. The exit status is 0 if every part ended well, 1 if one did not, 2 if
something is not installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "hypothesis": "hypothesis",
    "pytest": "pytest",
    "torch": "torch",
    "transformers": "transformers",
    "typer": "typer",
    "xdist": "pytest-xdist",
}
"""What test files import, and what it is called where one installs it."""

SKIPPED_WITHOUT = {
    "accelerate": "accelerate",
    "expecttest": "expecttest",
    "lightning": "lightning",
    "pytest_cov": "pytest-cov",
    "pytest_rerunfailures": "pytest-rerunfailures",
    "pytest_timeout": "pytest-timeout",
}
"""What some tests are skipped without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command, and what it is for."""

    name: str
    title: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a part ended: its exit status, and the seconds that it took."""

    part: Part
    status: int
    seconds: float


def all_parts(pytest_arguments: Sequence[str]) -> list[Part]:
    """Return every part in its order."""
    benchmarks = ROOT / "benchmarks"
    return [
        Part(
            name="tests",
            title="all tests",
            command=(
                sys.executable,
                "-m",
                "pytest",
                "-n",
                "2",
                "--dist",
                "loadfile",
                *pytest_arguments,
            ),
        ),
        Part(
            name="packing",
            title="packing: how few micro-batches, and how fast (short: --samples 1024 --ranks 1 8)",
            command=(
                *(sys.executable, str(benchmarks / "packing.py")),
                *("--samples", "1024", "--ranks", "1", "8"),
            ),
        ),
        Part(
            name="launch",
            title="launch: a test on two ranks, ours and others (short: --quick --rounds 1)",
            command=(
                *(sys.executable, str(benchmarks / "launch.py")),
                *("--quick", "--rounds", "1", "--ranks", "2"),
            ),
        ),
    ]


def missing(needed: dict[str, str]) -> list[str]:
    """Return what to install: the packages whose modules are not there."""
    return [package for module, package in sorted(needed.items()) if find_spec(module) is None]


def how_to_install(packages: Sequence[str]) -> str:
    """Return what is missing, and the command that installs all that is needed."""
    return (
        f"needs {', '.join(packages)}, found none. Install with\n"
        f"  {sys.executable} -m pip install -e '{ROOT}[trainer]' {' '.join(packages)}\n"
        "or let tox make an environment:\n"
        "  python -m pip install tox && tox -e test"
    )


def run(parts: Sequence[Part]) -> list[Result]:
    """Run the parts one after the other, also after one that failed."""
    # This tree's package, also where another checkout is installed.
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    results = []
    for part in parts:
        print(f"\n==== {part.title}\n", flush=True)
        started = time.monotonic()
        done = subprocess.run(
            part.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False
        )
        seconds = time.monotonic() - started
        results.append(Result(part=part, status=done.returncode, seconds=seconds))
    return results


def summary(results: Sequence[Result]) -> str:
    """Return a line a part, and one for all."""
    lines = ["", "==== summary"]
    for result in results:
        ended = "passed" if result.status == 0 else f"FAILED (exit status {result.status})"
        lines.append(f"{result.part.name:8} {ended:24} {result.seconds:7.1f} s")
    failed = [result.part.name for result in results if result.status]
    lines.append(
        f"FAILED: {', '.join(failed)}" if failed else f"PASSED: {len(results)} of {len(results)}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    names = [part.name for part in all_parts(())]
    parser = argparse.ArgumentParser(
        prog="run_tests.py",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=names, help="run these parts alone")
    parser.add_argument("--list", action="store_true", help="show the commands and run none")
    parser.add_argument("pytest_arguments", nargs="*", metavar="-- ...", help="arguments of pytest")
    chosen = parser.parse_args(arguments)
    parts = [
        part
        for part in all_parts(chosen.pytest_arguments)
        if chosen.only is None or part.name in chosen.only
    ]
    if chosen.list:
        print("\n".join(f"{part.name}: {' '.join(part.command)}" for part in parts))
        return 0
    packages = missing(NEEDED)
    if packages:
        print(how_to_install(packages), file=sys.stderr)
        return 2
    results = run(parts)
    print(summary(results))
    absent = missing(SKIPPED_WITHOUT)
    if absent and any(part.name == "tests" for part in parts):
        print(f"tests that need {', '.join(absent)} were skipped: not installed")
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
