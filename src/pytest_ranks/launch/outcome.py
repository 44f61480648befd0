"""Reports of N ranks made into one verdict: fail-closed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_ranks.launch.wire import Finished, Phase, Raised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.launch.rank_run import RankRun

STRICT_XPASS = "[XPASS(strict)]"  # how pytest begins the text of a strict unexpected pass
DIED_AS_EXPECTED = "died_as_expected"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedEnd:
    """How the process of a rank has to end, or the test fails.

    Attributes:
        text: what the mark declares, such as `die of SIGKILL`.
        statuses: exit codes and -signals that are meant.
    """

    text: str
    statuses: frozenset[int]

    def is_met(self, status: int | None) -> bool:
        """Return whether a process that ended with this status ended as declared."""
        return status in self.statuses


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
        expected: `died` where its process ended as declared, `lives` where that was declared and
            has not happened, nothing where nothing was declared.
    """

    rank: int
    phases: tuple[Phase, ...] = ()
    died: bool = False
    stopped: bool = False
    timed_out: bool = False
    raised: bool = False
    missing: bool = False
    expected: Literal["", "died", "lives"] = ""

    @property
    def status(self) -> str:
        """What this rank's own reports say, and how its process ended.

        One of crashed, stopped, timed_out, error, failed, survived, strict_xpass, xpassed,
        xfailed, skipped, passed, died_as_expected. Anything but exactly one report a phase is a
        crash. A declared death makes up for the reports that are missing, not for one that failed.
        """
        if self.expected == "died":
            return (
                "failed"
                if any(one.outcome == "failed" for one in self.phases)
                else DIED_AS_EXPECTED
            )
        told = self.own_word
        is_good = told not in ("crashed", "stopped", "timed_out", "error", "failed")
        return "survived" if self.expected == "lives" and is_good else told

    @property
    def own_word(self) -> str:
        """What this rank's reports say, whatever end was declared for it."""
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
    report is missing. A rank that died as declared leaves the word to the others; one that
    should have died and has not failed.
    """
    if not results:
        return "crashed"
    statuses = [result.status for result in results if result.status != DIED_AS_EXPECTED]
    for worst in ("crashed", "error", "failed", "timed_out"):
        if worst in statuses or (worst == "failed" and "survived" in statuses):
            return worst
    if "stopped" in statuses:
        return "crashed"
    if not statuses:
        return "passed"  # every rank died, as every one should
    return statuses[0] if len(set(statuses)) == 1 else "disagree"


def result_of(run: RankRun, *, expected_end: ExpectedEnd | None = None) -> RankResult:
    """Return what a rank made of an item from what it said.

    Args:
        run: what the rank did.
        expected_end: how its process had to end, None where it had to live.
    """
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
    expected: Literal["", "died", "lives"] = ""
    if expected_end is not None:
        expected = "died" if run.crashed and expected_end.is_met(run.status) else "lives"
    elif run.stopped == "frozen":
        expected = "died"  # as good as that: the test had it hang for good
    return RankResult(
        rank=run.rank,
        phases=tuple(sorted(phases, key=lambda phase: order.index(phase.when))),
        died=run.crashed,
        stopped=run.stopped == "collateral",
        timed_out=run.stopped in ("deadline", "abandoned", "deadlock", "unready"),
        raised=raised,
        missing=missing,
        expected=expected,
    )
