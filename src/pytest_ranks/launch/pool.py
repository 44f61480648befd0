"""Live rank processes of one shape, which do one run at a time."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.channel import ChannelClosed
from pytest_ranks.launch.forensics.probe import Probe
from pytest_ranks.launch.forensics.sight import Observer
from pytest_ranks.launch.processes import describe_end
from pytest_ranks.launch.run_watch import Peers, RunWatch
from pytest_ranks.launch.wire import Injected, Leave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_ranks.launch.forensics.sight import Sight
    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.outcome import ExpectedEnd
    from pytest_ranks.launch.rank_run import RankRun


class Ranks:
    """Rank processes that run one thing at a time, together."""

    def __init__(self, link: ZygoteLink, world_size: int, *, fresh: bool = False) -> None:
        self.world_size = world_size
        self.runs = 0
        self._link = link
        self._handles, self._line = link.fork(world_size, fresh=fresh)
        self._players = self._handles
        self._observer = Observer(self._players)

    def select(self, number: int) -> None:
        """Have the first so many of them do the next runs; the others stay asleep."""
        if number == len(self._players):
            return
        self._players = self._handles[:number]
        self._observer = Observer(self._players)
        self._line.resize(number)

    def are_fresh(self) -> bool:
        """Return whether each is a process of its own, and no fork of the zygote."""
        return all(handle.fresh for handle in self._handles)

    def native_threads(self) -> int:
        """Return how many threads the zygote had when the ranks were forked."""
        return max(handle.native_threads for handle in self._handles)

    def is_alive(self) -> bool:
        """Return whether all processes live."""
        try:
            self._link.pump()
        except UnavailableError:
            return False
        return not any(handle.ended() for handle in self._handles)

    def ends(self) -> list[str]:
        """Return how those processes ended that have."""
        ended = [handle for handle in self._handles if handle.ended()]
        for handle in ended:
            self._link.await_status(handle)
        return [f"rank {handle.rank} {describe_end(handle.status)}" for handle in ended]

    def run(
        self,
        request: Callable[[int], object],
        *,
        is_last: Callable[[Any], bool],
        is_failure: Callable[[Any], bool],
        timeout: float,
        starts: bool = True,
        peers: Peers | None = None,
        expected_ends: Mapping[int, ExpectedEnd] | None = None,
        on_injected: Callable[[Injected], None] = lambda _: None,
    ) -> tuple[list[RankRun], bool]:
        """Send one request to every rank and watch until each is done, dead or stopped.

        Args:
            request: makes the request of a rank.
            is_last: whether a message is a rank's last in this run.
            is_failure: whether a message means that the rank failed; peers get a short grace.
            timeout: seconds from the moment all ranks have started.
            starts: whether ranks say that they have; else the time runs from now.
            peers: ranks of the same run that are watched elsewhere.
            expected_ends: rank -> how its process has to end; the others then have their time.
            on_injected: called for each fault that a rank tells of.

        Returns:
            What each rank did, and whether the deadline passed.

        Raises:
            UnavailableError: the zygote ended.
        """
        self.runs += 1
        players = self._players
        for handle in players:
            os.ftruncate(handle.stacks, 0)
        self._line.clear()
        line = self._line if starts else None
        probe = Probe(self._observer, len(players))
        watch = RunWatch(self._link, players, line, probe, is_last, is_failure, timeout, peers)
        watch.expected_ends = expected_ends or {}
        watch.on_injected = on_injected
        try:
            for handle in players:
                with contextlib.suppress(ChannelClosed):  # its pidfd tells
                    handle.channel.send(request(handle.rank))
            timed_out = watch.until_over()
        except BaseException:
            self.kill()
            self._link.attendant.end(players)
            raise
        return watch.runs, timed_out

    def explain(self) -> list[str]:
        """Return what the reader of a failure has to know about the place of these ranks."""
        return []

    def look(self) -> dict[int, Sight]:
        """Return what the ranks of the last run have issued."""
        return self._observer.look(records=True)

    def leave(self) -> None:
        """Ask the processes to flush and leave; `forget` closes what does not."""
        for handle in self._handles:
            with contextlib.suppress(ChannelClosed, OSError):
                handle.channel.send(Leave())

    def have_left(self) -> bool:
        """Return whether all processes have ended."""
        return all(handle.ended() for handle in self._handles)

    def kill(self) -> None:
        """Kill the processes with everything below them, now."""
        with contextlib.suppress(UnavailableError, OSError):
            self._link.pump()
        for handle in self._handles:
            handle.kill()

    def forget(self) -> None:
        """Give back all descriptors."""
        self._line.close()
        for handle in self._handles:
            self._link.forget(handle)
