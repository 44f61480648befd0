"""The terminal handed to one rank for its debugger, seen from the controller.

A rank that comes to a breakpoint, or to a failure with `--pdb`, asks for the terminal. The
controller gives its own, the way a shell does: descriptors travel to the rank, Ctrl-C is passed on
to it, and all deadlines are lifted until the debugger goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat_terminal, options
from pytest_ranks.launch.channel import ChannelClosed
from pytest_ranks.launch.processes import send_signal
from pytest_ranks.launch.terminal.asides import AskTerminal, Terminal
from pytest_ranks.launch.wire import Raised

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_ranks.launch.link import RankHandle
    from pytest_ranks.launch.rank_run import RankRun

# Somebody who debugs over lunch finds the peers still waiting; poll() takes at most 24 days.
LIFTED_SECONDS = 7 * 24 * 3600.0
# Two Ctrl-C within so many seconds are for pytest, one is for the debugger.
TWICE_SECONDS = 1.0
QUIT = "Quitting debugger"  # what pytest's debugger ends a session with
NEEDS_ONE_PROCESS = "--ranks-debug={rank}: a debugger needs the terminal, which xdist's workers do not have; add -n0"

ABSENT = "ranks-absent-rank"


class Desk:
    """Gives the terminal to one rank at a time.

    Args:
        config: of the session.
        chosen: the rank to debug, None for the first one that fails.
    """

    def __init__(self, config: pytest.Config, *, chosen: int | None) -> None:
        self._config = config
        self._chosen = chosen
        self._handle: RankHandle | None = None  # who has the terminal
        self._served: RankHandle | None = None  # who had it in this run
        self._modes: list[Any] | None = None
        self._before: Any = None
        self._interrupted = 0.0
        self.seconds = LIFTED_SECONDS

    @property
    def is_busy(self) -> bool:
        """Whether a rank has the terminal."""
        return self._handle is not None and not self._handle.ended()

    def take(self, handle: RankHandle, message: object) -> bool:
        """Answer a rank that asks for the terminal; return whether the message was such."""
        if not isinstance(message, AskTerminal):
            return False
        if message.is_over:
            self._take_back()
            return True
        # Peers fail in turn when the first one lets them go; nobody wants to debug that.
        is_first = self._served in (None, handle)
        is_free = self._handle is None and is_first and self._chosen in (None, handle.rank)
        with contextlib.suppress(ChannelClosed):
            if is_free:
                self._open(handle)
            else:
                handle.channel.send(Terminal(is_yours=False))
        return True

    def close(self) -> None:
        """Take the terminal back, if a rank has it: the run is over."""
        self._take_back()
        self._served = None

    def _take_back(self) -> None:
        if self._handle is None:
            return
        self._handle = None
        signal.signal(signal.SIGINT, self._before)
        if self._modes is not None:  # a debugger that was killed leaves them as readline set them
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._modes)
        os.close(self._terminal)
        _compat_terminal.resume_capture(self._config)

    def _open(self, handle: RankHandle) -> None:
        _compat_terminal.suspend_capture(self._config)
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        self._handle = self._served = handle
        self._terminal = os.dup(0)
        self._modes = None
        with contextlib.suppress(termios.error):
            self._modes = termios.tcgetattr(self._terminal)
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        _compat_terminal.lift_timeouts(self._config)
        handle.channel.send(Terminal(is_yours=True), (0, 1))

    def _interrupt(self, *_: object) -> None:
        """Pass Ctrl-C on to the debugger; the second one in a row ends the session."""
        now = time.monotonic()
        is_second, self._interrupted = now - self._interrupted < TWICE_SECONDS, now
        if is_second or self._handle is None or self._handle.pidfd is None:
            raise KeyboardInterrupt
        send_signal(self._handle.pidfd, signal.SIGINT)


class NoPrompt:
    """Keeps `--pdb` from a prompt in the controller, where there is nothing of a rank to see."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Take the plugin behind `--pdb` away while an item runs on ranks."""
        manager = item.config.pluginmanager
        invoke = manager.get_plugin("pdbinvoke")
        if invoke is None or item.get_closest_marker("ranks") is None:
            return (yield)
        manager.unregister(invoke)
        try:
            return (yield)
        finally:
            manager.register(invoke, "pdbinvoke")


class AbsentRank:
    """Says at the end of a session that no test had the rank to debug.

    Args:
        chosen: that rank.
    """

    def __init__(self, chosen: int) -> None:
        self._chosen = chosen
        self._widest = 0

    def note(self, processes: int) -> None:
        """Note the rank processes of a test that runs on them."""
        self._widest = max(self._widest, processes)

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """Say it, where tests could have run."""
        if self._chosen < self._widest or config.option.collectonly:
            return
        ran = f"the widest world had {self._widest}" if self._widest else "none ran on ranks"
        terminalreporter.ensure_newline()
        terminalreporter.line(
            f"--ranks-debug={self._chosen}: no test had a rank {self._chosen}, {ran}", yellow=True
        )


def note_world(config: pytest.Config, processes: int) -> None:
    """Note that a test runs on so many rank processes."""
    absent: AbsentRank | None = config.pluginmanager.get_plugin(ABSENT)
    if absent is not None:
        absent.note(processes)


def chosen_rank(config: pytest.Config) -> int | None:
    """Return the rank to debug, None where none was chosen."""
    return options.settings(config).debug


def desk_of(config: pytest.Config) -> Desk | None:
    """Return what gives the terminal to ranks in this session, None without a debugger."""
    rank = chosen_rank(config)
    if rank is None and not (config.getoption("usepdb", False) or config.getoption("trace", False)):
        return None
    if not config.pluginmanager.has_plugin("ranks-no-prompt"):
        config.pluginmanager.register(NoPrompt(), "ranks-no-prompt")
    return Desk(config, chosen=rank)


def has_quit(runs: list[RankRun]) -> bool:
    """Return whether somebody left a rank's debugger with `quit`, which ends the session."""
    messages = [message for run in runs for message in run.messages]
    ends = [one.session_end for one in messages if isinstance(one, Raised)]
    return any(end is not None and end[0] == QUIT for end in ends)


def check(config: pytest.Config) -> None:
    """Refuse a debugger where there is no terminal for it; else watch for the rank to come.

    Raises:
        pytest.UsageError: the tests are distributed over processes.
    """
    rank = chosen_rank(config)
    is_distributed = hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"
    if rank is not None and is_distributed:
        raise pytest.UsageError(NEEDS_ONE_PROCESS.format(rank=rank))
    if rank is not None:
        config.pluginmanager.register(AbsentRank(rank), ABSENT)
