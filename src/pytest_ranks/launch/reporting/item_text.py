"""The lines of a failed item's report below its headline, and the headline of a disagreement."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_ranks.launch import outcome
from pytest_ranks.launch.reporting import failures
from pytest_ranks.launch.reporting.folding import fold, ranks_text
from pytest_ranks.launch.wire import Injected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_ranks.launch.outcome import ExpectedEnd, RankResult
    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.reporting.failures import Failure


def disagreement(results: list[RankResult], found: Sequence[Failure]) -> str:
    """Return the headline where ranks that did not fail came to different results."""
    cut = {
        one.rank: f"was cut off in {one.place or 'its work'}" for one in found if one.is_collateral
    }
    texts = [
        (one.rank, cut.get(one.rank, one.status).replace("strict_xpass", "xpassed (strict)"))
        for one in results
    ]
    parts = [f"{ranks_text(ranks)} {status}" for ranks, status in fold(texts)]
    return f"the ranks disagree: {', '.join(parts)}"


def lines_of_others(others: Sequence[Failure], root: Failure | None) -> list[str]:
    """Return a line for each way in which other ranks failed; the headline has the rest."""
    lines = failures.collateral_lines(others)
    told = [one for one in others if not one.is_collateral]
    raised = [
        (one.rank, f"failed too: {one.headline}{_at(one)}")
        for one in told
        if one.kind == "raised" and not (root is not None and one.is_like(root))
    ]
    died = [(one.rank, one.headline) for one in told if one.kind in ("died", "alive")]
    return [*lines, *(f"{ranks_text(ranks)} {text}" for ranks, text in fold([*raised, *died]))]


def lines_of_what_was_asked_for(
    runs: list[RankRun], results: list[RankResult], ends: Mapping[int, ExpectedEnd]
) -> list[str]:
    """Return a line for each declared death and each injected fault that happened."""
    texts = [
        (one.rank, f"was expected to {ends[one.rank].text}, and did")
        for one in results
        if one.status == outcome.DIED_AS_EXPECTED and one.rank in ends
    ]
    faults = [
        f"injected on rank {run.rank}: {one.call} {one.place}"
        for run in runs
        for one in run.messages
        if isinstance(one, Injected)
    ]
    return [*(f"rank {rank} {text}" for rank, text in texts), *faults]


def lines_of_later(later: Sequence[Failure]) -> list[str]:
    """Return a line for each failure of a rank that had failed before."""
    texts = [
        (one.rank, f"then {one.headline}" if one.kind == "died" else _in_phase(one))
        for one in later
        if one.kind == "died" or not one.is_collateral
    ]
    return [f"{ranks_text(ranks)} {text}" for ranks, text in fold(texts)]


def _in_phase(failure: Failure) -> str:
    where = f"in {failure.phase} " if failure.phase else ""
    return f"then failed {where}too: {failure.headline}{_at(failure)}"


def _at(failure: Failure) -> str:
    return f" ({os.path.relpath(failure.line)})" if failure.line else ""
