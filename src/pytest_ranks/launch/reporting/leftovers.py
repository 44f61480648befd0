"""What a test left behind in its ranks: noted on its report, or what it fails for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_ranks import _compat
from pytest_ranks.launch.reporting.folding import ranks_text
from pytest_ranks.launch.reporting.reports import PhaseOutcome, reproduce
from pytest_ranks.launch.wire import Finished, Leak

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.reporting.reports import ItemOutcome

# Titles of sections; the last word puts them on the report of the teardown, as pytest's own.
PUT_BACK = "Put back after teardown"
RETIRED = "Left behind after teardown"
ADVICE = (
    "undo it in the test or in the teardown of its fixture (monkeypatch does), or set "
    "ranks_strict_hygiene=false: then what can be put back is, and else the ranks are replaced"
)


def is_dirty(runs: Sequence[RankRun]) -> bool:
    """Return whether ranks hold something that could not be put back."""
    return any(not leak.restored for _, leak in _leaks(runs))


def judge(
    item: pytest.Item, decided: ItemOutcome, runs: Sequence[RankRun], *, is_strict: bool
) -> ItemOutcome:
    """Note on an outcome what its test left behind; with strict hygiene that is a failure."""
    found: dict[Leak, list[int]] = {}
    for rank, leak in dict.fromkeys(_leaks(runs)):  # two equal ones of a rank are said once
        found.setdefault(leak, []).append(rank)
    if not found:
        return decided
    sections = [
        (f"{RETIRED if not leak.restored else PUT_BACK} ({ranks_text(ranks)})", leak.what)
        for leak, ranks in found.items()
    ]
    decided.sections.extend(_joined(sections))
    if not is_strict or not decided.is_clean:
        return decided
    head = f"{item.name} leaked {_by_ranks(found)}"
    longrepr = _compat.make_longrepr(item, head=head, inner=None, text=ADVICE, tail=reproduce(item))
    # a skip or an expected failure stays what it is: the error is one of the teardown
    when = "call" if decided.verdict == "passed" else "teardown"
    failed = PhaseOutcome(outcome="failed", text=head, longrepr=longrepr)
    verdict = "failed" if when == "call" else "error"
    return replace(decided, verdict=verdict, when=when, phases={**decided.phases, when: failed})


def _leaks(runs: Sequence[RankRun]) -> Iterator[tuple[int, Leak]]:
    for run in runs:
        for message in run.messages:
            if isinstance(message, Finished):
                for leak in message.leaks:
                    yield run.rank, leak


def _joined(sections: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return sections with the lines of equal titles together."""
    by_title: dict[str, list[str]] = {}
    for title, line in sections:
        by_title.setdefault(title, []).append(line)
    return [(title, "\n".join(lines)) for title, lines in by_title.items()]


def _by_ranks(found: dict[Leak, list[int]]) -> str:
    """Return `on ranks 0 and 1: environment A='1' (was unset); on rank 1: ...`."""
    by_ranks: dict[str, list[str]] = {}
    for leak, ranks in found.items():
        by_ranks.setdefault(ranks_text(ranks), []).append(leak.what)
    return "; ".join(f"on {ranks}: {'; '.join(lines)}" for ranks, lines in by_ranks.items())
