"""Collectives that take as long as a slower network would make them.

The model is the usual one of a ring: a collective of n ranks takes

    steps * latency + bytes / bandwidth

from the moment when all of its ranks have come, where steps and bytes are what each rank sends
one after another (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009). The collectives of a rank queue, as on one connection. Data are exchanged at
once and handed over late, so that work which overlaps them still does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_ranks.launch.injection.collective_calls import Issued


def cost(issued: Issued) -> tuple[int, float]:
    """Return the steps that a collective takes one after another, and the bytes that a rank moves."""
    n = issued.group_size
    if n == 1:
        return 0, 0.0
    first, second = (_bytes(issued.arguments[:1]), _bytes(issued.arguments[1:2]))
    match issued.name:
        case "all_reduce" | "all_reduce_coalesced":
            return 2 * (n - 1), 2 * (n - 1) / n * first
        case "barrier" | "monitored_barrier":  # an all_reduce of nothing
            return 2 * (n - 1), 0.0
        case "all_gather" | "all_gather_coalesced" | "all_gather_into_tensor":
            return n - 1, (n - 1) * second  # operators take outputs first, then inputs
        case "reduce_scatter" | "reduce_scatter_tensor":
            return n - 1, (n - 1) * first
        case "all_to_all" | "all_to_all_single":
            return n - 1, (n - 1) / n * second
        case "broadcast" | "reduce":  # in a pipeline along the ring
            return n - 1, first
        case "gather" | "scatter":  # the root has one link for all
            own = second if issued.name == "gather" else first
            is_root = issued.arguments[3] == issued.group_rank
            return 1, (n - 1 if is_root else 1) * own
    return 1, first  # send, recv


def _bytes(value: Any) -> float:
    """Return the bytes of all tensors in nested lists."""
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return float(value.numel() * value.element_size()) if hasattr(value, "numel") else 0.0


class SlowLink:
    """A link between this rank and the others.

    Args:
        bandwidth: bytes a second, infinite where only the latency is to be felt.
        latency: seconds a step.
    """

    def __init__(self, *, bandwidth: float, latency: float) -> None:
        self.slowed = 0
        self._bandwidth = bandwidth
        self._latency = latency
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._works: list[Any] = []

    def seconds(self, issued: Issued) -> float:
        """Return what a collective takes."""
        steps, moved = cost(issued)
        return steps * self._latency + moved / self._bandwidth

    def slow(self, issued: Issued, issue: Callable[[], Any]) -> Any:
        """Issue a collective; what comes back is over when the link has carried it."""
        self.slowed += 1
        seconds = self.seconds(issued)
        result = issue()
        boxed = result[-1] if isinstance(result, tuple) else result
        work = _compat.unbox_work(boxed)
        if work is None:  # it waited for the others itself
            _sleep_until(self._due(seconds))
            return result
        slow = _slow_work(work, lambda: self._due(seconds))
        # torch holds the part in C++; ours goes with the last reference from Python
        self._works.append(slow)
        return (*result[:-1], slow.boxed()) if isinstance(result, tuple) else slow.boxed()

    def _due(self, seconds: float) -> float:
        """Return when a transfer that could start now is over; it holds the link until then."""
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + seconds
            return self._free_at


def _slow_work(work: Any, due: Callable[[], float]) -> Any:
    """Return a work that is over when the given one is, and the time that is due then has come."""

    class SlowWork(_compat.work_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._lock = threading.Lock()
            self._due: float | None = None
            self._future: Any = None
            with contextlib.suppress(RuntimeError):  # gloo's sends and receives have none
                self._future = work.get_future()
                self._future.add_done_callback(lambda _: self._end())

        def _end(self) -> float:
            with self._lock:
                if self._due is None:
                    self._due = due()
                return self._due

        def wait(self, timeout: Any = None) -> bool:
            result = bool(work.wait() if timeout is None else work.wait(timeout))
            _sleep_until(self._end())
            return result

        def is_completed(self) -> bool:
            return bool(work.is_completed()) and time.monotonic() >= self._end()

        def get_future(self) -> Any:
            return _late(work.get_future() if self._future is None else self._future, self._end)

        def exception(self) -> Any:
            return work.exception()

        def source_rank(self) -> int:
            return int(work.source_rank())

        def result(self) -> Any:
            return work.result()

    return SlowWork()


def _late(future: Any, end: Callable[[], float]) -> Any:
    """Return a future with another's outcome, at the time that is due when that is there."""
    import torch

    late: Any = torch.futures.Future()

    def hand_over() -> None:
        try:
            value = future.wait()
        except Exception as error:
            late.set_exception(error)
            return
        _sleep_until(end())
        late.set_result(value)

    threading.Thread(target=hand_over, name="pytest-ranks-slow-link", daemon=True).start()
    return late


def _sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
