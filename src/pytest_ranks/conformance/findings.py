"""What a failed check says: the rule, what was found, what it should be, and which cause the numbers match."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """One possible cause with its exact prediction.

    Attributes:
        cause: the sentence that a finding prints when it matches.
        error: how far the prediction is from what was read, as a share of it; 0 is exact.
        reference: a public issue of the same class, or empty.
    """

    cause: str
    error: float
    reference: str = ""


MATCH = 1e-4
"""A hypothesis explains a reading when it misses by less: float32 noise is 1e-6, the nearest false one was 2.5e-2."""


def diagnose(hypotheses: list[Hypothesis]) -> tuple[str, str]:
    """Return the likely cause and its reference, saying how well it matches and how far the next best is off."""
    ranked = sorted(hypotheses, key=lambda entry: entry.error)
    if not ranked:
        return "", ""
    # Formulas that agree here stand in the table with the more specific one first.
    best = next((entry for entry in hypotheses if entry.error <= MATCH), ranked[0])
    if best.error > MATCH:
        return (
            f"none of {len(ranked)} known causes matches (nearest, off by {best.error:.0e}: {best.cause})",
            "",
        )
    rival = next((other for other in ranked[1:] if other.error > MATCH), None)
    margin = f"; next best hypothesis off by {rival.error:.0e}" if rival else ""
    return f"{best.cause} (match {best.error:.0e}{margin})", best.reference


class Finding(Exception):
    """A check that failed.

    Attributes:
        rule: what MUST hold.
        found: what was read instead, with numbers.
        tolerance: the tolerance and the rule it comes from.
        cause: the likely cause.
        setting: strategy and world size.
        where: file and line of the code that did it, if a spy saw it.
        reference: a public issue of the same class.
        run: the folder of the run, which stays open to inspection.
    """

    def __init__(
        self,
        rule: str,
        found: str,
        *,
        tolerance: str = "exact",
        cause: str = "",
        where: str = "",
        reference: str = "",
        run: str = "",
    ) -> None:
        super().__init__(rule, found)
        self.rule = rule
        self.found = found
        self.tolerance = tolerance
        self.cause = cause
        self.where = where
        self.reference = reference
        self.run = run

    def text(self, check: str) -> str:
        """Return the finding as a user reads it."""
        found, _, details = self.found.partition("\n")
        rows = {
            "found": found,
            "tolerance": self.tolerance,
            "likely": self.cause or "cause unknown",
            "where": self.where.removeprefix(f"{os.getcwd()}/"),
            "like": self.reference,
            "run": self.run,
        }
        lines = [f"{check}: {self.rule}"]
        lines += [f"  {label + ':':<10} {value}" for label, value in rows.items() if value]
        if details:
            lines.append(details.strip("\n"))
        return "\n".join(lines)


class Inconclusive(Exception):
    """The check could not see enough to judge; never a pass."""


class AdapterError(Exception):
    """The subject's adapter, not the trainer, does something else than the job says."""


class NotApplicable(Exception):
    """What the subject declares leaves the check nothing to judge."""


class NotRun(Exception):
    """What the check needs is missing on this machine, or the strategy was not seen to take effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check in one setting.

    Attributes:
        check: the id, `suite.claim`.
        setting: such as "single", "ddp-2"; empty for checks that have none.
        outcome: "passed", "failed", "expected failure", "unexpected pass", "adapter error", "not
            applicable", "not run" or "inconclusive".
        text: why, for all but passed.
        seconds: how long it took.
        finding: what was found, for "failed" and "expected failure".
    """

    check: str
    setting: str = ""
    outcome: str
    text: str = ""
    seconds: float = 0.0
    finding: Finding | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """The check with its setting, such as `loss.token_weights[ddp-2]`."""
        return f"{self.check}[{self.setting}]" if self.setting else self.check
