"""Private names of pytest around the terminal: capture, debugger, what times both, and subtests.

pytest 8.4 to 9.2. Each is probed; without one the debugger is less convenient, not wrong.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
from typing import TYPE_CHECKING, Any

from pytest_ranks._compat_state import TRACE_LOGGER

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import pytest


def suspend_capture(config: pytest.Config) -> None:
    """Give 0 to 2 back to the terminal, with fixtures such as capsys (no public way)."""
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is not None:
        manager.suspend(in_=True)


def resume_capture(config: pytest.Config) -> None:
    """Capture again."""
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is not None:
        manager.resume()


def without_capture(config: pytest.Config) -> contextlib.AbstractContextManager[None]:
    """Return a block in which 1 and 2 are the terminal (`CaptureManager`, no public way)."""
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is None:
        return contextlib.nullcontext()
    block: contextlib.AbstractContextManager[None] = manager.global_and_fixture_disabled()
    return block


def capture_ends(config: pytest.Config) -> list[tuple[int, int]]:
    """Return what suspending the capture gives back: pairs of 0, 1 or 2 and a descriptor.

    `FDCapture` keeps the descriptors that it gives back in `targetfd_save`; a debugger suspends
    more than once, so both these and 0 to 2 themselves have to lead to the terminal.
    """
    manager = config.pluginmanager.get_plugin("capturemanager")
    capture = getattr(manager, "_global_capturing", None)
    found = []
    for number, name in enumerate(("in_", "out", "err")):
        found.append((number, number))
        kept = getattr(getattr(capture, name, None), "targetfd_save", None)
        if isinstance(kept, int):
            found.append((number, kept))
    return found


@contextlib.contextmanager
def listening_quickly() -> Generator[None]:
    """Have pytest take less time inside to listen to loggers that do not propagate.

    From 9.2 on `catching_logs` attaches to each of them, under a lock, and six times a test;
    torch has 42: 0.2 ms here, and again in each rank.
    """
    from _pytest import logging as private

    original = private.catching_logs
    private.catching_logs = _quick_catching_logs()  # type: ignore[misc]
    try:
        yield
    finally:
        private.catching_logs = original  # type: ignore[misc]


@functools.cache
def _quick_catching_logs() -> Any:
    """Return the same with an append to a list, which no reader of the list can see half done.

    torch's trace is left out: it is DEBUG whatever the user asks for, and a tool reads it, no person.
    """
    from _pytest import logging as private

    original: Any = private.catching_logs
    if "attached_loggers" not in getattr(original, "__slots__", ()):
        return original  # before 9.2 it listens to the root alone

    class CatchingLogs(original):  # type: ignore[misc]
        def __enter__(self) -> Any:
            root, handler = logging.getLogger(), self.handler
            if self.level is not None:
                handler.setLevel(self.level)
                self.orig_level = root.level
                root.setLevel(min(root.level, self.level))
            self.attached_loggers.append(root)
            self.attached_loggers.extend(
                one
                for name, one in root.manager.loggerDict.items()
                if isinstance(one, logging.Logger) and not one.propagate and name != TRACE_LOGGER
            )
            for one in self.attached_loggers:
                if handler not in one.handlers:
                    one.handlers.append(handler)
            return handler

        def __exit__(self, *_: object) -> None:
            if self.level is not None:
                logging.getLogger().setLevel(self.orig_level)
            for one in self.attached_loggers:
                if self.handler in one.handlers:
                    one.handlers.remove(self.handler)
            self.attached_loggers.clear()

    return CatchingLogs


def write_to_nobody(config: pytest.Config) -> None:
    """Let a session without a terminal reporter explain its assertions.

    pytest 8.4 asks `Config.get_terminal_writer` how to highlight each comparison that failed, which
    raises a bare AssertionError in place of the explanation where there is no reporter; 9.2 asks for
    the reporter first (https://github.com/pytest-dev/pytest/issues/14377).
    """
    with contextlib.suppress(ImportError):
        from _pytest._io import TerminalWriter

        writer = TerminalWriter(io.StringIO())
        vars(config)["get_terminal_writer"] = lambda: writer


def by_lines(stream: object) -> None:
    """Have a text stream write each line at once, where it can."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(line_buffering=True)


def replace_debugger(start: Callable[..., Any]) -> None:
    """Have every way into pytest's debugger go through a function (`pytestPDB._init_pdb`).

    Args:
        start: called with pytest's own function, the name of the way, and its arguments.
    """
    from _pytest.debugging import pytestPDB

    original = getattr(pytestPDB, "_init_pdb", None)
    if original is not None:
        pytestPDB._init_pdb = classmethod(  # type: ignore[assignment,method-assign]
            lambda _, method, *args, **kwargs: start(original, method, *args, **kwargs)
        )


def trace_tests(config: pytest.Config) -> None:
    """Have tests begin in the debugger, as `--trace` does."""
    from _pytest.debugging import PdbTrace

    if not config.pluginmanager.has_plugin("pdbtrace"):
        config.pluginmanager.register(PdbTrace(), "pdbtrace")


def debug_failure(
    node: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport, reporter: Any
) -> None:
    """Show a failure in the debugger, as `--pdb` does.

    Args:
        node: the item.
        call: with the exception.
        report: what pytest makes of it.
        reporter: the session's terminal reporter, which pytest writes the traceback with.
    """
    from _pytest.debugging import PdbInvoke, post_mortem

    manager = node.config.pluginmanager
    if reporter is None:
        assert call.excinfo is not None
        post_mortem(call.excinfo.value if sys.version_info >= (3, 13) else call.excinfo.tb)
        return
    manager.register(reporter, "terminalreporter")
    try:
        PdbInvoke().pytest_exception_interact(node=node, call=call, report=report)
    finally:
        manager.unregister(reporter)


def count_failed_subtest(item: pytest.Item) -> None:
    """Have pytest fail an item, if that passed, since it contains a failed subtest.

    pytest 9 counts them where they run, `_pytest.subtests.failed_subtests_key`; pytest-subtests,
    for pytest 8, leaves the item as it is.
    """
    with contextlib.suppress(ImportError, KeyError, AttributeError):
        from _pytest.subtests import failed_subtests_key

        key: Any = getattr(item, "id", item.nodeid)  # 9.2 has an id apart from the node id
        item.config.stash[failed_subtests_key][key] += 1


def lift_timeouts(config: pytest.Config) -> None:
    """Have pytest-timeout and pytest's faulthandler wait for ever, as in a debugger of their own.

    Only these two: a `pytest_enter_pdb` of the user's expects a debugger in this process.
    """
    manager = config.pluginmanager
    for plugin in manager.get_plugins():
        if getattr(plugin, "__name__", "") in ("pytest_timeout", "_pytest.faulthandler"):
            with contextlib.suppress(Exception):
                plugin.pytest_enter_pdb()
