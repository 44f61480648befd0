"""Failures of ranks put in order, root cause first, and described."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.launch import deadline
from pytest_ranks.launch.processes import describe_end
from pytest_ranks.launch.reporting.folding import fold, likeness, ranks_text
from pytest_ranks.launch.wire import Injected, Raised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.rank_run import RankRun

# Seconds that a loaded controller may need to see that a process has ended.
SEEN_LATE = 1.0

# Of other ranks than the first, in one report; the JSON report has all.
MOST_TRACEBACKS = 8

# What gloo and the store say on a rank whose peer went away (gloo/transport/tcp/pair.cc,
# torch/csrc/distributed/c10d/TCPStore.cpp); the rank that says it is not the cause.
_PEER_WENT = re.compile(
    r"Connection closed by peer|Connection reset by peer|Read error \[|Write error \[|Broken pipe"
    r"|Socket closed|recvBytes failed|sendBytes failed|Application timeout caused pair closure"
    r"|Timed out waiting \d+ms for (?:recv|send) operation"
    r"|let go because another rank failed"  # fidelity.floor.PEER_FAILED
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: its number.
        kind: `raised`, `died`, `alive` (its mark declares its death), `deadline` (still at work
            when the time was up), `abandoned` (in a collective when the others had finished),
            `deadlock` (at work when ranks waited for each other), `unready` (before the work
            could start) or `stopped` (still at work after another rank had failed).
        headline: one line.
        text: the traceback, or the stacks.
        at: CLOCK_MONOTONIC seconds.
        output: the end of what the rank wrote.
        where: where its main thread was, if it was stopped.
        place: the collective that an exception came out of, if it did.
        phase: setup, call or teardown, where a report tells.
        line: `file:line` of the user's code, where it is known.
        felt_peer: whether the exception was raised over one that says that a peer went away.
        follows: whether the same rank had failed already.
        start_seconds: how long it had to get to its start.
    """

    rank: int
    kind: str
    headline: str
    text: str = ""
    at: float = 0.0
    output: str = ""
    where: deadline.Where | None = None
    place: str = ""
    phase: str = ""
    line: str = ""
    felt_peer: bool = False
    follows: bool = False
    start_seconds: float = 0.0

    @property
    def is_collateral(self) -> bool:
        """Whether this is what happens to a rank when another one goes away."""
        is_felt = self.felt_peer or says_peer_went(self.headline)
        return self.kind == "stopped" or (self.kind == "raised" and is_felt)

    @property
    def brief(self) -> str:
        """The headline without what torch guesses."""
        return self.headline.split(" This is typically caused by")[0]

    @property
    def cause_at(self) -> float:
        """When it happened, at the latest: we see a death after peers may have felt it."""
        is_first_sign = self.kind == "died" and not self.follows
        return self.at - SEEN_LATE if is_first_sign else self.at

    def is_like(self, other: Failure) -> bool:
        """Whether another rank failed in the same way at the same place."""
        return self.kind == other.kind and likeness(self.headline + self.text) == likeness(
            other.headline + other.text
        )


def says_peer_went(text: str) -> bool:
    """Return whether an error text only says that another rank went away."""
    return _PEER_WENT.search(text) is not None


_HINTS = (
    (
        re.compile(r"op\.preamble\.length <= op\.nbytes"),
        "hint: gloo aborts a rank that receives more than it asked for: the ranks called "
        "collectives with different shapes or dtypes, or different collectives.",
    ),
)


def hints(failures: Sequence[Failure]) -> list[str]:
    """Return what known error texts mean, each once."""
    texts = [f"{one.headline}\n{one.text}\n{one.output}" for one in failures]
    return [hint for pattern, hint in _HINTS if any(map(pattern.search, texts))]


def stacks(failures: Sequence[Failure]) -> list[str]:
    """Return the stacks of ranks that were stopped or died, equal ones once."""
    found = fold((one.rank, one.text) for one in failures if one.kind != "raised" and one.text)
    return [f"\nstacks of {ranks_text(numbers)}:\n{text}" for numbers, text in found]


def tracebacks(root: Failure | None, others: Sequence[Failure]) -> list[str]:
    """Return the tracebacks of ranks that failed in another way than the first, equal ones once."""
    found = fold(
        (one.rank, one.text)
        for one in others
        if one.kind == "raised"
        and not one.is_collateral
        and not one.headline.endswith(one.text.strip())
        if root is None or not one.is_like(root)
    )
    shown = [f"\ntraceback of {ranks_text(ranks)}:\n{text}" for ranks, text in found]
    left = [rank for ranks, _ in found[MOST_TRACEBACKS:] for rank in ranks]
    more = [f"\nleft out: the tracebacks of {ranks_text(left)}"] if left else []
    return [*shown[:MOST_TRACEBACKS], *more]


def collateral_lines(failures: Sequence[Failure]) -> list[str]:
    """Return one line about the ranks that only felt another one's failure, equal ones once."""
    texts = [(one.rank, one.brief) for one in failures if one.is_collateral]
    return [f"collateral: {ranks_text(numbers)} {text}" for numbers, text in fold(texts)]


def of_raised(run: RankRun, raised: Raised, *, output: str) -> Failure:
    """Return the failure of a rank that told what was raised in it."""
    return Failure(
        rank=run.rank,
        kind="raised",
        headline=raised.headline,
        text=raised.traceback,
        at=raised.at,
        output=output,
        place=raised.place,
    )


def of_function(run: RankRun) -> Failure | None:
    """Return how a rank that ran a function failed, None where it returned."""
    last = run.messages[-1] if run.messages else None
    output = run.output.strip()
    if isinstance(last, Raised):
        return of_raised(run, last, output=output)
    if run.done:
        return None
    return of_unfinished(run, output=output)


