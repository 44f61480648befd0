"""The debugger inside a rank: it stops only where the controller gives it the terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat_terminal
from pytest_ranks.launch.terminal.asides import AskTerminal, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.channel import Channel

NO_TERMINAL = (
    "breakpoint() on rank {rank}: a rank has no terminal; run with --ranks-debug={rank} to have "
    "the debugger there"
)


class RankDebugger:
    """Serves `breakpoint()`, `pdb.set_trace()`, `--trace` and `--pdb` in the ranks of a session.

    Args:
        config: of the session, before its plugins for the terminal were taken out.
        chosen: the rank to debug, None where none was chosen.
    """

    def __init__(self, config: pytest.Config, *, chosen: int | None) -> None:
        self._config = config
        self._chosen = chosen
        self._is_post_mortem = bool(config.getoption("usepdb", False))
        self._is_traced = bool(config.getoption("trace", False))
        self._reporter = config.pluginmanager.get_plugin("terminalreporter")
        self._channel: Channel | None = None
        self._release: Callable[[], None] = lambda: None
        self._rank = 0
        self._world_size = 1
        self._saved: list[tuple[int, int]] = []
        self._is_declined = False

    def connect(self, channel: Channel, release: Callable[[], None]) -> None:
        """Have the way to the controller, and to let peers go after a failure."""
        self._channel, self._release = channel, release

    def prepare(self) -> None:
        """Take the place of pytest's debugger in this process."""
        _compat_terminal.replace_debugger(self._start)
        if self._is_traced:
            _compat_terminal.trace_tests(self._config)

    def enter(self, rank: int, world_size: int) -> None:
        """Begin an item on this rank."""
        self._rank, self._world_size, self._is_declined = rank, world_size, False
        self._config.option.usepdb = self.holds_peers  # so that Ctrl-C at a prompt is pdb's

    def leave(self) -> None:
        """Give the terminal back at the end of an item."""
        self._is_declined = True
        if self._saved:
            sys.stdout.flush()
            for end, saved in self._saved:
                os.dup2(saved, end)
                os.close(saved)
            self._saved.clear()
            assert self._channel is not None
            self._channel.send(AskTerminal(is_over=True))

    @property
    def holds_peers(self) -> bool:
        """Whether peers go on waiting for this rank after it failed: somebody may look at it."""
        is_chosen = self._chosen in (None, self._rank)
        return self._is_post_mortem and is_chosen and not self._is_declined

    @pytest.hookimpl(tryfirst=True)
    def pytest_exception_interact(
        self, node: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport
    ) -> None:
        """Show a failure in the debugger, if this rank gets the terminal, then let peers go."""
        if not self.holds_peers:
            return
        is_subtest = hasattr(report, "context")  # the test goes on after it, with its peers
        try:
            if self._has_terminal():
                _compat_terminal.debug_failure(node, call, report, self._reporter)
        finally:
            if not is_subtest:
                self._is_declined = True
                self._release()

    def _start(self, original: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
        """Stand in for what makes pytest's debugger."""
        if self._chosen is None and not (self._is_post_mortem or self._is_traced):
            pytest.fail(NO_TERMINAL.format(rank=self._rank), pytrace=False)
        if self._chosen not in (None, self._rank) or not self._has_terminal():
            return _NoDebugger()
        return original(method, *args, **kwargs)

    def _has_terminal(self) -> bool:
        if self._saved:
            return True
        assert self._channel is not None
        self._channel.send(AskTerminal())
        answer, descriptors = self._channel.receive()
        assert isinstance(answer, Terminal)
        if not answer.is_yours:
            return False
        reading, writing = descriptors
        _compat_terminal.suspend_capture(self._config)
        targets = {0: reading, 1: writing, 2: writing}
        for number, end in _compat_terminal.capture_ends(self._config):
            self._saved.append((end, os.dup(end)))
            os.dup2(targets[number], end)
        os.close(reading)
        os.close(writing)
        _compat_terminal.by_lines(sys.stdout)
        print(f"\n[rank {self._rank} of {self._world_size} has the terminal]", flush=True)
        return True


class _NoDebugger:
    """A debugger that never stops, for the ranks that nobody looks at."""

    quitting = False

    def set_trace(self, *_: object) -> None:
        """Go on."""

    def reset(self) -> None:
        """Go on."""

    def interaction(self, *_: object) -> None:
        """Go on."""

    def runcall(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function as if there were no debugger."""
        return function(*args, **kwargs)
