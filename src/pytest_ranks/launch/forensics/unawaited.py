"""Collectives that a passed test left behind: issued on some ranks, awaited there by nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.forensics.collectives import is_past, issued
from pytest_ranks.launch.reporting.folding import fold, ranks_text
from pytest_ranks.launch.wire import Finished

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_ranks.launch.forensics.sight import Record, Sight
    from pytest_ranks.launch.rank_run import RankRun


def is_uneven(runs: Sequence[RankRun]) -> bool:
    """Return whether ranks that are done count unlike operations on a group that they share.

    That may be right: messages between two ranks count on these two alone.
    """
    counts: dict[str, set[int]] = {}
    for run in runs:
        for message in run.messages:
            if isinstance(message, Finished):
                for name, count in message.sequences:
                    counts.setdefault(name, set()).add(count)
    return any(len(one) > 1 for one in counts.values()) and all(run.done for run in runs)


def unawaited(sights: Mapping[int, Sight]) -> str:
    """Return who left which collective behind that others of its group never issued, or nothing.

    Args:
        sights: what each rank has issued, once all of them are done with the test.
    """
    found: dict[str, tuple[list[int], list[int]]] = {}
    for rank, sight in sorted(sights.items()):
        for record in sight.pending:
            if absent := _absent(record, sight, sights):
                site = f" in {record.site}" if record.site else ""
                text = f"issued {record.what}{site} and never waited for it"
                ranks, _ = found.setdefault(text, ([], absent))
                ranks.append(rank)
    parts = [f"{ranks_text(ranks)} {text}" for text, (ranks, _) in found.items()]
    never = [
        f"{ranks_text(ranks)} never issued {what}"
        for ranks, what in fold(
            (rank, "it" if len(found) == 1 else "them")
            for _, missing in found.values()
            for rank in missing
        )
    ]
    return ", ".join([*parts, *never])


def _absent(record: Record, sight: Sight, sights: Mapping[int, Sight]) -> list[int]:
    """Return the members of a collective's group that are seen and have not come to it."""
    group = sight.groups.get(record.group)
    members = group.ranks if group is not None else tuple(sights)
    return [
        member
        for member in members
        if member in sights
        and issued(sights[member], record) is None
        and not is_past(sights[member], record)
    ]