def of_unfinished(run: RankRun, *, output: str, follows: bool = False) -> Failure:
    """Return how a rank failed that never said it was done.

    Args:
        run: what the rank did.
        output: the end of what it wrote.
        follows: whether it had reported a failure before.
    """
    injected = [one for one in run.messages if isinstance(one, Injected)]
    why = "".join(f", after {one.call} {one.place}" for one in injected)
    if run.crashed:
        return Failure(
            rank=run.rank,
            kind="died",
            headline=f"{describe_end(run.status)} without a report{why}",
            text=deadline.trim(run.stacks),
            at=run.at,
            output=output,
            follows=follows,
        )
    kind = "stopped" if run.stopped == "collateral" else run.stopped
    place = str(run.where) if run.where is not None else "a place that its stacks do not show"
    return Failure(
        rank=run.rank,
        kind=kind,
        headline=f"was in {place}{why}",
        text=deadline.trim(run.stacks),
        at=run.at,
        output=output,
        where=run.where,
        start_seconds=run.start_seconds,
    )


def in_order(failures: Sequence[Failure]) -> list[Failure]:
    """Return failures with the root cause first: true ones by time, then collateral ones."""
    return sorted(failures, key=lambda one: (one.is_collateral, one.cause_at))


def describe(
    failures: Sequence[Failure],
    *,
    world_size: int,
    timeout: float,
    explanations: Sequence[str] = (),
) -> str:
    """Return the text of a failed run; the failures are in order."""
    first, rest = failures[0], failures[1:]
    lines = [headline(failures, world_size=world_size, timeout=timeout), *explanations]
    lines += hints(failures)
    if first.kind == "raised":
        lines += ["", f"traceback of rank {first.rank}:", first.text.rstrip()]
    lines += _output(first)
    for line in collateral_lines(rest):
        lines += ["", line]
    for other in rest:
        if other.is_collateral or other.is_like(first):
            continue
        if other.kind == "raised":
            lines += ["", f"rank {other.rank} failed too:", other.text.rstrip(), *_output(other)]
        else:
            lines += _output(other)
    return "\n".join([*lines, *stacks(failures)])


def _output(failure: Failure) -> list[str]:
    if not failure.output:
        return []
    return ["", f"output of rank {failure.rank}, its end:", failure.output]


def headline(failures: Sequence[Failure], *, world_size: int, timeout: float) -> str:
    """Return the one line that names the rank, what happened, and what became of the others."""
    first = failures[0]
    if first.kind == "unready":
        late = [one for one in failures if one.kind == "unready"]
        return (
            f"the ranks were not ready after {first.start_seconds:g} s (--ranks-join-timeout) of "
            f"importing, collecting and joining: {'; '.join(join_places(late))}"
        )
    if first.kind == "deadline":
        late = [one for one in failures if one.kind == "deadline"]
        places = "; ".join(join_places(late))
        done = _others(failures, world_size)
        others = f"; {ranks_text(done)} had finished" if done else ""
        return f"timed out after {timeout:g} s: {places}{others}"
    if first.kind == "deadlock":
        left = [one for one in failures if one.kind == "deadlock"]
        return f"deadlock: {'; '.join(join_places(left))}"
    if first.kind == "abandoned":
        left = [one for one in failures if one.kind == "abandoned"]
        waited = "; ".join(join_places(left))
        return (
            f"{waited}, waiting for {ranks_text(_others(failures, world_size))} that had finished"
        )
    if first.kind == "alive":
        alive = [one for one in failures if one.kind == "alive"]
        return "; ".join(f"rank {one.rank} {one.headline}" for one in alive)
    others = _what_others_did(first, [one for one in failures[1:] if one.kind != "alive"])
    verb = "failed first" if world_size > 1 else "failed"
    return f"rank {first.rank} of {world_size} {verb}{others}: {first.headline}"


def headline_of_one(failure: Failure, who: str, *, timeout: float) -> str:
    """Return the one line for a body that ran once, for one rank of many or for all of them."""
    if failure.kind == "deadline":
        return f"timed out after {timeout:g} s: {who} {failure.headline}"
    return f"{who} failed: {failure.headline}"


def _others(failures: Sequence[Failure], world_size: int) -> list[int]:
    return sorted(set(range(world_size)) - {one.rank for one in failures})


def join_places(late: Sequence[Failure]) -> list[str]:
    """Return where ranks were when their time was up, those at one place together."""
    by_place: dict[str, list[int]] = {}
    for one in late:
        by_place.setdefault(one.headline, []).append(one.rank)
    return [
        f"{ranks_text(numbers)} {place.replace('was in', 'were in' if numbers[1:] else 'was in')}"
        for place, numbers in by_place.items()
    ]


def _what_others_did(first: Failure, others: Sequence[Failure]) -> str:
    parts = []
    for numbers, what in fold((one.rank, _fate(first, one)) for one in others):
        was = "was " if len(numbers) == 1 else "were "
        parts.append(f"{ranks_text(numbers)} {was if what.startswith(_PASSIVE) else ''}{what}")
    return f" ({'; '.join(parts)})" if parts else ""


_PASSIVE = ("stopped", "cut off")


def _fate(first: Failure, other: Failure) -> str:
    if other.kind == "stopped":
        place = other.where.collective or other.where.function if other.where else "unknown code"
        return f"stopped in {place}"
    if other.is_collateral:
        return f"cut off in {other.place}" if other.place else "cut off by that"
    if other.kind == "raised" and other.is_like(first):
        return "failed the same way"
    return "died too" if other.kind == "died" else "failed too"
