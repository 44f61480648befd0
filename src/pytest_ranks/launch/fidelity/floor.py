"""Where ranks that are threads meet: torch's threaded process group, made to check what it is told.

torch's own takes whatever arrives under one group for one collective, and waits for ever for a
rank that is gone. Here ranks that call different things are told so at once, and ranks that nobody will
ever answer end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat_fidelity
from pytest_ranks.errors import FidelityError
from pytest_ranks.launch.fidelity.refusals import sentence

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

PEER_FAILED = "let go because another rank failed"
ANY_SOURCE = sentence("threads", "recv from any rank", "threads meet by name", "gloo")
_NAMES = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "Broadcast": "broadcast",
    "Scatter": "scatter",
    "Gather": "gather",
    "ReduceScatter": "reduce_scatter",
    "AllToAll": "all_to_all",
    "AllToAllBase": "all_to_all_single",
}
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Floor:
    """Who waits for whom in one run.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._size = size
        self._waiting: dict[int, str] = {}
        self._left: set[int] = set()
        self._is_over = False
        self._stuck = ""
        self.sent: dict[Any, deque[list[torch.Tensor]]] = defaultdict(deque)
        self.wanted: dict[Any, deque[_Receive]] = defaultdict(deque)

    def end(self) -> None:
        """Let all ranks go that wait, because one failed."""
        with self.changed:
            self._is_over = True
            self.changed.notify_all()

    def leave(self, rank: int) -> None:
        """Note that a rank is done: it answers nobody any more."""
        with self.changed:
            self._left.add(rank)
            self._look_for_deadlock()

    def check(self) -> None:
        """End this rank where another one failed already."""
        __tracebackhide__ = True
        if self._is_over:
            # No exception that a test catches by accident; and without a traceback, for which
            # pytest would parse all of torch.distributed, one rank after the other.
            pytest.fail(PEER_FAILED, pytrace=False)

    def wait(self, rank: int, what: str, is_done: Callable[[], bool]) -> None:
        """Wait, holding `changed`, until it is done.

        Raises:
            RuntimeError: nobody will ever come; the first rank that waits says so for all.
        """
        __tracebackhide__ = True
        self.check()
        if is_done():
            return
        self._waiting[rank] = what
        self._look_for_deadlock()
        self.changed.wait_for(lambda: is_done() or self._is_over or self._stuck)
        if is_done():
            self._waiting.pop(rank, None)
            return
        self.check()
        self.end()
        raise RuntimeError(self._stuck)

    def answer(self, ranks: list[int]) -> None:
        """Note, holding `changed`, that these ranks need not wait any more."""
        for rank in ranks:
            self._waiting.pop(rank, None)
        self.changed.notify_all()

    def _look_for_deadlock(self) -> None:
        if not self._waiting or len(self._waiting) + len(self._left) < self._size:
            return
        waits = [f"rank {rank} waits in {what}" for rank, what in sorted(self._waiting.items())]
        left = [f"rank {rank} had finished" for rank in sorted(self._left)]
        self._stuck = f"no rank can go on: {'; '.join([*waits, *left])}"
        self.changed.notify_all()


class _Here(threading.local):
    """What this thread plays, and the collective that it is about to join."""

    rank = 0
    call: Any = None
    floor: Floor | None = None


here = _Here()


