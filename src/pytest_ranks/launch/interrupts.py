"""Ctrl-C and SIGTERM in the controller while a test runs on ranks: a summary that names the test."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

STATUS = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM ended


@contextlib.contextmanager
def naming(node_id: str, world_size: int) -> Iterator[None]:
    """Have what interrupts the session name the test and its ranks.

    SIGTERM, which comes from a batch system or CI whose time is up, would else end pytest
    without a word. A handler that the user has set is left alone.
    """
    what = f"{node_id} ran on {world_size} ranks" if world_size > 1 else f"{node_id} ran on a rank"

    def end(*_: object) -> NoReturn:
        pytest.exit(f"SIGTERM came while {what}", returncode=STATUS)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise
        raise KeyboardInterrupt(f"while {what}") from None
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
