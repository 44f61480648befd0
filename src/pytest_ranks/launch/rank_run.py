"""What one rank did in one run, as its controller saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch import deadline

if TYPE_CHECKING:
    from pytest_ranks.launch.forensics.sight import Sight


@dataclass(slots=True)
class RankRun:
    """What one rank did in one run.

    Attributes:
        rank: its number.
        messages: what it said, in order, without the greeting.
        done: whether it said that it is done.
        crashed: whether its process ended by itself.
        status: how the process ended, as an exit code or -signal.
        stopped: why we ended it: nothing, `collateral` after another's failure, `abandoned` in
            a collective when the others had finished, `deadlock` when ranks waited for each
            other, `unready` when the ranks never got to start, `frozen` as its test had asked,
            or `deadline`.
        at: CLOCK_MONOTONIC seconds at which its end was seen.
        output: the end of what it wrote outside of pytest's capture.
        captured: the end of what pytest's capture held when the process ended.
        stacks: dump of all its threads, or of the fatal error that ended it.
        where: one line on where its main thread was.
        threads: the threads that play ranks, where the process plays several.
        sight: what its witness saw before a rank was stopped.
        note: what is known of how it was killed.
        is_frozen: whether it stopped itself, as its test had asked.
        start_seconds: how long it had to get to its start.
    """

    rank: int
    messages: list[Any] = field(default_factory=list)
    done: bool = False
    crashed: bool = False
    status: int | None = None
    stopped: str = ""
    at: float = 0.0
    output: str = ""
    captured: str = ""
    stacks: str = ""
    where: deadline.Where | None = None
    threads: tuple[int, ...] = ()
    sight: Sight | None = None
    note: str = ""
    is_frozen: bool = False
    start_seconds: float = 0.0
