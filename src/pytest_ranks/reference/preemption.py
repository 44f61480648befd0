"""Asked to end: a run finishes its step, saves, and leaves with a status that says so.

Schedulers send a signal some seconds before they take the machine away. It reaches some ranks or all,
at any moment; what the ranks then do has to be one decision, since they meet in collectives.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: a temporary failure, try again. The same on every rank, whichever got
the signal, and whichever signal it was."""

SAME_REQUEST = 2.0
"""Seconds in which a further signal is the first one once more: a terminal's Ctrl-C reaches ranks both
directly and through their launcher."""


class StopRequest:
    """Whether this process was asked to end the run; `Trainer` agrees on it with the other ranks."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked: a signal's name, or the caller's words. None: nothing did."""

    def request(self, reason: str) -> None:
        """Ask the run to end after the step that it is in; the first reason is kept."""
        self.reason = self.reason or reason

    @property
    def requested(self) -> bool:
        """Whether anything asked."""
        return self.reason is not None


@contextmanager
def listen(
    stop: StopRequest,
    *,
    signals: Sequence[str] = SIGNALS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StopRequest]:
    """Turn signals into a request to stop; a second one, seconds later, ends the process at once.

    Handlers are those of the whole process, so this is for a program's main thread; the previous
    ones are put back at the end.

    Args:
        stop: what the signals are kept in.
        signals: by name.
        clock: seconds, which never go back.
    """
    first: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        now = clock()
        if first and now - first[0] > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not first:
            first.append(now)
            name = signal.Signals(number).name
            stop.request(name)
            # A write of its own: Python's buffers may be in use by the code that was interrupted.
            text = f"{name}: the run ends after this step, with a checkpoint; again to end at once"
            os.write(2, f"\n{text}\n".encode())

    numbers = [signal.Signals[name] for name in signals]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
