"""Test items on ranks that are threads: each rank has items and fixtures of its own.

What pytest has once a process (capture, logging, warnings) surrounds all ranks together; set-up, call,
teardown and their reports happen on each thread, with every other plugin's and conftest's hooks.
"""

from __future__ import annotations

import threading
import time
import unittest
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat, _compat_fidelity
from pytest_ranks.errors import FidelityError
from pytest_ranks.launch import rank as rank_module
from pytest_ranks.launch.fidelity import floor, threads
from pytest_ranks.launch.fidelity.refusals import sentence
from pytest_ranks.launch.scopes import Sibling
from pytest_ranks.launch.wire import Finished, OfRank, Phase
from pytest_ranks.report.records import shorten_sections

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_ranks.launch.wire import RunItem

    MakePhase = Callable[[pytest.TestReport, float, BaseException | None], Phase]

# They act on the whole process, so they surround all threads together.
_AROUND_ALL = ("capturemanager", "logging-plugin", "unraisableexception", "threadexception")
# A thread's own hooks are ours in the place of theirs: `runner` exports PYTEST_CURRENT_TEST, which a
# second thread finds gone.
_NOT_ON_THREADS = (
    *_AROUND_ALL,
    "runner",
    "ranks-session",
    "ranks-debugger",
    "warnings",
    "faulthandler",
)
_CAPTURES = ("capsys", "capfd", "capsysbinary", "capfdbinary", "capteesys")
# A report parses the sources in its traceback, which in CPython 3.11 is not safe in two threads at
# once ("AST constructor recursion depth mismatch").
_parsing = threading.Lock()
NO_SUBTESTS = (
    "fidelity 'threads' cannot show subtests (the fixture subtests, unittest's self.subTest): pytest "
    "counts them once a process, not once a thread; run the test at fidelity 'gloo' or above, or "
    "write it without subtests."
)
MOST_FILES = 8  # whose items are kept for each rank


