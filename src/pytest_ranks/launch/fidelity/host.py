"""The process that plays all ranks of a test: what it joins, and what surrounds the test there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch import group
from pytest_ranks.launch.fidelity import refusals
from pytest_ranks.launch.rank_context import context_of, set_current

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.wire import World

_enforced: list[str] = []  # a process serves one fidelity for its whole life


class Host:
    """Stands in for the process group of a rank where one process plays several."""

    def __init__(self) -> None:
        self._kept = 0
        self._was_kept = False
        self._world: World
        self._group = group.ProcessGroup()

    def join(self, world: World) -> None:
        """Join the pretended group of one run, unless a kept one is there."""
        if not _enforced:
            _enforced.append(world.fidelity)
            refusals.enforce(world.fidelity)
            group.initialise_by(lambda: _AGAIN[self._world.fidelity](self._world))
        self._world = world
        self._was_kept = self._kept == world.world_size
        if not self._was_kept:
            self._group = group.ProcessGroup()
            if world.init or world.fidelity == "threads":  # which has to have its threads
                _JOINS[world.fidelity](world)
        self._kept = world.world_size if world.keep_group else 0

    def begin(self, world: World) -> tuple[int, ...]:
        """Tell the test its place; return the threads that play ranks, where threads do."""
        if world.fidelity == "threads":
            from pytest_ranks.launch.fidelity import threads

            return threads.begin(world, is_kept=self._was_kept)
        set_current(context_of(world, self._group))
        return ()


def around(world: World) -> contextlib.AbstractContextManager[Any]:
    """Return the context that the fixtures and the body of a test run in."""
    return _AROUND[world.fidelity](world)


def _join_fake(world: World) -> None:
    from pytest_ranks.launch.fidelity import fake

    fake.join(world)


def _around_fake(_: World) -> contextlib.AbstractContextManager[Any]:
    from pytest_ranks.launch.fidelity import fake

    return fake.around()


def _join_local_tensor(world: World) -> None:
    from pytest_ranks.launch.fidelity import local_tensor

    local_tensor.join(world)


def _around_local_tensor(world: World) -> contextlib.AbstractContextManager[Any]:
    from pytest_ranks.launch.fidelity import local_tensor

    return local_tensor.around(world)


def _join_threads(world: World) -> None:
    from pytest_ranks.launch.fidelity import threads

    threads.join(world)


def _join_threads_again(_: World) -> None:
    from pytest_ranks.launch.fidelity import threads

    threads.initialise_again()


def _around_threads(_: World) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()  # each thread has its own


_JOINS: dict[str, Callable[[World], None]] = {
    "fake": _join_fake,
    "local_tensor": _join_local_tensor,
    "threads": _join_threads,
}
# What a plain `init_process_group()` of a test does.
_AGAIN: dict[str, Callable[[World], None]] = {**_JOINS, "threads": _join_threads_again}
_AROUND: dict[str, Callable[[World], contextlib.AbstractContextManager[Any]]] = {
    "fake": _around_fake,
    "local_tensor": _around_local_tensor,
    "threads": _around_threads,
}
