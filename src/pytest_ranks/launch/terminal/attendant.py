"""What the controller does beside waiting for ranks: it shows their output and serves a debugger."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from pytest_ranks import _compat_terminal

if TYPE_CHECKING:
    import pytest

    from pytest_ranks.launch.link import RankHandle
    from pytest_ranks.launch.terminal.debug import Desk

# Seconds between two looks at what ranks wrote: a reader takes it for at once.
TICK = 0.05


class Attendant:
    """Attends each run of the ranks of one zygote.

    Args:
        display: shows what ranks write, None where that is captured for the report.
        desk: hands the terminal to a rank, None where no debugger was asked for.
    """

    def __init__(self, *, display: Display | None = None, desk: Desk | None = None) -> None:
        self._display = display
        self._desk = desk

    @property
    def is_patient(self) -> bool:
        """Whether nobody may be stopped now, since somebody looks at a rank in a debugger."""
        return self._desk is not None and self._desk.is_busy

    def lift(self, seconds: float) -> float:
        """Return the timeout for the process group, longer where ranks may wait for a debugger."""
        return seconds if self._desk is None else max(seconds, self._desk.seconds)

    def milliseconds(self, seconds: float) -> int:
        """Return how long poll() waits for the next event, given how long it may."""
        return int((seconds if self._display is None else min(seconds, TICK)) * 1000) + 1

    def look(self, handles: list[RankHandle]) -> None:
        """Show what ranks have written since the last look."""
        if self._display is not None:
            self._display.show(handles)

    def take(self, handle: RankHandle, message: object) -> bool:
        """Answer a rank that asks for the terminal; return whether the message was such."""
        return self._desk is not None and self._desk.take(handle, message)

    def end(self, handles: list[RankHandle]) -> None:
        """Leave the terminal as pytest expects it: the run is over."""
        if self._display is not None:
            self._display.show(handles, is_last=True)
        if self._desk is not None:
            self._desk.close()


class Display:
    """Writes the lines of ranks to the terminal, each with its rank in front.

    Ranks write to files in memory, C code too; only whole lines are taken from there, so that no
    rank breaks the line of another.

    Args:
        config: of the session, for its terminal.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._read: dict[int, int] = {}  # label of a rank process -> bytes taken
        self._rest: dict[int, bytes] = {}  # label -> the line that is not complete yet

    def show(self, handles: list[RankHandle], *, is_last: bool = False) -> None:
        """Write the lines that are complete, and with the last call of a run the others too."""
        for handle in handles:
            data = self._rest.pop(handle.label, b"") + self._more(handle)
            whole, newline, rest = data.rpartition(b"\n")
            if is_last and rest:
                whole, newline, rest = data, b"\n", b""
            if rest:
                self._rest[handle.label] = rest
            if newline:
                self._write(handle.rank, whole.decode(errors="replace"))
            if is_last:
                self._forget(handle)

    def _more(self, handle: RankHandle) -> bytes:
        found = b""
        start = self._read.get(handle.label, 0)
        while data := os.pread(handle.output, 1 << 16, start + len(found)):
            found += data
        self._read[handle.label] = start + len(found)
        return found

    def _forget(self, handle: RankHandle) -> None:
        """Empty the file: the next test's report shows what that wrote, and memory is finite."""
        with contextlib.suppress(OSError):
            os.ftruncate(handle.output, 0)
            self._read.pop(handle.label, None)

    def _write(self, rank: int, text: str) -> None:
        stream = sys.__stdout__
        if stream is None:
            return
        with _compat_terminal.without_capture(self._config):
            reporter = self._config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.ensure_newline()
            stream.write("".join(f"[rank {rank}] {line}\n" for line in text.split("\n")))
            stream.flush()


def is_shown(config: pytest.Config) -> bool:
    """Return whether what tests write goes to the terminal at once."""
    manager = config.pluginmanager
    has_capture = manager.has_plugin("capturemanager")
    has_live_log = manager.has_plugin("logging-plugin") and (
        config.getini("log_cli") or config.getoption("log_cli_level", None) is not None
    )
    return not has_capture or has_live_log or config.option.capture in ("no", "tee-sys")
