"""Ranks with a device each: fresh processes, started ahead of need, on leased devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.pool import Ranks
from pytest_ranks.launch.pools import Pool, PoolKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.devices import DeviceDesk
    from pytest_ranks.launch.link import ZygoteLink


class DeviceRanks:
    """The ranks of one session that have devices.

    A process that has used a device serves no other test: its context holds memory, and what a
    test does to it survives the test. To start one takes seconds, so the next set is started
    while a test is at work; it touches no device before its own test begins.

    Args:
        desk: leases the devices.
    """

    def __init__(self, desk: DeviceDesk) -> None:
        self._desk = desk
        self._ahead: dict[int, Pool] = {}

    def take(
        self,
        link: ZygoteLink,
        backend: str,
        world_size: int,
        *,
        owner: str,
        discard: Callable[[Pool], None],
    ) -> Pool:
        """Return fresh ranks, with a device leased for each.

        Args:
            link: to the zygote.
            backend: the process group's.
            world_size: how many ranks.
            owner: the item's node id.
            discard: ends ranks that died before they were needed.

        Raises:
            DevicesUnavailable: there are too few devices, or others kept them too long.
            UnavailableError: the zygote ended.
        """
        self.warm(link, world_size)  # it starts while we wait for devices
        devices = self._desk.check_out(backend, world_size, owner=owner)
        try:
            pool = self._ahead.pop(world_size)
            if not pool.ranks.is_alive():
                discard(pool)
                pool = _start(link, world_size)
        except BaseException:
            devices.lease.release()  # or this process would wait for itself
            raise
        pool.devices = devices
        return pool

    def warm(self, link: ZygoteLink, world_size: int) -> None:
        """Start ranks for a later test, unless some are there."""
        if world_size not in self._ahead:
            self._ahead[world_size] = _start(link, world_size)

    def check_in(self, pool: Pool) -> str | None:
        """Give the devices of ranks back that have ended; return who still holds their memory."""
        devices, pool.devices = pool.devices, None
        return None if devices is None else self._desk.check_in(devices)

    def drain(self, retire: Callable[[Pool], None]) -> None:
        """Have ranks leave that nobody needed."""
        while self._ahead:
            retire(self._ahead.popitem()[1])


def _start(link: ZygoteLink, world_size: int) -> Pool:
    ranks = Ranks(link, world_size, fresh=True)
    shape = PoolKey(world_size=world_size, backend="")  # any: they are not kept for another test
    return Pool(key=shape, ranks=ranks, home_port=link.open_store())
