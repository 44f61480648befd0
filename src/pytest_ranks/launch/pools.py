"""Pools of rank processes, kept warm between tests, keyed by their shape."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_ranks.launch.link import ZygoteLink
from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.scopes import KEPT_GROUP

if TYPE_CHECKING:
    from pytest_ranks.launch.devices import DeviceSet

# Idle ranks cost 6 to 25 MiB each; twice the ranks of the widest test by default.
MOST_IDLE_RANKS = 128
# Ranks that are there save a fork of about 10 ms each; but a test that fails ends them all.
MOST_TIMES_TOO_MANY = 4
LEAVE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolKey:
    """The shape of a pool.

    Attributes:
        world_size: number of rank processes.
        backend: of their process group.
        scope: which fixtures live on the ranks between tests, None where none does. Tests that
            share such fixtures share a pool, and its process group, with nobody else.
        fidelity: how real the ranks are, with the name of a simulated device.
    """

    world_size: int
    backend: str
    scope: str | None = None
    fidelity: str = "gloo"

    @property
    def has_fixtures(self) -> bool:
        """Whether fixtures live on the ranks between tests."""
        return self.scope is not None and not self.scope.startswith(KEPT_GROUP)


@dataclass(slots=True)
class Pool:
    """Ranks with the store that they keep their connections to.

    Attributes:
        key: their shape.
        ranks: the processes.
        home_port: of the store.
        last_node_id: of the item that ran there last.
        group_is_clean: whether the next test may use the process group, where it is kept.
        replaces: what became of the ranks that were to serve in the place of these.
    """

    key: PoolKey
    ranks: Ranks
    home_port: int
    last_node_id: str = ""
    devices: DeviceSet | None = None
    group_is_clean: bool = True
    replaces: str = ""


MakeRanks = Callable[[ZygoteLink, int], Ranks]


class Pools:
    """All pools of one session.

    Args:
        link: to the zygote.
        make_ranks: forks ranks, so many.
        max_uses: runs after which ranks are replaced.
    """

    def __init__(self, link: ZygoteLink, make_ranks: MakeRanks = Ranks, *, max_uses: int) -> None:
        self._max_uses = max_uses
        self._link = link
        self._make_ranks = make_ranks
        self._idle: dict[PoolKey, Pool] = {}  # oldest first
        self._leaving: list[tuple[float, Ranks]] = []
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """Return a number that was never used in this session."""
        return next(self._numbers)

    def take(self, key: PoolKey, *, fresh: bool = False) -> Pool:
        """Return ranks of this shape, or of a wider one that waits, warm ones if there are any."""
        self._sweep()
        pool = None if fresh else self._idle.pop(self._fitting(key), None)
        replaces = ""
        if pool is not None and not pool.ranks.is_alive():
            ends = ", ".join(pool.ranks.ends())
            replaces = f"the ranks that last ran {pool.last_node_id} ended while idle: {ends}"
            self._end(pool)
            pool = None
        if pool is None:
            pool = self._start(key)
            pool.replaces = replaces
        pool.ranks.select(key.world_size)
        return pool

    def _fitting(self, key: PoolKey) -> PoolKey:
        """Return the shape of the idle pool to take: this one, or the least of those around it."""
        if key in self._idle or key.scope is not None or self._make_ranks is not Ranks:
            return key
        most = key.world_size * MOST_TIMES_TOO_MANY
        sizes = [
            one.world_size for one in self._idle if replace(one, world_size=key.world_size) == key
        ]
        fitting = [size for size in sizes if key.world_size < size <= most]
        return replace(key, world_size=min(fitting, default=key.world_size))

    def replace(self, key: PoolKey) -> None:
        """Start ranks of this shape, which are ready when the next test asks for them."""
        if key not in self._idle:
            self._idle[key] = self._start(key)
            self._trim()

    def is_worn(self, pool: Pool) -> bool:
        """Return whether ranks have served as often as they may."""
        return pool.ranks.runs >= self._max_uses

    def give_back(self, pool: Pool) -> None:
        """Keep ranks for the next test of their shape."""
        if self.is_worn(pool) or pool.key in self._idle:
            self.retire(pool)
            return
        self._idle[pool.key] = pool
        self._trim()

    def _start(self, key: PoolKey) -> Pool:
        ranks = self._make_ranks(self._link, key.world_size)
        return Pool(key=key, ranks=ranks, home_port=self._link.open_store())

    def _trim(self) -> None:
        """Retire the pools that waited longest, so that the idle ranks stay within their number."""
        while sum(one.world_size for one in self._idle) > MOST_IDLE_RANKS and len(self._idle) > 1:
            self.retire(self._idle.pop(next(iter(self._idle))))

    def retire(self, pool: Pool) -> None:
        """Have ranks leave, without waiting for them."""
        pool.ranks.leave()
        self._link.close_store(pool.home_port)
        self._leaving.append((time.monotonic() + LEAVE_SECONDS, pool.ranks))

    def kill(self, pool: Pool) -> None:
        """End ranks that are still at work, or dead."""
        self._end(pool)

    def idle(self) -> list[tuple[PoolKey, Pool]]:
        """Return the pools that wait for a test."""
        return list(self._idle.items())

    def close(self) -> None:
        """Have all ranks leave, and end those that do not."""
        for key in list(self._idle):
            self.retire(self._idle.pop(key))
        end = time.monotonic() + LEAVE_SECONDS
        while self._leaving and time.monotonic() < end:
            self._sweep()
            if self._leaving:
                time.sleep(0.002)
        for _, ranks in self._leaving:
            ranks.kill()
            ranks.forget()
        self._leaving.clear()

    def _sweep(self) -> None:
        still: list[tuple[float, Ranks]] = []
        for end, ranks in self._leaving:
            if not ranks.have_left():
                if time.monotonic() < end:
                    still.append((end, ranks))
                    continue
                ranks.kill()
            ranks.forget()
        self._leaving = still

    def _end(self, pool: Pool) -> None:
        pool.ranks.kill()
        pool.ranks.forget()
        self._link.close_store(pool.home_port)
