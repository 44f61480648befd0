"""Looks now and then at ranks at work, to end a run whose ranks wait for each other for ever."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytest_ranks.launch.forensics.collectives import Scene, find_stuck, is_asleep

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_ranks.launch.forensics.sight import Observer, Sight

# Seconds between the first looks; each after those comes later, since a look takes a rank up to
# 20 ms where it has issued thousands of collectives.
PROBE_SECONDS = 0.5
EARLY_LOOKS = 3
MOST_SECONDS = 4.0
# What the recorder does not see (send, recv, new_group, a store) has to stay as it is for longer:
# a large tensor may still be on its way.
UNSEEN_SECONDS = 3.0


class Probe:
    """Looks at the ranks of one run.

    Attributes:
        next_at: when to look (CLOCK_MONOTONIC).

    Args:
        observer: asks them.
        size: number of ranks.
    """

    def __init__(self, observer: Observer, size: int) -> None:
        self.next_at = time.monotonic() + PROBE_SECONDS
        self._observer = observer
        self._size = size
        self._seen: dict[int, Sight] = {}
        self._looks = 0
        self._began = time.time()
        self._stuck: list[int] = []
        self._stuck_since = 0.0

    def put_off(self) -> None:
        """Look later: the ranks have not started."""
        self.next_at = time.monotonic() + PROBE_SECONDS

    def hurry(self) -> None:
        """Look soon: a rank has finished, so that others may wait in vain."""
        self._looks = 0
        self.next_at = min(self.next_at, time.monotonic() + PROBE_SECONDS)

    def look(
        self, finished: Collection[int], limit: float, *, elsewhere: bool | None = None
    ) -> str:
        """Return why ranks can never go on, nothing while that is not certain.

        Certain means: at a common moment each of them waited for the others, and none of them
        has run since the look before.

        Args:
            finished: ranks that are done.
            limit: when the run's deadline is (CLOCK_MONOTONIC). A wait that ends by itself before
                that, in a timeout of its own, may be what the test is about.
            elsewhere: whether ranks of the run that others watch have finished, None where there
                are no such ranks.

        Returns:
            `abandoned` where all that are left wait alike for some that have finished,
            `deadlock` where they wait for each other.
        """
        sights = self._observer.look(records=True)
        now = time.monotonic()
        asleep = {
            rank
            for rank, sight in sights.items()
            if rank not in finished and is_asleep(self._seen.get(rank), sight)
        }
        self._seen = sights
        scene = Scene(
            sights=sights,
            finished=frozenset(finished),
            asleep=frozenset(asleep),
            size=self._size,
        )
        left = self._size - len(finished)
        stuck = find_stuck(scene) if elsewhere is None else []
        if elsewhere and len(asleep) == left:  # nobody here sees what is missing there
            stuck = sorted(asleep)
        ends = time.time() + limit - now
        if any(self._may_time_out(sights[rank], ends) for rank in stuck):
            stuck = []
        self._plan(now, is_stuck=bool(stuck))
        if not self._is_certain(stuck, sights, now, elsewhere is not None):
            return ""
        waits = {
            (one.torch_call, one.waits_for[:1] and one.waits_for[0].what)
            for one in (sights[rank] for rank in stuck)
        }
        is_left = len(stuck) == left and len(waits) == 1 and (finished or elsewhere)
        return "abandoned" if is_left else "deadlock"

    def last(self) -> dict[int, Sight]:
        """Return what the ranks are doing before they are stopped."""
        return self._observer.look(records=True)

    def _plan(self, now: float, *, is_stuck: bool) -> None:
        self._looks += 1
        late = 0 if is_stuck else max(0, self._looks - EARLY_LOOKS)
        self.next_at = now + min(MOST_SECONDS, PROBE_SECONDS * 2**late)

    def _is_certain(
        self, stuck: list[int], sights: dict[int, Sight], now: float, is_part: bool
    ) -> bool:
        if stuck != self._stuck:
            self._stuck, self._stuck_since = stuck, now
        is_seen = not is_part and all(
            sights[rank].waits_for and not sights[rank].is_peer_to_peer for rank in stuck
        )
        return bool(stuck) and (is_seen or now - self._stuck_since >= UNSEEN_SECONDS)

    def _may_time_out(self, sight: Sight, ends: float) -> bool:
        """Return whether a wait has a timeout of its own that comes before the deadline."""
        if records := sight.waits_for:
            return any(record.created + record.timeout < ends for record in records)
        own = sight.arguments.get("timeout")
        group = sight.groups.get(str(sight.arguments.get("group"))) or sight.groups.get("0")
        seconds = own if own is not None else group.timeout if group is not None else None
        return seconds is None or self._began + seconds < ends
