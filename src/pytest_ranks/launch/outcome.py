"""Reports of N ranks made into one verdict: fail-closed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.launch.messages import Finished, Phase, Raised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.pool import RankRun

STRICT_XPASS = "[XPASS(strict)]"  # how pytest begins the text of a strict unexpected pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What one rank made of an item.

    Attributes:
        rank: its number.
        phases: its reports, in order.
        died: whether its process ended by itself.
        stopped: whether we ended it after another rank had failed.
        timed_out: whether we ended it at the deadline, or waiting for ranks that had finished.
        raised: whether something raised outside of a phase.
        missing: whether it did not find the item.
    """

    rank: int
    phases: tuple[Phase, ...] = ()
    died: bool = False
    stopped: bool = False
    timed_out: bool = False
    raised: bool = False
    missing: bool = False

    @property
    def status(self) -> str:
        """What this rank's own reports say.

        One of crashed, stopped, timed_out, error, failed, strict_xpass, xpassed, xfailed,
        skipped, passed. Anything but exactly one report a phase is a crash.
        """
        if self.died or self.raised or self.missing:
            return "crashed"
        if self.timed_out:
            return "timed_out"
        if self.stopped:
            return "stopped"
        found = {phase.when: phase for phase in self.phases}
        if not self._is_complete(found):
            return "crashed"
        if any(found[when].outcome == "failed" for when in ("setup", "teardown")):
            return "error"
        call = found.get("call")
        if call is not None and call.outcome == "failed":
            text = call.report.get("longrepr")
            is_strict = isinstance(text, str) and text.startswith(STRICT_XPASS)
            return "strict_xpass" if is_strict else "failed"
        skipped = [phase for phase in self.phases if phase.outcome == "skipped"]
        if skipped:
            return "skipped" if all(one.was_xfail is None for one in skipped) else "xfailed"
        return "xpassed" if call is not None and call.was_xfail is not None else "passed"

    def _is_complete(self, found: dict[str, Phase]) -> bool:
        if max(Counter(phase.when for phase in self.phases).values(), default=0) != 1:
            return False
        if "setup" not in found or "teardown" not in found:
            return False
        return ("call" in found) == (found["setup"].outcome == "passed")


def verdict(results: Sequence[RankResult]) -> str:
    """Return the one word for an item that ran on these ranks.

    One of crashed, error, failed, timed_out, disagree, strict_xpass, xpassed, xfailed, skipped,
    passed. A rank that we stopped counts for nothing when another one failed; when none did, its
    report is missing.
    """
    statuses = [result.status for result in results]
    for worst in ("crashed", "error", "failed", "timed_out"):
        if worst in statuses:
            return worst
    if not statuses or "stopped" in statuses:
        return "crashed"
    return statuses[0] if len(set(statuses)) == 1 else "disagree"


def result_of(run: RankRun) -> RankResult:
    """Return what a rank made of an item from what it said."""
    phases: list[Phase] = []
    raised = missing = False
    for message in run.messages:
        if isinstance(message, Phase):
            phases.append(message)
        elif isinstance(message, Finished):
            phases += message.phases
            missing = message.missing is not None
            raised = raised or bool(message.errors)
        elif isinstance(message, Raised):
            raised = True
    order = ("setup", "call", "teardown")
    return RankResult(
        rank=run.rank,
        phases=tuple(sorted(phases, key=lambda phase: order.index(phase.when))),
        died=run.crashed,
        stopped=run.stopped == "collateral",
        timed_out=run.stopped in ("deadline", "abandoned", "unready"),
        raised=raised,
        missing=missing,
    )
