"""What failed on a rank that ran an item, read from its reports and from how its process ended."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.launch.outcome import DIED_AS_EXPECTED
from pytest_ranks.launch.reporting import failures
from pytest_ranks.launch.reporting.failures import Failure
from pytest_ranks.launch.wire import Finished, Phase, Raised

if TYPE_CHECKING:
    from pytest_ranks.launch.outcome import ExpectedEnd, RankResult
    from pytest_ranks.launch.rank_run import RankRun

MOST_CHARACTERS = 500  # of a headline; the report below it has all of the message


def failures_of(
    run: RankRun, result: RankResult, expected_end: ExpectedEnd | None
) -> list[Failure]:
    """Return all that failed on a rank, in order of time; the first is the rank's own cause."""
    found = [_of_phase(run.rank, phase) for phase in result.phases if phase.outcome == "failed"]
    if result.status == "survived" and expected_end is not None:
        headline = f"was expected to {expected_end.text}, it {result.own_word}"
        # after what others failed of: that tells more
        return [Failure(rank=run.rank, kind="alive", headline=headline, at=math.inf)]
    if result.status == DIED_AS_EXPECTED:
        return found
    found += _outside_of_phases(run)
    output = (run.output + run.captured).strip()
    if not found and run.done and result.status == "crashed":
        seen = ", ".join(phase.when for phase in result.phases) or "none"
        headline = f"did not report each phase exactly once (reported: {seen})"
        found.append(Failure(rank=run.rank, kind="raised", headline=headline, at=run.at))
    if not run.done and (run.crashed or not found):
        follows = bool(found)
        end = failures.of_unfinished(run, output=output, follows=follows)
        if expected_end is not None and end.kind == "died":
            headline = f"{end.headline}, it was expected to {expected_end.text}"
            end = replace(end, headline=headline)
        found.append(end)
    return sorted(found, key=lambda one: one.at)


def _of_phase(rank: int, phase: Phase) -> Failure:
    longrepr = phase.report.get("longrepr")
    messages = _messages(longrepr)
    return Failure(
        rank=rank,
        kind="raised",
        headline=_headline(messages[-1]),
        text=_compat.longrepr_text(longrepr),
        at=phase.at,
        place=phase.place,
        phase=phase.when,
        line=_line(longrepr),
        felt_peer=any(map(failures.says_peer_went, messages)),
    )


def _outside_of_phases(run: RankRun) -> list[Failure]:
    output = (run.output + run.captured).strip()
    found: list[Failure] = []
    for message in run.messages:
        if isinstance(message, Raised):
            found.append(failures.of_raised(run, message, output=output))
        elif isinstance(message, Finished) and (message.missing or message.errors):
            text = message.missing or "\n".join(message.errors)
            headline = text.splitlines()[0]
            found.append(
                Failure(rank=run.rank, kind="raised", headline=headline, text=text, at=run.at)
            )
    return found


def _messages(longrepr: Any) -> list[str]:
    """Return the messages of a chain of exceptions; what was raised is the last."""
    if not isinstance(longrepr, dict):
        return [str(longrepr)]
    crashes = [crash for _, crash, _ in longrepr.get("chain") or () if crash]
    crashes.append(longrepr.get("reprcrash") or {"message": "failed"})
    return [str(crash["message"]) for crash in crashes]


def _headline(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    if lines and lines[0].startswith("file "):  # where pytest looked for a fixture, then the error
        lines = [line[1:].strip() for line in lines if line.startswith("E  ")] or lines
    first = lines[0] if lines else "failed"
    left_out = len(first) - MOST_CHARACTERS
    return f"{first[:MOST_CHARACTERS]} [... {left_out} characters]" if left_out > 0 else first


def _line(longrepr: Any) -> str:
    """Return `file:line` of the last frame of the user's that a report shows."""
    if not isinstance(longrepr, dict):
        return ""
    traceback = longrepr["chain"][-1][0] if longrepr.get("chain") else longrepr["reprtraceback"]
    for entry in reversed(traceback["reprentries"]):
        place = entry["data"].get("reprfileloc")
        if place and "site-packages" not in place["path"]:
            return f"{place['path']}:{place['lineno']}"
    return ""
