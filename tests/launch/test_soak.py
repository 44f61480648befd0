"""Many warm tests in a row: nothing grows, and ranks that are worn are replaced on the way."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    if not SOAK.exists():
        pytest.skip(f"{SOAK.name} is not part of this source distribution")
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_hundred_warm_tests_leave_nothing_behind(soak):
    rows = soak.run(200, 2, 50)
    assert [row["tests"] for row in rows] == [50, 100, 150, 200]
    assert len(soak.lasting(rows, "kib")) >= 5  # controller, zygote, stores, two ranks
    # what a plain test leaves in a process, its report above all, is some kilobytes
    assert soak.what_grew(rows, kib=6 * 1024, descriptors=12, threads=24) == []


def test_worn_ranks_are_replaced_and_none_is_left_over(soak):
    rows = soak.run(60, 2, 20, "-o", "ranks_max_uses=7")
    first, last = ({one["pid"] for one in row["processes"]} for row in (rows[0], rows[-1]))
    assert len(first & last) >= 3  # controller, zygote, stores
    assert len(last - first) >= 2  # other ranks
    assert soak.what_grew(rows, kib=6 * 1024, descriptors=12, threads=24) == []


def test_growth_is_seen(soak):
    def row(kib, threads, *more):
        processes = [{"pid": 1, "kib": kib, "descriptors": 5, "threads": threads}, *more]
        return {"processes": processes}

    rows = [row(100, 1), row(300, 9)]
    assert soak.what_grew(rows, kib=100, descriptors=0, threads=4) == [
        "process 1: kib 100 -> 300",
        "process 1: threads 1 -> 9",
    ]
    many = [{"pid": pid, "kib": 0, "descriptors": 0, "threads": 0} for pid in range(2, 8)]
    assert soak.what_grew([row(0, 0), row(0, 0, *many)], kib=0, descriptors=0, threads=0) == [
        "processes: [1, 7]"
    ]
