"""A process group that tests share, and the proof that it is clean before the next one uses it.

A kept group may hand one test's tensors to the next: a collective that only some ranks issued
stays behind, and the next test's first one meets it. So each rank tells, after each test, what it
did on each group, and the group is used again only where that adds up over all ranks.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat, _compat_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

# A collective that all ranks have issued ends within milliseconds of the last one's coming.
PENDING_SECONDS = 0.5
_STEP_SECONDS = 0.002
_MANY_WORKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """What one rank did on the groups that the next test may use.

    Attributes:
        sequences: name of a group, and how many operations it has issued, None if not known.
        others: groups that the test made and did not destroy.
        pending: operations that were issued and have not ended.
        messages: name of a group, send or recv, this rank and the other there, and how many.
    """

    sequences: tuple[tuple[str, int | None], ...]
    others: int = 0
    pending: int = 0
    messages: tuple[tuple[str, str, int, int, int], ...] = ()


class KeptGroups:
    """The groups of one rank process that the next test may use, and what was done on them."""

    def __init__(self) -> None:
        self._own: list[Any] = []
        self._works: list[Any] = []
        self._messages: Counter[tuple[str, str, int, int]] = Counter()
        self._is_watching: bool | None = None  # None: not yet installed

    def begin(self) -> None:
        """Note which groups there are; watch from now on what is done on them."""
        if self._is_watching is None:
            self._is_watching = _compat_kept.watch_operations(self._note)
        self._own = _compat.all_process_groups()
        self._works.clear()
        self._messages.clear()

    def state(self) -> GroupState | None:
        """Return what this rank knows about its groups, None where it has none.

        Waits shortly for operations that have been issued and not waited for.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            return None
        groups = _compat.all_process_groups()
        end = time.monotonic() + PENDING_SECONDS
        while (pending := self._pending()) and time.monotonic() < end:
            time.sleep(_STEP_SECONDS)
        known = self._own if self._is_watching else []
        state = GroupState(
            sequences=tuple((one.group_name, _compat.sequence_number(one)) for one in known),
            others=sum(all(one is not own for own in known) for one in groups),
            pending=pending,
            messages=tuple((*which, count) for which, count in sorted(self._messages.items())),
        )
        self._works.clear()
        return state

    def forget(self) -> None:
        """Let go of the groups; they are about to be dropped."""
        self._own = []
        self._works.clear()

    def _pending(self) -> int:
        self._works = [work for work in self._works if not work.is_completed()]
        return len(self._works)

    def _note(self, group: Any, operation: str, peer: int | None, work: Any) -> None:
        if not self._own:
            return  # a run that keeps no group
        if peer is not None:
            self._messages[group.group_name, operation, group.rank(), peer] += 1
        if len(self._works) >= _MANY_WORKS:
            self._pending()
        if work is not None:
            self._works.append(work)


def why_unclean(states: Sequence[GroupState | None], *, has_fixtures: bool = False) -> str | None:
    """Return why a kept group must not be used again, None where it is proven clean.

    Args:
        states: what each rank knows, by rank.
        has_fixtures: whether fixtures live on, which may hold groups and have messages on the way.
    """
    told = [state for state in states if state is not None]
    if len(told) < len(states):
        ranks = [str(rank) for rank, state in enumerate(states) if state is None]
        return f"rank {', '.join(ranks)} destroyed it"
    for rank, state in enumerate(told):
        if state.others and not has_fixtures:
            return f"rank {rank} left {state.others} other group{'s' * (state.others > 1)} behind"
        if state.pending:
            return f"rank {rank} left {state.pending} operation{'s' * (state.pending > 1)} pending"
    return _why_uneven(told) or (None if has_fixtures else _why_unanswered(told))


def _why_uneven(states: Sequence[GroupState]) -> str | None:
    by_group: dict[str, dict[int, int | None]] = {}
    for rank, state in enumerate(states):
        for name, count in state.sequences:
            by_group.setdefault(name, {})[rank] = count
    if not by_group:
        return "torch does not tell what was done on it"
    for counts in by_group.values():
        if None in counts.values():
            return "torch does not tell how many collectives it has seen"
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} on rank {rank}" for rank, count in counts.items())
            return f"the ranks issued different numbers of operations: {found}"
    return None


def _why_unanswered(states: Sequence[GroupState]) -> str | None:
    """Compare messages sent with messages received, pair by pair."""
    sent: Counter[tuple[str, int, int]] = Counter()
    received: Counter[tuple[str, int, int]] = Counter()
    for rank, state in enumerate(states):
        for name, operation, me, peer, count in state.messages:
            if operation == "recv_anysource":
                return f"rank {rank} received messages of any rank, which nobody can match"
            if operation == "send":
                sent[name, me, peer] += count
            else:
                received[name, peer, me] += count
    if sent == received:
        return None
    return f"{sent.total()} messages were sent and {received.total()} received, not pair by pair"
