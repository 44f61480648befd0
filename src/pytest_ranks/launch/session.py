"""The pytest session inside the zygote and its ranks: collects files once, runs items by id."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_ranks import _compat, _compat_terminal, options
from pytest_ranks.launch import coverage
from pytest_ranks.launch.fidelity.ladder import HOSTED
from pytest_ranks.launch.hygiene.watch import Inherited, StateWatch
from pytest_ranks.launch.phases import as_data, make_phase
from pytest_ranks.launch.quiet import make_quiet
from pytest_ranks.launch.scopes import Sibling
from pytest_ranks.launch.seeding import load_generators
from pytest_ranks.launch.terminal.asides import Subtest
from pytest_ranks.launch.terminal.debugger import RankDebugger
from pytest_ranks.launch.terminal.output import flush_everything, write_by_lines
from pytest_ranks.launch.wire import Finished, Phase, RunItem, Warned
from pytest_ranks.launch.zygote import Zygote

if TYPE_CHECKING:
    import warnings
    from collections.abc import Callable, Generator

    from pytest_ranks.launch.channel import Channel
    from pytest_ranks.launch.fidelity.thread_items import ThreadItems
    from pytest_ranks.launch.wire import Configure, World
    from pytest_ranks.launch.zygote import Ends


class RankSession:
    """Runs the items of one pytest session inside rank processes, driven by node id."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._config = session.config
        self._items: dict[str, pytest.Item] = {}
        self._errors: dict[str, str] = {}
        self._phases: list[Phase] = []
        self._warnings: list[Warned] = []
        self._inherited: Inherited | None = None
        self._fail: Callable[[object], None] | None = None
        self._channel: Channel | None = None
        self._is_in_call = False
        self._debugger = RankDebugger(self._config, chosen=options.settings(self._config).debug)
        self._request: RunItem | None = None
        self._sections: tuple[tuple[str, str], ...] = ()
        self._threads: ThreadItems | None = None
        make_quiet(self._config)
        self._config.pluginmanager.register(self._debugger, "ranks-debugger")
        self._config.pluginmanager.register(self, "ranks-session")

    # ---- in the zygote

    def collect(self, files: tuple[str, ...]) -> None:
        """Collect test files; what goes wrong is told when an item is missed."""
        try:
            self._session.perform_collect(list(files))
        except BaseException as error:
            self._errors[""] = f"{type(error).__name__}: {error}"
        self._warnings.clear()  # the controller's own collection recorded the same
        load_generators()
        self._inherited = Inherited()
        gc.freeze()  # `keeping_all` would show test files a collector that is off

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Note all items before others select among them: the controller has selected."""
        if session is self._session:  # a thread's own collection is another one
            self._items |= {item.nodeid: item for item in items}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note why a file could not be collected."""
        if report.failed:
            self._errors[report.nodeid] = report.longreprtext

    # ---- in a rank

    def prepare(self, output: int) -> tuple[int, ...]:
        """Give this fork capture files of its own: forks share an open file's position."""
        _compat.stop_capture(self._config)
        os.dup2(output, 1)
        os.dup2(output, 2)
        write_by_lines()
        captured = _compat.start_capture(self._config)
        self._debugger.prepare()
        self._watch = StateWatch(captured, inherited=self._inherited)
        return captured

    def connect(self, channel: Channel, release: Callable[[], None]) -> None:
        """Have the way to the controller, and to let peers go after a failure."""
        self._channel = channel
        self._debugger.connect(channel, release)

    @property
    def holds_peers(self) -> bool:
        """Whether peers go on waiting for a failed rank, since somebody may look at it."""
        return self._debugger.holds_peers

    @property
    def sockets(self) -> frozenset[int]:
        """Inodes of the sockets that were open at the end of the last item."""
        return self._watch.sockets

    def run(self, request: RunItem, fail: Callable[[object], None]) -> Finished:
        """Run one item and return its reports; `fail` gets each that did not pass, at once."""
        item = self._item_of(request.node_id)
        if item is None:
            return Finished(missing=self._why_missing(request.node_id))
        following: Any = self._item_of(request.next_node_id or "")
        if request.hold:
            following = Sibling(item)
        _compat.set_base_temp(self._config, Path(request.base_temp))
        self._phases, self._warnings, self._fail = [], [], fail
        errors = self._leave_scopes_of_others(item)
        self._debugger.enter(request.world.rank, request.world.world_size)
        self._request, self._sections = request, ()
        self._watch.begin(has_device=request.world.device_name != "cpu")
        try:
            self._config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            self._fail = None
            flush_everything()
            self._debugger.leave()
            leaks = self._watch.end()
        return Finished(
            phases=tuple(self._phases),
            warnings=tuple(self._warnings),
            errors=tuple(errors),
            sections=self._sections,
            leaks=leaks,
        )

    def tear_down(self) -> Finished:
        """Run the teardowns of all fixtures that are still alive."""
        on_threads = self._threads.tear_down() if self._threads is not None else []
        return Finished(errors=(*on_threads, *_teardown_errors(self._session, None)))

    def _leave_scopes_of_others(self, item: pytest.Item) -> list[str]:
        """Tear down what a wrong guess of the next item has left alive."""
        if _compat.is_set_up_for(self._session, item):
            return []
        return [
            f"teardown of an earlier test's fixtures failed: {error}"
            for error in _teardown_errors(self._session, item)
        ]

    def _item_of(self, node_id: str) -> pytest.Item | None:
        """Return an item by the controller's id; xdist's loadgroup adds `@group` to some."""
        found = self._items.get(node_id)
        if found is None and "@" in node_id:
            return self._item_of(node_id.rpartition("@")[0])
        return found

    def _why_missing(self, node_id: str) -> str:
        file = node_id.partition("::")[0]
        for name, text in self._errors.items():
            if name in ("", file) or node_id.startswith(f"{name}::"):
                return f"collecting {file} failed on the ranks:\n{text}"
        inside = [name for name in self._items if name.partition("::")[0] == file]
        found = ", ".join(inside[:20]) or "no test"
        return (
            f"the ranks collected no test of this id. In {file} they found {found}. Ids that "
            "depend on time, environment or the order of a set differ between processes."
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run the item without reporting it: no reruns, no log hooks; wrappers stay in force."""
        assert self._request is not None
        world = self._request.world
        if world.fidelity == "threads":
            self._run_on_threads(item, self._request)
            return True
        with _surroundings(world), _compat_terminal.listening_quickly():
            _compat.run_protocol(item, nextitem)
        return True

    def _run_on_threads(self, item: pytest.Item, request: RunItem) -> None:
        if self._threads is None:
            from pytest_ranks.launch.fidelity.thread_items import ThreadItems

            self._threads = ThreadItems(
                self._config, lambda report, at, error: make_phase(self._config, report, at, error)
            )
        assert self._fail is not None
        self._sections = self._threads.run(item, request, self._fail)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Name the context of covered lines, as pytest-cov does."""
        coverage.enter(f"{item.nodeid}|setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Name the context of covered lines; what is reported in here is a subtest."""
        __tracebackhide__ = True
        coverage.enter(f"{item.nodeid}|run")
        self._is_in_call = True
        try:
            return (yield)
        finally:
            self._is_in_call = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Name the context of covered lines."""
        coverage.enter(f"{item.nodeid}|teardown")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[object]
    ) -> Generator[None, object, object]:
        """Have what a wide fixture sets up belong to the state that tests are compared with."""
        if fixturedef.scope == "function":
            return (yield)
        self._watch.before_wide()
        try:
            return (yield)
        finally:
            name = f"{fixturedef.scope} fixture {fixturedef.argname!r}"
            self._watch.after_wide(fixturedef, name)

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[object]) -> None:
        """Expect what was before a wide fixture once its teardown has run."""
        self._watch.end_wide(fixturedef)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note each report; send one that did not pass at once."""
        at = time.monotonic()
        report = yield
        if self._is_in_call:
            return report
        error = call.excinfo.value if call.excinfo is not None else None
        phase = make_phase(self._config, report, at, error)
        if phase.outcome != "passed" and self._fail is not None:
            self._fail(phase)
        else:
            self._phases.append(phase)
            if phase.when == "setup" and self._config.getoption("setuponly", False):
                # pytest leaves the call out; the controller expects it to be told of
                self._phases.append(replace(phase, when="call", report=_report_of_call(phase)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell of a subtest at once: it is over, whatever becomes of the rank."""
        if self._is_in_call and self._channel is not None:
            self._channel.send(Subtest(report=as_data(self._config, report)))

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        """Note warnings: they are in no report."""
        self._warnings.append(
            Warned(
                category=f"{warning_message.category.__module__}:"
                f"{warning_message.category.__qualname__}",
                text=str(warning_message.message),
                filename=warning_message.filename,
                lineno=warning_message.lineno,
                when=when,
                node_id=nodeid,
                location=location,
            )
        )


def _surroundings(world: World) -> contextlib.AbstractContextManager[Any]:
    """Return what surrounds an item where one body stands for several ranks."""
    if world.fidelity not in HOSTED:
        return contextlib.nullcontext()
    from pytest_ranks.launch.fidelity.host import around

    return around(world)


def serve(session: pytest.Session, ends: Ends) -> NoReturn:
    """Turn this pytest session into a zygote; the call never returns.

    Args:
        session: about to collect; its own collection never goes on.
        ends: what the zygote has of its controller.
    """
    config = session.config
    ends.tell_stacks()
    _compat.stop_capture(config)
    flush_everything()  # or each rank would hand on its copy of what is left in the buffers
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((nothing, ends.log, ends.log)):
        os.dup2(fd, number)
    os.close(nothing)
    _compat.start_capture(config)
    runner = RankSession(session)
    Zygote(ends, collect=runner.collect, items=runner).serve()


def become(request: Configure, serve: Callable[[pytest.Session], NoReturn]) -> NoReturn:
    """Start a pytest session with the controller's configuration in this fresh process.

    Args:
        request: the configuration.
        serve: takes the session over once it would collect.
    """
    os.chdir(request.directory)
    sys.path[:] = request.sys_path
    pytest.main(list(request.arguments), plugins=[_Follower(request, serve)])
    os._exit(1)  # only where the configuration failed; what pytest printed is in the log


class _Follower:
    """Steers a fresh session away from running anything of its own."""

    def __init__(self, request: Configure, serve: Callable[[pytest.Session], NoReturn]) -> None:
        self._request = request
        self._serve = serve

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_cmdline_main(
        self, config: pytest.Config
    ) -> Generator[None, int | pytest.ExitCode | None, int | pytest.ExitCode | None]:
        """Take over the controller's options before other plugins act on them."""
        manager = config.pluginmanager
        # Named so that this session starts no zygote of its own; and, as the plugin registered
        # last, asked first when it is about to collect.
        manager.unregister(self)
        manager.register(self, "ranks-follower")
        # pytest-rerunfailures starts a thread when configured; a zygote has to have one only
        if (reruns := manager.get_plugin("rerunfailures")) is not None:
            manager.unregister(reruns)
        for name, value in self._request.options.items():
            setattr(config.option, name, value)
        if self._request.worker_input is not None:
            # of an xdist worker: fixtures such as worker_id keep workers apart by it
            config.workerinput = self._request.worker_input  # type: ignore[attr-defined]
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Serve instead of collecting."""
        if isinstance(collector, pytest.Session):
            collector.config.pluginmanager.unregister(self)
            self._serve(collector)


def _teardown_errors(session: pytest.Session, item: pytest.Item | None) -> list[str]:
    call = pytest.CallInfo.from_call(lambda: _compat.tear_down_to(session, item), "teardown")
    if call.excinfo is None:
        return []
    return [call.excinfo.getrepr(style="short").__str__()]


def _report_of_call(setup: Phase) -> dict[str, Any]:
    """Return the report of a call that passed without being run."""
    return {**setup.report, "when": "call"}
