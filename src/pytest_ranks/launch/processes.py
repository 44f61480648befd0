"""Linux processes: who dies with whom, who descends from whom, and how one ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

STACKS_SIGNAL = signal.SIGRTMAX - 3  # trainers and Slurm use SIGUSR1; nobody uses this one


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process, by a signal, when its parent's thread ends.

    The parent's *thread* counts, so this is only for children of a thread that waits for them.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request
        os._exit(1)


def become_subreaper() -> None:
    """Have orphaned descendants of this process become its children."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_in_batches() -> None:
    """Have this process, once it is awake, not interrupt another one that is at work.

    Ranks share cores and wake each other all the time. With SCHED_BATCH (sched(7)) a test on more
    ranks than cores takes a tenth less; where somebody chose another policy, that one stays.
    """
    with contextlib.suppress(OSError, AttributeError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def native_threads() -> int:
    """Return the number of native threads of this process; `threading` sees Python's only."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 2  # unknown: be careful


def children(pid: int) -> list[int]:
    """Return the living children of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Return all living descendants of a process, children first."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = [child for child in children(waiting.pop()) if child not in found]
        found += below
        waiting += below
    return found


def kill_tree(pid: int, pidfd: int) -> None:
    """Kill a recorded process and everything below it, wherever that has put itself.

    Janitors are left to end by themselves.

    Args:
        pid: the process, not yet reaped or protected by its pidfd.
        pidfd: its descriptor, so that no later process of that number is hit.
    """
    if has_ended(pidfd):
        return
    below = descendants(pid)
    send_signal(pidfd, signal.SIGKILL)
    for other in below:
        if not is_janitor(other):
            with contextlib.suppress(OSError):
                os.kill(other, signal.SIGKILL)


# They end by themselves when those are gone for whom they work, and remove what those left in
# /dev/shm: multiprocessing's resource tracker, and the one of torch's file_system sharing.
_JANITORS = (b"multiprocessing.resource_tracker", b"torch_shm_manager")


def is_janitor(pid: int) -> bool:
    """Return whether a process is there to clean up after others."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in _JANITORS)


def has_ended(pidfd: int, *, timeout: float = 0) -> bool:
    """Return whether the process of this descriptor ends within so many seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(int(timeout * 1000)))


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal to the process of this descriptor, if it still lives."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def describe_end(status: int | None) -> str:
    """Return how a process ended: `died of SIGKILL`, `exited with code 3`."""
    if status is None:
        return "ended, its exit status is unknown"
    if status < 0:
        try:
            return f"died of {signal.Signals(-status).name}"
        except ValueError:
            return f"died of signal {-status}"
    return f"exited with code {status}"


def read_tail(fd: int, limit: int = 8000) -> str:
    """Return the end of an open file's text without moving its position."""
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, limit, max(0, size - limit))
    except OSError:
        return ""
    text = data.decode(errors="replace")
    return text if size <= limit else f"[... {size - limit} bytes left out]\n{text}"


def is_running(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
