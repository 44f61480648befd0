"""Ranks that are threads of one process: real data and real branches, in a few milliseconds."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.fidelity import floor, own_random
from pytest_ranks.launch.group import ProcessGroup, original_init
from pytest_ranks.launch.rank_context import context_of, set_current
from pytest_ranks.launch.seeding import SEED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.wire import World

# Variables belong to a process: what differs between ranks cannot be in one.
_NOT_OF_A_THREAD = (
    "RANK",
    "LOCAL_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
GROUP_SECONDS = 300.0  # where a run has no deadline of its own
END_SECONDS = 1.0


class _RankThread(threading.Thread):
    """A thread that plays one rank and does what it is given, in order."""

    def __init__(self, rank: int) -> None:
        super().__init__(name=f"rank {rank}", daemon=True)
        self._rank = rank
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def give(self, work: Callable[[], None] | None) -> None:
        """Give it work, or None to have it end."""
        self._work.put(work)

    def run(self) -> None:
        """Do the work; what it raises is its own affair."""
        floor.here.rank = self._rank
        with own_random.begin(SEED):
            while (work := self._work.get()) is not None:
                work()


class Crew:
    """The threads that play the ranks of one world.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        import torch.distributed as dist

        self.floor = floor.Floor(size)
        self.seconds = GROUP_SECONDS
        self._store = dist.HashStore()  # type: ignore[attr-defined]
        self._initialised = [0] * size
        self._threads = [_RankThread(rank) for rank in range(size)]
        for thread in self._threads:
            thread.start()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._threads)

    @property
    def threads(self) -> tuple[int, ...]:
        """The thread of each rank, as faulthandler names it."""
        return tuple(thread.ident or 0 for thread in self._threads)

    def renew_floor(self) -> None:
        """Forget who waits, before the next run of the same threads."""
        self.floor = floor.Floor(self.size)

    def initialise(self, rank: int) -> None:
        """Initialise the default group of a rank, on its thread."""
        import torch.distributed as dist

        self._initialised[rank] += 1
        prefix = f"initialisation{self._initialised[rank]}"
        original_init()(
            "threaded",
            store=dist.PrefixStore(prefix, self._store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.seconds),
        )

    def each(self, function: Callable[[int], Any]) -> list[Any]:
        """Call a function on every rank at the same time; return what each returned.

        Raises:
            BaseException: the first that a rank raised; the others are let go.
        """
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []
        done: queue.SimpleQueue[None] = queue.SimpleQueue()

        def work(rank: int) -> None:
            floor.here.floor = self.floor
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.floor.end()
            finally:
                done.put(None)

        for rank, thread in enumerate(self._threads):
            thread.give(functools.partial(work, rank))
        for _ in self._threads:
            done.get()
        if errors:
            raise errors[0]
        return results

    def end(self) -> None:
        """Have the threads drop their groups and end."""
        self.floor.end()
        for thread in self._threads:
            thread.give(_leave_groups)
            thread.give(None)
        for thread in self._threads:
            thread.join(END_SECONDS)


_crew: list[Crew] = []  # of this process, none before its first run
_installed: list[bool] = []


def crew() -> Crew:
    """Return the threads that play the ranks of the current run."""
    return _crew[0]


def join(world: World) -> None:
    """Have one thread a rank, and initialise a default group that they share."""
    if not _installed:
        floor.install()
        own_random.install()
        _installed.append(True)
    for name in _NOT_OF_A_THREAD:
        os.environ.pop(name, None)
    if _crew:
        _crew.pop().end()
    ours = Crew(world.world_size)
    _crew.append(ours)
    ours.seconds = world.rendezvous.seconds if world.rendezvous is not None else GROUP_SECONDS
    if world.init:
        ours.each(ours.initialise)


def begin(world: World, *, is_kept: bool) -> tuple[int, ...]:
    """Tell each thread its place; return the threads, by rank."""
    ours = crew()
    if is_kept:
        ours.renew_floor()
    for rank, thread in enumerate(ours.threads):
        place = replace(world, rank=rank)
        context = context_of(place, ProcessGroup())
        set_current(context, thread=thread)
    return ours.threads


def initialise_again() -> None:
    """Do what a plain `init_process_group()` on a thread does: put a new group in the old one's place.

    Every rank has to do it, as everywhere.
    """
    _leave_groups()
    crew().initialise(floor.here.rank)


def _leave_groups() -> None:
    import torch.distributed as dist

    with contextlib.suppress(Exception):
        dist.destroy_process_group()