class ThreadItems:
    """Runs items on the threads of the current crew.

    Args:
        config: of the session that the items come from.
        make_phase: turns a report into what travels.
    """

    def __init__(self, config: pytest.Config, make_phase: MakePhase) -> None:
        self._config = config
        self._make_phase = make_phase
        self._items: dict[tuple[int, str], dict[str, pytest.Item]] = {}
        self._sessions: dict[tuple[int, str], pytest.Session] = {}
        self._running: _Run | None = None
        config.pluginmanager.register(self, "ranks-threads")
        config.pluginmanager.register(_Reports(), "ranks-threads-reports")
        _compat_fidelity.lock_temporary_folders(config)

    def run(
        self, item: pytest.Item, request: RunItem, tell: Callable[[object], None]
    ) -> tuple[tuple[str, str], ...]:
        """Run an item on every rank; return what was captured of all of them together.

        Args:
            item: of the session that collected first; it stands for all.
            request: what to run.
            tell: sends a message to the controller.
        """
        size = threads.crew().size
        clones = [self._clone(rank, item) for rank in range(size)]
        self._running = _Run(item, clones, request, tell)
        kept: list[object] = [self, *self._plugins(_AROUND_ALL)]
        hooks = {
            name: _compat_fidelity.subset_hook(self._config, f"pytest_runtest_{name}", kept)
            for name in ("setup", "call", "teardown")
        }
        try:
            hooks["setup"](item=item)
            hooks["call"](item=item)
            hooks["teardown"](item=item, nextitem=None)
        finally:
            self._running = None
        return tuple(shorten_sections(_compat_fidelity.take_sections(item)))

    def tear_down(self) -> list[str]:
        """Run the teardowns of all fixtures that live on the threads; return what failed."""
        if not self._sessions:
            return []

        def end(rank: int) -> list[str]:
            return [
                f"rank {rank}: {error}"
                for (number, _), session in self._sessions.items()
                if number == rank
                for error in _teardown_errors(session, None)
            ]

        errors = [error for found in threads.crew().each(end) for error in found]
        self._sessions.clear()
        self._items.clear()
        return errors

    # ---- hooks, for the threads

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Set up a rank's item."""
        if not self._is_for_all(item):
            names = [name for name in _CAPTURES if name in getattr(item, "fixturenames", ())]
            if names:
                why = "output is captured once a process, not once a thread"
                pytest.fail(sentence("threads", names[0], why, "gloo"), pytrace=False)
            if "subtests" in getattr(item, "fixturenames", ()):
                pytest.fail(NO_SUBTESTS, pytrace=False)
            _compat.set_up(item)

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Run a rank's item, or, surrounded by what a process has once, those of all ranks."""
        if not self._is_for_all(item):
            instance = getattr(item, "instance", None)
            if isinstance(instance, unittest.TestCase):
                instance.subTest = _refuse_subtest  # type: ignore[method-assign]
            item.runtest()
            return
        run = self._running
        assert run is not None
        for clone in run.clones:
            _compat_fidelity.share_log_capture(item, clone)
        threads.crew().each(lambda rank: self._play(run, rank))

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Tear down a rank's item."""
        if not self._is_for_all(item):
            _compat.tear_down_to(item.session, nextitem)

    def _is_for_all(self, item: pytest.Item) -> bool:
        return self._running is not None and item is self._running.item

    # ---- one rank

    def _play(self, run: _Run, rank: int) -> None:
        clone = run.clones[rank]
        errors: list[str] = []
        if not _compat.is_set_up_for(clone.session, clone):
            errors = [
                f"teardown of an earlier test's fixtures failed: {error}"
                for error in _teardown_errors(clone.session, clone)
            ]
        try:
            _compat.run_protocol(clone, self._following(run, rank))
        except BaseException as error:  # pytest.exit, KeyboardInterrupt
            run.say(rank, rank_module.raised(error))
            threads.crew().floor.end()
        threads.crew().floor.leave(rank)
        run.say(rank, Finished(phases=tuple(run.phases[rank]), errors=tuple(errors)))

    def _following(self, run: _Run, rank: int) -> Any:
        clone = run.clones[rank]
        if run.request.hold:
            return Sibling(clone)
        # What lies in another file shares no fixture with this one here: each has a session.
        return self._items[rank, str(clone.path)].get(run.request.next_node_id or "")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note a rank's report; a failure is told at once, and lets the others go."""
        at = time.monotonic()
        run = self._running
        assert run is not None
        rank = floor.here.rank
        with _parsing:
            report = yield
        phase = self._make_phase(report, at, call.excinfo.value if call.excinfo else None)
        if phase.outcome == "failed":
            threads.crew().floor.end()
            run.say(rank, phase)
        else:
            run.phases[rank].append(phase)
        return report

    def _clone(self, rank: int, item: pytest.Item) -> pytest.Item:
        """Return a rank's own item, from its own collection of the file."""
        file = str(item.path)
        if (rank, file) not in self._items:
            if len({name for _, name in self._items}) > MOST_FILES:
                self._forget_others(file)
            removed = self._plugins(_NOT_ON_THREADS)
            session, found = _compat_fidelity.collect_again(self._config, file, removed)
            self._sessions[rank, file] = session
            self._items[rank, file] = {one.nodeid: one for one in found}
        return self._items[rank, file][item.nodeid]

    def _plugins(self, names: tuple[str, ...]) -> list[object]:
        found = (self._config.pluginmanager.get_plugin(name) for name in names)
        return [plugin for plugin in found if plugin is not None]

    def _forget_others(self, file: str) -> None:
        for key in [key for key in self._items if key[1] != file]:
            del self._items[key]
            del self._sessions[key]


class _Reports:
    """Makes the reports of items on threads, as `runner` does elsewhere."""

    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> pytest.TestReport:
        """Return the report of one phase."""
        return pytest.TestReport.from_item_and_call(item, call)


class _Run:
    """One item on its way through all ranks."""

    def __init__(
        self,
        item: pytest.Item,
        clones: list[pytest.Item],
        request: RunItem,
        tell: Callable[[object], None],
    ) -> None:
        self.item = item
        self.clones = clones
        self.request = request
        self.phases: list[list[Phase]] = [[] for _ in clones]
        self._tell = tell
        self._lock = threading.Lock()

    def say(self, rank: int, message: object) -> None:
        """Send what a rank says; a channel carries one message at a time."""
        with self._lock:
            self._tell(OfRank(rank=rank, message=message))


def _refuse_subtest(*_: object, **__: object) -> Any:
    __tracebackhide__ = True
    raise FidelityError(NO_SUBTESTS)


def _teardown_errors(session: pytest.Session, item: pytest.Item | None) -> list[str]:
    call = pytest.CallInfo.from_call(lambda: _compat.tear_down_to(session, item), "teardown")
    if call.excinfo is None:
        return []
    return [str(call.excinfo.getrepr(style="short"))]
