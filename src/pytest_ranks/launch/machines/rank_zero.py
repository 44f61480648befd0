"""Rank 0 of a world: the session that runs, decides and reports."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_ranks import marks, options
from pytest_ranks.errors import UnavailableError
from pytest_ranks.hardware.requirements import BACKEND_DEVICES
from pytest_ranks.launch.attached import Collected
from pytest_ranks.launch.machines import agreement
from pytest_ranks.launch.machines.hub import Hub
from pytest_ranks.launch.machines.meeting import publish_address
from pytest_ranks.launch.machines.spread import SpreadRanks
from pytest_ranks.launch.reporting.folding import ranks_text

if TYPE_CHECKING:
    from pytest_ranks.launch.items import RankItems
    from pytest_ranks.launch.link import ZygoteLink
    from pytest_ranks.launch.machines.outer_world import OuterWorld
    from pytest_ranks.launch.spec import RankSpec

TITLE = "ranks of the world"


class RankZero(Collected):
    """Follows the session of rank 0: gathers the others, and tells them the end."""

    def __init__(self, config: pytest.Config, world: OuterWorld) -> None:
        super().__init__(config, world)
        self._hub: Hub | None = None
        self._items: RankItems | None = None
        self._session: pytest.Session | None = None
        self._lines: list[str] = []

    def make_items(self, session: pytest.Session) -> RankItems:
        """Return what runs this session's items on ranks."""
        from pytest_ranks.launch.items import RankItems

        self._items = RankItems(session, make_ranks=self._spread)
        return self._items

    def _spread(self, link: ZygoteLink, world_size: int) -> SpreadRanks:
        assert self._hub is not None
        return SpreadRanks(link, world_size, hub=self._hub)

    def pytest_report_header(self) -> str:
        """Say what this session is attached to."""
        return f"ranks: {self.world} (from {self.world.launcher})"

    # ---- the beginning

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Gather the other ranks before the first test."""
        self._session = session
        try:
            self._gather(session)
        except UnavailableError as error:
            self._lines.append(str(error))
        if self._lines and not session.shouldfail:
            session.shouldfail = f"the ranks of the world cannot start: see {TITLE!r}"
        if session.shouldfail:  # also where this process was asked to end meanwhile
            raise session.Failed(session.shouldfail)

    def _gather(self, session: pytest.Session) -> None:
        assert self._items is not None
        seconds = options.settings(self.config).join_timeout
        token = os.urandom(16).hex() if self.world.has_store else self.world.run
        self._hub = Hub(self.world, self.hello(token))
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_terminate)
        port = self._hub.listen(0 if self.world.has_store else self.world.port)
        self._hub.is_busy = True
        if self.world.has_store:
            publish_address(self._items.link, self.world, port, token, seconds)
        self._hub.admit(time.monotonic() + seconds, partial(self._show_progress, session))
        self._hub.is_busy = False
        if (missing := self._hub.missing()) and not self._hub.is_ending:
            self._lines.append(
                f"{ranks_text(missing)} of {self.world.size} did not join within {seconds:g} s "
                "(--ranks-join-timeout): expected every rank to collect the same tests and to "
                f"reach {self.world.address} port {port}"
            )
            self._lines += self._hub.refused
        hellos = [self._hub.hello, *(member.hello for member in self._hub.members)]
        is_selective = getattr(self.config.option, "lf", False)
        self._lines += agreement.complaints(hellos, may_have_more=is_selective)
        self._lines += self._hub.describe_losses()

    def _show_progress(self, session: pytest.Session, missing: list[int]) -> None:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"ranks: waiting for {ranks_text(missing)} of {self.world.size}")

    def _on_terminate(self, *_: object) -> None:
        """End with a report: torchrun ends all ranks of a node when one of them ended."""
        text = f"rank 0 was asked to end (SIGTERM), as {self.world.launcher} does when a rank ended"
        assert self._session is not None
        assert self._hub is not None
        self._session.shouldfail = text
        self._hub.interrupt()
        if not self._hub.is_busy:
            pytest.exit(text, returncode=1)

    # ---- a test

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a test that is too large for the world; fail one that has become so."""
        spec = marks.read(item).spec
        if spec is None or self._hub is None:
            return
        self._hub.during = item.nodeid
        reason = self._unmet(spec)
        if reason is not None:
            required = options.settings(self.config).require
            if any(entry.kind == "ranks" for entry in required):
                pytest.fail(f"{reason}, and --ranks-require was given", pytrace=False)
            marks.skip(item, reason)
            return
        for member in self._hub.reachable():
            self._hub.hear(member)
        if spec.processes > 1 + len(self._hub.reachable()):
            pytest.fail(self._hub.too_few(spec.processes), pytrace=False)

    def _unmet(self, spec: RankSpec) -> str | None:
        """Return why this world cannot run a test."""
        if spec.backend in BACKEND_DEVICES:
            return (
                f"backend {spec.backend!r}: the ranks of a world that {self.world.launcher} "
                "started are on gloo"
            )
        if spec.processes > self.world.size:
            return (
                f"needs {spec.processes} ranks, the world that {self.world.launcher} started "
                f"has {self.world.size}"
            )
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Note that what happens now happens between tests."""
        if self._hub is not None:
            self._hub.during = ""

    # ---- the end

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a session that lost a rank, whether or not a test needed it."""
        if self._hub is None or self._lines or session.exitstatus == pytest.ExitCode.INTERRUPTED:
            return  # who presses Ctrl-C ends the other ranks too
        for member in self._hub.reachable():
            self._hub.hear(member)
        self._lines += self._hub.describe_losses()
        if self._lines and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the ranks that never came, differ, or were lost."""
        if self._lines:
            terminalreporter.section(TITLE, red=True, bold=True)
            for line in self._lines:
                terminalreporter.line(line, red=True)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Tell all ranks the exit status, which is the same for all."""
        if self._hub is None or self._session is None:
            return
        # torchrun ends the others as soon as one has left with a failure: each would rather say how
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._hub.end(int(self._session.exitstatus))
