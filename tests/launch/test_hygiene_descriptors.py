"""Which descriptors a rank finds open and closed, in a process of its own where numbers are known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BEGIN = """
import os, socket
from pytest_ranks.launch.hygiene.descriptors import Descriptors
for number in (40, 41, 42):
    os.dup2(0, number)
kept = socket.socket()
state = Descriptors()
inode = lambda one: os.fstat(one.fileno()).st_ino
"""
LOSSES = {
    "none": ("", []),
    "the lowest number that is free": ("os.close(0)", [0]),
    "one above it": ("os.close(41)", [41]),
    "several": ("os.close(0); os.close(40); os.close(42)", [0, 40, 42]),
    "one, with a file of the test opened after": ("os.close(41); os.open('/', os.O_RDONLY)", [41]),
    "one, replaced by a file of the test": ("os.close(0); os.open('/', os.O_RDONLY)", []),
}


def run(body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + body],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", LOSSES)
def test_what_is_closed_is_told_once(case):
    act, lost = LOSSES[case]
    told = [f"descriptor {number}, which it did not open, is closed" for number in lost]
    body = f"{act}\nstate.read()\nprint(sorted(state.lost()))\nstate.read()\nprint(state.lost())"
    assert run(body) == f"{sorted(told)}\n[]\n"


def test_it_knows_the_sockets_that_were_open_at_the_last_look():
    body = """
made = socket.socket()
state.read()
print(state.sockets == {inode(kept), inode(made)})
made.close()
state.read()
print(state.sockets == {inode(kept)})
"""
    assert run(body) == "True\nTrue\n"


SHOW = "import os; {}; run_in_batches(); print(os.sched_getscheduler(0))"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pass", os.SCHED_BATCH),
        ("os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))", os.SCHED_IDLE),
    ],
)
def test_a_rank_runs_in_batches_unless_somebody_chose_otherwise(before, after):
    body = "from pytest_ranks.launch.processes import run_in_batches\n" + SHOW.format(before)
    assert run(body) == f"{after}\n"
