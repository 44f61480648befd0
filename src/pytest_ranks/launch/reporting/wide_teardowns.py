"""What went wrong while ranks tore down the fixtures that outlive a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.reporting import failures
from pytest_ranks.launch.reporting.folding import fold, ranks_text
from pytest_ranks.launch.wire import Finished, Raised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.rank_run import RankRun


def errors_of(runs: Sequence[RankRun], *, seconds: float) -> list[str]:
    """Return what each rank raised, how it died or where it was stopped; equal ones once.

    Args:
        runs: of the teardowns.
        seconds: what they were allowed.
    """
    raised = [
        (run.rank, text) for run in runs for message in run.messages for text in _told(message)
    ]
    ended = [failures.of_unfinished(run, output="") for run in runs if not run.done]
    died = [(one.rank, one.headline) for one in ended if one.kind == "died"]
    late = [one for one in ended if one.kind not in ("died", "stopped")]
    errors = [f"{ranks_text(ranks)}: {text}" for ranks, text in fold([*raised, *died])]
    if late:
        errors.append(f"not over after {seconds:g} s: {'; '.join(failures.join_places(late))}")
    return errors


def _told(message: object) -> Sequence[str]:
    if isinstance(message, Finished):
        return message.errors
    return (message.traceback or message.headline,) if isinstance(message, Raised) else ()
