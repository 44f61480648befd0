"""What ranks printed and recorded, as sections and properties of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.reporting.folding import fold, ranks_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.outcome import RankResult
    from pytest_ranks.launch.reporting.failures import Failure

ORDER = ("setup", "call", "teardown")
# Lines of a dead rank's output that stand in the text of the failure; the section has the rest.
LAST_LINES = 5


def captured(results: Sequence[RankResult]) -> list[tuple[str, str]]:
    """Return the ranks' captured output, equal texts once."""
    found: dict[tuple[str, str], list[int]] = {}
    for result in results:
        seen: set[tuple[str, str]] = set()
        for phase in result.phases:
            for name, text in phase.report.get("sections") or ():
                if (name, text) not in seen:  # each report repeats those of earlier phases
                    seen.add((name, text))
                    found.setdefault((name, text), []).append(result.rank)
    order = sorted(found.items(), key=lambda entry: entry[1])
    return [(f"{name} ({ranks_text(ranks)})", text) for (name, text), ranks in order]


def of_failures(failures: Sequence[Failure]) -> list[tuple[str, str]]:
    """Return what ranks had written that could not report it."""
    texts = fold((one.rank, one.output) for one in failures if one.output)
    return [(f"Captured output ({ranks_text(ranks)})", text) for ranks, text in texts]


def until(when: str, sections: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the sections that a report of this phase has: its own and those of earlier phases."""
    later = [f" {name} (rank" for name in ORDER[ORDER.index(when) + 1 :]]
    return [(name, text) for name, text in sections if not any(part in name for part in later)]


def last_lines(failures: Sequence[Failure]) -> list[str]:
    """Return the last lines that ranks wrote before they died or were stopped."""
    lines: list[str] = []
    silent = [one for one in failures if one.kind != "raised" and one.output]
    for ranks, text in fold((one.rank, "\n".join(_tail(one.output))) for one in silent):
        lines += [
            f"last output of {ranks_text(ranks)}:",
            *(f"  {line}" for line in text.split("\n")),
        ]
    return lines


def _tail(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip()][-LAST_LINES:]


def properties(results: Sequence[RankResult]) -> list[tuple[str, object]]:
    """Return what was recorded with `record_property`: rank 0's, and what others say otherwise."""
    found: list[tuple[str, object]] = []
    for result in results:
        for phase in result.phases[-1:]:
            for name, value in phase.report.get("user_properties") or ():
                if result.rank == 0:
                    found.append((name, value))
                elif (name, value) not in found:
                    found.append((f"{name} (rank {result.rank})", value))
    return found