class _Receive:
    """A receive that waits for its sender."""

    def __init__(self, tensors: list[torch.Tensor], rank: int) -> None:
        self.tensors = tensors
        self.rank = rank
        self.is_done = False

    def take(self, data: list[torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for mine, theirs in zip(self.tensors, data, strict=True):
                mine.detach().copy_(theirs)
        self.is_done = True


def install() -> None:
    """Have this process's threads be ranks, for good."""
    module = _compat_fidelity.install_threaded_group()
    original = module.ProcessLocalGroup._start_coll.__func__

    def start(cls: Any, collective: Any, group: Any) -> Any:
        here.call = collective
        return original(cls, collective, group)

    module.ProcessLocalGroup._start_coll = classmethod(start)
    module.Collective.join = _join
    module.ProcessLocalGroup.send = _send
    module.ProcessLocalGroup.recv = _recv
    module.ProcessLocalGroup.recv_anysource = _refuse_any_source


def _join(self: Any, rank: int, data: Any) -> Any:
    """Take part in a collective (in the place of `multi_threaded_pg.Collective.join`)."""
    __tracebackhide__ = True
    floor = here.floor
    assert floor is not None
    said = _describe(here.call, data)
    with floor.changed:
        floor.check()
        if not hasattr(self, "said"):
            self.said, self.first, self.members = said, (here.rank, _site()), []
        elif self.said != said:
            first, site = self.first
            floor.end()  # now: the others would find the same and say it too
            raise RuntimeError(
                f"rank {here.rank} calls {said} where rank {first} called {self.said} ({site})"
            )
        self._data[rank] = data
        self._count += 1
        self.members.append(here.rank)
        if self._count == self._world_size:
            self._collective.work(self._data)
            self._done = True
            floor.answer(self.members)
        else:
            floor.wait(here.rank, said, lambda: self._done)
    return _compat_fidelity.finished_work(data)


def _send(self: Any, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
    __tracebackhide__ = True
    floor = here.floor
    assert floor is not None
    key = (self.pg_name, self._rank, to, tag)
    data = [tensor.detach().clone() for tensor in tensors]
    with floor.changed:
        floor.check()
        if floor.wanted[key]:
            receive = floor.wanted[key].popleft()
            _check_match(receive.tensors, data, here.rank, receive.rank)
            receive.take(data)
            floor.answer([receive.rank])
        else:
            floor.sent[key].append(data)
    return _compat_fidelity.finished_work(tensors)


def _recv(self: Any, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
    __tracebackhide__ = True
    floor = here.floor
    assert floor is not None
    key = (self.pg_name, source, self._rank, tag)
    receive = _Receive(tensors, here.rank)
    with floor.changed:
        floor.check()
        if floor.sent[key]:
            data = floor.sent[key].popleft()
            _check_match(tensors, data, source, here.rank)
            receive.take(data)
        else:
            floor.wanted[key].append(receive)

    def wait() -> None:
        with floor.changed:
            what = f"recv from rank {source} of its group"
            floor.wait(here.rank, what, lambda: receive.is_done)

    return _compat_fidelity.waiting_work(wait, lambda: receive.is_done)


def _refuse_any_source(*_: object) -> Any:
    __tracebackhide__ = True
    raise FidelityError(ANY_SOURCE)


def _check_match(
    mine: list[torch.Tensor], theirs: list[torch.Tensor], sender: int, receiver: int
) -> None:
    __tracebackhide__ = True
    if _shapes(mine) != _shapes(theirs):
        raise RuntimeError(
            f"rank {sender} sends {_shapes(theirs)} where rank {receiver} receives {_shapes(mine)}"
        )


def _describe(call: Any, data: Any) -> str:
    """Return what has to be equal on all ranks of a collective."""
    name = _NAMES.get(type(call).__name__, type(call).__name__)
    parts = []
    if (operation := getattr(call, "op", None)) is not None:
        operation = getattr(operation, "op", operation)
        parts.append(str(operation).rpartition(".")[2])
    parts += [f"{side}={getattr(call, side)}" for side in ("src", "dst") if hasattr(call, side)]
    if name in ("all_reduce", "broadcast"):
        parts.append(_shapes(data))
    elif name in ("all_gather", "reduce_scatter"):  # (outputs, inputs)
        parts.append(_shapes(data[0 if name == "all_gather" else 1]))
    return f"{name}({', '.join(parts)})"


def _shapes(tensors: Any) -> str:
    """Return dtypes and shapes, equal ones counted."""
    import torch
    from torch.utils._pytree import tree_leaves

    found: dict[str, int] = {}
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, torch.Tensor):
            text = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
            found[text] = found.get(text, 0) + 1
    return ", ".join(f"{count} x {text}" if count > 1 else text for text, count in found.items())


def _site() -> str:
    """Return file and line of the user's call."""
    frame = sys._getframe(1)
    marks = (f"{os.sep}torch{os.sep}", _HERE)
    while frame.f_back is not None and any(mark in frame.f_code.co_filename for mark in marks):
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
