"""Work beside training: one piece at a time, in a thread; its errors come out in the caller's."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class BackgroundWriter:
    """Write checkpoints while training goes on.

    A thread of its own and the file format that a synchronous save has, instead of
    `torch.distributed.checkpoint.async_save`: that needs a process group of its own for the ranks to
    talk beside training, and leaves a folder of shards. What stalls training either way is the copy
    of the state that is made first.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._work: Future[None] | None = None

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Start a piece of work, after the one before has ended: no two copies wait in memory.

        Raises:
            Exception: what the work before raised.
        """
        self.wait()
        self._work = self._pool.submit(work, *arguments)

    def check(self) -> None:
        """Raise what a piece of work raised, if it has ended; else go on."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the piece of work; raise what it raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Wait for all that was submitted; raise what it raised."""
        self._pool.shutdown(wait=True)
        self.wait()
