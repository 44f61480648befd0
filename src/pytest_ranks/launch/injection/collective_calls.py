"""Every collective that this process issues, counted and let through, whoever issues it.

They are seen where torch dispatches them (`c10d::allreduce_` and its like), not in
`torch.distributed`: DDP's reducer, FSDP and DTensor issue theirs from C++ or under other names.
Group classes written in Python that answer themselves do not come by there.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

# torch's operators (torch/csrc/distributed/c10d/Ops.cpp) -> what torch.distributed calls them.
NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce_coalesced",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather_coalesced",
    "_allgather_base_": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "barrier": "barrier",
    "monitored_barrier_": "monitored_barrier",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
}
POINT_TO_POINT = frozenset({"send", "recv"})
# Ends only when all ranks were in it, while the others return once they are under way.
WAITING = frozenset({"monitored_barrier"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """One collective that is about to be issued.

    Attributes:
        name: as in torch.distributed.
        number: how many of this name there were in this process, with this one.
        total: how many of any name.
        group: name of its group, equal on all members.
        group_number: how many there were in this group, with this one; sends and receives,
            which not every member issues, do not count.
        group_size: how many ranks its group has.
        group_rank: this rank's place in it.
        arguments: of the operator.
    """

    name: str
    number: int
    total: int
    group: str
    group_number: int
    group_size: int
    group_rank: int
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.name}#{self.number}"


class Collectives:
    """Counts the collectives of this process, from `start` to `stop`.

    Args:
        around: called for each with what is issued and a function that issues it; its result is
            what the issuer gets.
    """

    def __init__(self, around: Callable[[Issued, Callable[[], Any]], Any]) -> None:
        self.counts: Counter[str] = Counter()
        self._around = around
        self._in_group: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._remove: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin to count.

        Raises:
            UnavailableError: this torch lets nobody see them.
        """
        __tracebackhide__ = True
        self._remove = _compat.intercept_operators("c10d", tuple(NAMES), self._see)
        if self._remove is None:
            import torch

            raise UnavailableError(
                f"collectives cannot be seen in torch {torch.__version__}: it lacks the names of "
                "its dispatcher that this needs (found in 2.11 to 2.13)."
            )

    def stop(self) -> None:
        """Stop counting, and leave torch as it was."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    def _see(self, operator: str, arguments: tuple[Any, ...], issue: Callable[[], Any]) -> Any:
        __tracebackhide__ = True
        group = _compat.process_group_among(arguments)
        if group is None:
            return issue()
        name = NAMES[operator]
        with self._lock:
            self.counts[name] += 1
            if name not in POINT_TO_POINT:
                self._in_group[group.group_name] += 1
            issued = Issued(
                name=name,
                number=self.counts[name],
                total=self.counts.total(),
                group=group.group_name,
                group_number=self._in_group[group.group_name],
                group_size=group.size(),
                group_rank=group.rank(),
                arguments=arguments,
            )
        return self._around(issued, issue)
