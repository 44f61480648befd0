"""Ranks wait for each other at the start of a run, and the controller sees when they did."""

from __future__ import annotations

import os
import subprocess
import sys

from pytest_ranks.launch.startline import StartLine

RANK = """
import sys, time
from pytest_ranks.launch.startline import StartLine
line = StartLine(int(sys.argv[1]), 3, place=int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    line.cross()
    print(time.monotonic(), flush=True)
"""


def start(memory, rank, times=1):
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(memory), str(rank), str(times)],
        pass_fds=(memory,),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_no_rank_crosses_before_the_last_arrives():
    line, memory = StartLine.create(3)
    try:
        early = [start(memory, rank) for rank in (0, 1)]
        assert line.all_arrived() is None
        late = start(memory, 2)
        crossed = [float(one.communicate()[0]) for one in (*early, late)]
        last = line.all_arrived()
        assert last is not None
        assert min(crossed) >= last
        line.clear()
        assert line.all_arrived() is None
    finally:
        os.close(memory)
        line.close()


def test_a_line_is_crossed_again_and_again():
    line, memory = StartLine.create(3)
    try:
        ranks = [start(memory, rank, times=50) for rank in range(3)]
        crossed = [list(map(float, one.communicate()[0].split())) for one in ranks]
    finally:
        os.close(memory)
        line.close()
    rounds = list(zip(*crossed, strict=True))
    assert len(rounds) == 50
    # who crossed for the n-th time did so after all had arrived for it, having crossed before
    assert all(max(before) <= min(after) for before, after in zip(rounds, rounds[2:], strict=False))


def test_fewer_ranks_meet_at_the_same_line_and_all_of_them_again():
    line, memory = StartLine.create(3)
    try:
        for size in (2, 3, 1, 3):
            line.resize(size)
            line.clear()
            assert line.all_arrived() is None
            ranks = [start(memory, rank) for rank in range(size)]
            crossed = [float(one.communicate(timeout=60)[0]) for one in ranks]
            last = line.all_arrived()
            assert last is not None
            assert min(crossed) >= last
    finally:
        os.close(memory)
        line.close()
