"""What a session on ranks did, as data: the content of the JSON report.

A field is only ever added; when one changes its meaning or goes, `SCHEMA_VERSION` grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1
# Attribute of a pytest report that carries an item's record to whoever writes the file.
ATTRIBUTE = "ranks_record"
# Characters of one text; a message of megabytes stays in the terminal's report.
MOST_TEXT = 100_000
# Characters of one captured section of a rank: how it began, and more of what came before its end.
FIRST_OUTPUT, LAST_OUTPUT = 20_000, 79_900


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """One phase of an item on one rank.

    Attributes:
        when: setup, call or teardown.
        outcome: passed, failed or skipped.
        seconds: how long it took there.
    """

    when: str
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRecord:
    """Something that a rank wrote.

    Attributes:
        name: where it was caught, such as `Captured stdout call`.
        text: what it wrote.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """What one rank made of an item.

    Attributes:
        rank: its number.
        status: passed, skipped, xfailed, xpassed, strict_xpass, failed, error, timed_out, crashed,
            stopped (by us, after another rank had failed), died_as_expected or survived.
        headline: how it failed, in one line; empty where it did not.
        is_collateral: whether it only felt that another rank failed.
        traceback: of what it raised; empty where it raised nothing.
        phases: its reports, in order.
        exit_code: of its process, where that ended by itself.
        signal: name of the signal that its process died of.
        stacks: of all its threads, where it died or was stopped.
        output: what it wrote.
    """

    rank: int
    status: str
    headline: str = ""
    is_collateral: bool = False
    traceback: str = ""
    phases: Sequence[PhaseRecord] = ()
    exit_code: int | None = None
    signal: str | None = None
    stacks: str = ""
    output: Sequence[OutputRecord] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """One run of one item on ranks.

    Attributes:
        node_id: of the item.
        world_size: number of ranks.
        mesh: mesh dimension -> size, in order.
        backend: of the process group.
        fidelity: how real the ranks were.
        verdict: passed, skipped, xfailed, xpassed, strict_xpass, failed, error, timed_out,
            crashed, disagree, or not_run where no rank came to it.
        outcome: what pytest counts it as: passed, failed or skipped.
        when: the phase that the verdict belongs to.
        seconds: phase -> time of the slowest rank.
        root_rank: the rank that failed first.
        headline: the verdict in one line; empty for a pass.
        explanations: what was found out about the failure.
        text: the whole text of the failure, as on the terminal.
        reproduce: the command that runs this item alone.
        ranks: what each rank made of it.
        attempt: 1, or more where an item was run again.
        worker: of pytest-xdist, that ran it.
    """

    node_id: str
    world_size: int
    mesh: Mapping[str, int]
    backend: str
    fidelity: str
    verdict: str
    outcome: str
    when: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    root_rank: int | None = None
    headline: str = ""
    explanations: Sequence[str] = ()
    text: str = ""
    reproduce: str = ""
    ranks: Sequence[RankRecord] = ()
    attempt: int = 1
    worker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """One session.

    Attributes:
        schema_version: of this description.
        pytest_ranks: our version.
        pytest: its version.
        python: its version.
        started: when, ISO 8601 in UTC.
        seconds: how long it took.
        exit_status: of the session.
        ended: `finished`, or `interrupted`.
        reason: why it was interrupted, empty where it was not.
        unfinished: node ids of items that were at work when it was interrupted.
        counts: verdict -> number of items.
        items: the runs of items on ranks, in the order in which they ended.
    """

    schema_version: int
    pytest_ranks: str
    pytest: str
    python: str
    started: str
    seconds: float
    exit_status: int
    ended: str
    reason: str
    unfinished: Sequence[str]
    counts: Mapping[str, int]
    items: Sequence[Mapping[str, Any]]


def shorten(text: str) -> str:
    """Return a text with its middle left out where it is too long to be read."""
    return _keep_ends(text, MOST_TEXT // 2, MOST_TEXT // 2)


def shorten_sections(sections: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return captured output with the middle of each section left out where it is too long."""
    return [(name, _keep_ends(text, FIRST_OUTPUT, LAST_OUTPUT)) for name, text in sections]


def _keep_ends(text: str, first: int, last: int) -> str:
    left = len(text) - first - last
    if left <= 0:
        return text
    return f"{text[:first]}\n[... {left} characters left out ...]\n{text[-last:]}"
