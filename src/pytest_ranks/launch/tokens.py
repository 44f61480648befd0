"""CPU tokens that xdist's workers share: one for each rank at work, so that ranks do not crowd.

Without them `-n 8` with tests on 4 ranks has 32 processes compete, and deadlines fire for no fault
of a test. A token is a lock on a file in a folder that all workers of a run see; the system takes
it back when a worker dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import _compat
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_ranks.launch.spec import RankSpec

LONG_SECONDS = 30.0  # after which a wait is worth a line
POLL_SECONDS = 0.005  # only the first in the queue polls; the others sleep in the kernel


class CpuTokens:
    """The tokens of one run, seen by one worker.

    Whoever wants tokens waits at the gate, and only who is through the gate gathers them: a test
    with many ranks is not starved by many tests with few, and nobody waits for tokens that are
    held by somebody who waits.

    Args:
        folder: where the locks are, the same for all workers of a run.
        count: how many tokens there are.
        who: names this worker.
        say: takes the line about a long wait.
        long: seconds after which a wait is long.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        who: str,
        say: Callable[[str], None],
        long: float = LONG_SECONDS,
    ) -> None:
        self._folder = folder
        self._count = count
        self._who = who
        self._say = say
        self._long = long
        self._files: list[int] = []

    @contextlib.contextmanager
    def held(self, wanted: int, what: str) -> Generator[None]:
        """Hold tokens, at most all that there are, waiting for them as long as it takes.

        Args:
            wanted: one for each rank.
            what: the test, for those who wait.
        """
        self._open()
        taken: list[int] = []
        timer = threading.Timer(self._long, self._complain, (min(wanted, self._count), what))
        timer.daemon = True
        gate = self._files[-1]
        try:
            if not _lock(gate):
                timer.start()
                fcntl.flock(gate, fcntl.LOCK_EX)
            try:
                self._gather(taken, min(wanted, self._count), what, timer)
            finally:
                timer.cancel()
                fcntl.flock(gate, fcntl.LOCK_UN)
            yield
        finally:
            for fd in taken:
                fcntl.flock(fd, fcntl.LOCK_UN)  # not by closing: a child may have it open

    def _gather(self, taken: list[int], wanted: int, what: str, timer: threading.Timer) -> None:
        while True:
            for fd in self._files[:-1]:
                if len(taken) < wanted and fd not in taken and _lock(fd):
                    taken.append(fd)
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{self._who} {what}".encode(), 0)
            if len(taken) == wanted:
                return
            if timer.ident is None:
                timer.start()
            time.sleep(POLL_SECONDS)

    def _complain(self, wanted: int, what: str) -> None:
        holders = [os.pread(fd, 1000, 0).decode(errors="replace") for fd in self._files[:-1]]
        others = sorted({one for one in holders if one and not one.startswith(f"{self._who} ")})
        self._say(
            f"[{self._who}] {what} has waited {self._long:g} s for {wanted} of {self._count} CPU "
            f"tokens (--ranks-cpus). They were taken last by: {'; '.join(others) or 'nobody'}"
        )

    def _open(self) -> None:
        if not self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            names = [*(f"token{number}" for number in range(self._count)), "gate"]
            self._files = [
                os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in names
            ]


class Turns:
    """Has the items of this worker wait for their turn: a plugin.

    The wait is outside of all that counts time: the item's deadline, its duration, and the clock
    of pytest-timeout.

    Args:
        tokens: what they wait for.
        needed: how many an item needs.
    """

    def __init__(self, tokens: CpuTokens, needed: Callable[[pytest.Item], int]) -> None:
        self._tokens = tokens
        self._needed = needed

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hold the item's tokens while it runs."""
        wanted = self._needed(item)
        if wanted == 0:
            return (yield)
        with self._tokens.held(wanted, item.nodeid):
            return (yield)


def share(config: pytest.Config, needed: Callable[[pytest.Item], int]) -> None:
    """Have the items of an xdist worker take turns with those of the other workers."""
    worker = getattr(config, "workerinput", None)
    if worker is None or config.pluginmanager.has_plugin("ranks-turns"):
        return
    folder = _compat.base_temp(config).parent / f"ranks-cpus-{worker['testrunuid']}"
    count = settings(config).cpus or len(os.sched_getaffinity(0))
    tokens = CpuTokens(folder, count, who=worker["workerid"], say=_say)
    config.pluginmanager.register(Turns(tokens, needed), "ranks-turns")


def needed(spec: RankSpec) -> int:
    """Return how many CPUs an item keeps busy: one for each process, none of those with devices."""
    if spec.backend != "gloo":
        return 0
    return spec.world_size if spec.fidelity == "gloo" else 1


def _lock(fd: int) -> bool:
    """Return whether a lock was free, and take it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say(text: str) -> None:
    if sys.__stderr__ is not None:  # a worker's goes to the terminal
        sys.__stderr__.write(f"\n{text}\n")
        sys.__stderr__.flush()
