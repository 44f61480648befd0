"""Every other rank of a world: the session that collects, serves, and keeps quiet."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import options
from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch.attached import Collected
from pytest_ranks.launch.machines.follower import Follower, reach
from pytest_ranks.launch.machines.hub import LOOPBACK
from pytest_ranks.launch.machines.line import LineLost
from pytest_ranks.launch.machines.meeting import look_up_address
from pytest_ranks.launch.service import RankService

if TYPE_CHECKING:
    from pytest_ranks.launch.machines.outer_world import OuterWorld


class OtherItems:
    """Stands where rank 0 runs its items: starts what the items of this rank need."""

    def __init__(self, session: pytest.Session) -> None:
        self.service = RankService(session)

    def start(self) -> None:
        """Start the zygote before collection."""
        self.service.start()

    def take_over(self, items: list[pytest.Item]) -> None:
        """Have the zygote collect the files of these items."""
        self.service.collect(tuple(dict.fromkeys(str(item.path) for item in items)))

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End everything, however the session ended."""
        self.service.end()


class RankOther(Collected):
    """Follows the session of a rank other than 0."""

    def __init__(self, config: pytest.Config, world: OuterWorld) -> None:
        super().__init__(config, world)
        self._items: OtherItems | None = None
        self._follower: Follower | None = None
        self._status: int | None = None
        self._reason = "it was interrupted"

    def make_items(self, session: pytest.Session) -> OtherItems:
        """Return what starts the ranks of this session."""
        self._items = OtherItems(session)
        return self._items

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool:
        """Serve rank 0 in place of running tests."""
        try:
            self._follower = self._join()
            self._status = self._follower.serve()
        except (LineLost, UnavailableError) as error:
            text = f"rank 0: {error}" if isinstance(error, LineLost) else str(error)
            print(
                f"ranks: rank {self.world.rank} (node {self.world.node_name}) ends: {text}",
                file=sys.stderr,
                flush=True,
            )
            self._status = int(pytest.ExitCode.TESTS_FAILED)
        except Exception as error:
            self._reason = f"{type(error).__name__}: {error}"
            raise
        return True

    def _join(self) -> Follower:
        assert self._items is not None
        world, seconds = self.world, options.settings(self.config).join_timeout
        end = time.monotonic() + seconds
        port, token = world.port, world.run
        if world.has_store:
            port, token = look_up_address(self._items.service.link, world, seconds)
        line = reach(LOOPBACK if world.nodes == 1 else world.address, port, end)
        line.send(self.hello(token))
        return Follower(line, self._items.service)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Take over the exit status of rank 0."""
        if self._status is not None:
            session.exitstatus = self._status

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """Tell rank 0 if this session ended by itself."""
        if self._status is not None:
            # torchrun ends the others as soon as one has left with a failure
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif self._follower is not None:
            self._follower.leave(self._reason)
