"""Worlds that a test on ranks initialises at an address of its own."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@contextlib.contextmanager
def serving_by_rank_zero(url: str | None, port: int | None) -> Generator[None]:
    """Have rank 0 serve the store, inside, where that is at a port of the test's own.

    Told that an agent serves it, all ranks would wait for somebody to listen there for ever.

    Args:
        url: where the ranks are to meet, None where the environment says.
        port: of the run's own store, which is served; None where that does not count.
    """
    told = os.environ.get(AGENT_STORE)
    if told is None or port is None or not _is_elsewhere(url, port):
        yield
        return
    del os.environ[AGENT_STORE]
    try:
        yield
    finally:
        os.environ[AGENT_STORE] = told


def _is_elsewhere(url: str | None, port: int) -> bool:
    if url is None or url.startswith("env://"):
        return os.environ.get("MASTER_PORT") != str(port)
    if url.startswith("tcp://"):
        return url.partition("?")[0].rstrip("/").rpartition(":")[2] != str(port)
    return False
