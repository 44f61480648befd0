"""The reference's command line, for real: alone, under torchrun, on two nodes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 240
"""Seconds that a command may take on a machine that has much else to do."""


def start(*arguments, launcher=(), folder):
    """Start the command line; what it says goes to a file, so that nobody has to read it in time."""
    with (folder / f"said-{time.monotonic_ns()}").open("w+") as said:
        started = subprocess.Popen(
            [sys.executable, *launcher, "-m", "pytest_ranks.reference", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started.said = Path(said.name)
    return started


def torchrun(ranks):
    """Return the launcher of so many ranks on one node."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")


def one_of(nodes, *, ranks, port, job):
    """Return the launcher of each of several nodes, which meet at a store that the test holds."""
    return (
        *("-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={job}"),
        "--rdzv-conf=is_host=false",
    )


def finish(started):
    """Wait for a command; return its status and all that it said."""
    try:
        status = started.wait(PATIENCE)
    finally:
        end(started)
    return status, started.said.read_text()


def wait_for(started, is_there):
    """Wait until something is there, for as long as the command runs."""
    deadline = time.monotonic() + PATIENCE
    while not is_there():
        assert started.poll() is None, started.said.read_text()
        assert time.monotonic() < deadline, started.said.read_text()
        time.sleep(0.01)


def children(pid):
    """Return the processes that a process started."""
    try:
        tasks = [*Path(f"/proc/{pid}/task").iterdir()]
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def end(started):
    """Kill a command and its ranks at once (kill -9): none of them can do anything about it."""
    family = [started.pid, *children(started.pid)]
    for pid in family if started.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    started.wait(PATIENCE)
