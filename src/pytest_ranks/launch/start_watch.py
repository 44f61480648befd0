"""Looks at the processes that the start of a run depends on: one that is stopped never starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.processes import children

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

START_SECONDS = 300.0  # for fork, imports, collection and rendezvous, before a test's deadline runs
LOOK_SECONDS = 1.0
# A tracer stops a process for moments; one that has not run for so long is held.
STOPPED_SECONDS = 3.0

_STATES = {"T": "by a signal such as SIGSTOP", "t": "by a debugger that is attached to it"}


class StartOverdue(UnavailableError):
    """The process that ranks are forked from has not come to it in time."""


class StartWatch:
    """Watches, while a run waits for its start, whether a process that it needs is stopped.

    Args:
        root: pid of the guardian.
        ranks: returns pid -> number of the rank processes that live, all those of the zygote.
    """

    def __init__(self, root: int, ranks: Callable[[], Mapping[int, int]]) -> None:
        self._root = root
        self._ranks = ranks
        self._since: dict[int, tuple[str, float]] = {}  # pid -> how it stands, and since when

    def look(self, awaited: Mapping[int, int]) -> None:
        """Look once.

        Args:
            awaited: pid -> number of the ranks that are to start.

        Raises:
            UnavailableError: a process is stopped and has not run for a while.
        """
        now = time.monotonic()
        seen = {}
        for pid, name in self._processes(awaited).items():
            standing = _standing(pid)
            if standing[:1] in _STATES:
                before, since = self._since.get(pid, ("", now))
                seen[pid] = standing, since if before == standing else now
                if now - seen[pid][1] >= STOPPED_SECONDS:
                    raise UnavailableError(_describe(name, pid, standing[0]))
        self._since = seen

    def _processes(self, awaited: Mapping[int, int]) -> dict[int, str]:
        origin = "the process that ranks are forked from"
        found = {self._root: f"the parent of {origin}"}
        ranks = self._ranks()
        for zygote in children(self._root):
            found[zygote] = origin
            helpers = [pid for pid in children(zygote) if pid not in ranks]
            found |= dict.fromkeys(helpers, "a process that ranks need to find each other")
        return found | {pid: f"rank {rank}" for pid, rank in awaited.items()}


def _standing(pid: int) -> str:
    """Return the state of a process, and what changes as soon as it runs; nothing where it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    state, faults, times = fields[0], fields[7:11], fields[11:13]  # proc_pid_stat(5)
    return " ".join((state, *faults, *times))


def _describe(name: str, pid: int, state: str) -> str:
    return (
        f"{name} (pid {pid}) was stopped {_STATES[state]} and has not run for "
        f"{STOPPED_SECONDS:g} s; by whom is unknown. So that this does not wait for ever, it is "
        "ended now; the next test on ranks starts a new one. To keep it, continue it sooner: "
        f"kill -CONT {pid}"
    )
