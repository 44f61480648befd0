"""What the controller reports for an item that ran on ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.launch import failures, outcome
from pytest_ranks.launch.failures import Failure
from pytest_ranks.launch.messages import Finished, Phase, Raised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_ranks.launch.outcome import ExpectedEnd, RankResult
    from pytest_ranks.launch.pool import RankRun


NO_PDB = (
    "note: --pdb cannot stop inside a rank, which is a process of its own; its prompt is in the "
    "process that waits for the ranks"
)


@dataclass(slots=True, kw_only=True)
class ItemOutcome:
    """The one outcome of an item that ran on N ranks.

    Attributes:
        verdict: see `outcome.verdict`.
        when: the phase that the outcome belongs to; teardown errors follow a passed call.
        text: one line.
        longrepr: what pytest prints, None where there is nothing.
        was_xfail: the reason of an expected failure or unexpected pass.
        sections: captured output of the ranks.
        properties: recorded with `record_property`.
    """

    verdict: str
    when: str = "call"
    text: str = ""
    longrepr: Any = None
    was_xfail: str | None = None
    sections: list[tuple[str, str]] = field(default_factory=list)
    properties: list[tuple[str, object]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether the ranks may serve another test."""
        return self.verdict in ("passed", "skipped", "xfailed", "xpassed", "strict_xpass")

    def place(self, report: pytest.TestReport) -> None:
        """Write this outcome over a report of the controller's."""
        is_its_phase = report.when == self.when or (report.when == "call" and self.when == "setup")
        if report.when == "call":
            report.sections = [*self.sections]
            report.user_properties.extend(self.properties)
        if not is_its_phase:
            return
        report.when = self.when  # type: ignore[assignment]
        report.longrepr = self.longrepr
        if self.was_xfail is not None:
            report.wasxfail = self.was_xfail
        elif hasattr(report, "wasxfail"):
            del report.wasxfail
        words = {
            "passed": "passed",
            "xpassed": "passed",
            "skipped": "skipped",
            "xfailed": "skipped",
        }
        report.outcome = words.get(self.verdict, "failed")  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is known about a run besides what its ranks said.

    Attributes:
        timeout: the deadline, in seconds.
        notes: on how the ranks were started, where that may matter to a death.
        explanations: what we found out about the failure, each a line or a block of lines; they
            stand right below the headline.
        expected_ends: rank -> how its process has to end.
        fidelity: how real the ranks were.
    """

    timeout: float
    notes: Sequence[str] = ()
    explanations: Sequence[str] = ()
    expected_ends: Mapping[int, ExpectedEnd] = field(default_factory=dict)
    fidelity: str = "gloo"


def decide(item: pytest.Item, runs: list[RankRun], context: Context) -> ItemOutcome:
    """Return the outcome of an item from what its ranks did.

    Args:
        item: the item, in the controller.
        runs: what each rank did.
        context: what is known besides.
    """
    results = [
        outcome.result_of(run, expected_end=context.expected_ends.get(run.rank)) for run in runs
    ]
    word = outcome.verdict(results)
    sections = _sections(results)
    properties = [("fidelity", context.fidelity), *_properties(results)]
    if word in ("passed", "xpassed", "xfailed", "skipped", "strict_xpass"):
        telling = _telling(results)
        return ItemOutcome(
            verdict=word,
            when="call",
            text=str(telling.report.get("longrepr") or "") if telling is not None else "",
            longrepr=_longrepr(item, telling) if telling is not None else None,
            was_xfail=telling.was_xfail if telling is not None else None,
            sections=sections,
            properties=properties,
        )
    return _failed(item, runs, results, word, context, sections=sections, properties=properties)


def _telling(results: list[RankResult]) -> Phase | None:
    """Return the report that says it all where the ranks agree; None where none is left."""
    phases = next((one.phases for one in results if one.status != outcome.DIED_AS_EXPECTED), ())
    bad = (one for one in phases if one.outcome != "passed" or one.was_xfail is not None)
    return next(bad, phases[-1] if phases else None)


def _failed(
    item: pytest.Item,
    runs: list[RankRun],
    results: list[RankResult],
    word: str,
    context: Context,
    *,
    sections: list[tuple[str, str]],
    properties: list[tuple[str, object]],
) -> ItemOutcome:
    found = [
        failure
        for run, result in zip(runs, results, strict=True)
        if (failure := _failure(run, result, context)) is not None
    ]
    ordered = failures.in_order(found)
    head = _head(results, ordered, word, context)
    sections = [*sections, *_output_sections(ordered)]
    root = ordered[0] if ordered else None
    phase = _failed_phase(results[root.rank]) if root is not None else None
    when = "call"
    if word == "error" and phase is not None and phase.when in ("setup", "teardown"):
        when = phase.when
    tail = [*failures.hints(ordered), *_others_lines(ordered[1:]), *failures.stacks(ordered)]
    tail += [
        f"rank {one.rank} was expected to {context.expected_ends[one.rank].text}, and did"
        for one in results
        if one.status == outcome.DIED_AS_EXPECTED
    ]
    if word == "crashed":
        tail += context.notes
    if item.config.getoption("usepdb", False):
        tail.append(NO_PDB)
    tail.append(f"reproduce: pytest {item.nodeid!r}")
    longrepr = _compat.make_longrepr(
        item,
        head=head,
        below="\n".join(context.explanations),
        inner=_longrepr(item, phase) if phase is not None else None,
        text=root.text if root is not None and phase is None and root.kind == "raised" else "",
        tail="\n".join(tail),
    )
    return ItemOutcome(
        verdict=word,
        when=when,
        text=head,
        longrepr=longrepr,
        sections=sections,
        properties=properties,
    )


def _head(results: list[RankResult], ordered: list[Failure], word: str, context: Context) -> str:
    """Return the headline, which names a fidelity that is not the usual one."""
    others_left = any(result.status in ("skipped", "xfailed") for result in results)
    if word == "disagree" or (others_left and all(one.is_collateral for one in ordered)):
        head = _disagreement(results, ordered)
    else:
        head = failures.headline(ordered, world_size=len(results), timeout=context.timeout)
    return head if context.fidelity == "gloo" else f"fidelity {context.fidelity}: {head}"


def _failure(run: RankRun, result: RankResult, context: Context) -> Failure | None:
    status = result.status
    expected = context.expected_ends.get(run.rank)
    if status == "survived" and expected is not None:
        headline = f"was expected to {expected.text}, it {result.own_word}"
        # after what others failed of: that tells more
        return Failure(rank=run.rank, kind="alive", headline=headline, at=math.inf)
    if status == outcome.DIED_AS_EXPECTED:
        return None
    output = (run.output + run.captured).strip()
    phase = _failed_phase(result)
    if phase is not None:
        crash = _crash_message(phase)
        return Failure(
            rank=run.rank,
            kind="raised",
            headline=crash,
            text=_compat.longrepr_text(phase.report.get("longrepr")),
            at=phase.at,
            place=phase.place,
        )
    raised = next((one for one in run.messages if isinstance(one, Raised)), None)
    if raised is not None:
        return failures.of_raised(run, raised, output=output)
    finished = next((one for one in run.messages if isinstance(one, Finished)), None)
    if finished is not None and (finished.missing or finished.errors):
        text = finished.missing or "\n".join(finished.errors)
        return Failure(
            rank=run.rank, kind="raised", headline=text.splitlines()[0], text=text, at=run.at
        )
    if run.done and status == "crashed":
        seen = ", ".join(phase.when for phase in result.phases) or "none"
        headline = f"did not report each phase exactly once (reported: {seen})"
        return Failure(rank=run.rank, kind="raised", headline=headline, at=run.at)
    if run.done:
        return None
    failure = failures.of_unfinished(run, output=output)
    if expected is not None and failure.kind == "died":
        headline = f"{failure.headline}, it was expected to {expected.text}"
        failure = replace(failure, headline=headline)
    return failure


def _failed_phase(result: RankResult) -> Phase | None:
    return next((phase for phase in result.phases if phase.outcome == "failed"), None)


def _crash_message(phase: Phase) -> str:
    longrepr = phase.report.get("longrepr")
    if isinstance(longrepr, dict) and longrepr.get("reprcrash"):
        message = str(longrepr["reprcrash"]["message"])
    else:
        message = str(longrepr)
    lines = [line for line in message.splitlines() if line.strip()]
    if lines and lines[0].startswith("file "):  # where pytest looked for a fixture, then the error
        lines = [line[1:].strip() for line in lines if line.startswith("E  ")] or lines
    return lines[0] if lines else "failed"


def _longrepr(item: pytest.Item, phase: Phase) -> Any:
    return _compat.report_from_data(item.config, phase.report).longrepr


def _disagreement(results: list[RankResult], found: list[Failure]) -> str:
    cut = {
        one.rank: f"was cut off in {one.place or 'its work'}" for one in found if one.is_collateral
    }
    by_status: dict[str, list[int]] = {}
    for result in results:
        status = cut.get(result.rank, result.status).replace("strict_xpass", "xpassed (strict)")
        by_status.setdefault(status, []).append(result.rank)
    parts = [f"{failures.ranks_text(ranks)} {status}" for status, ranks in by_status.items()]
    return f"the ranks disagree: {', '.join(parts)}"


def _sections(results: list[RankResult]) -> list[tuple[str, str]]:
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
    return [(f"{name} ({failures.ranks_text(ranks)})", text) for (name, text), ranks in order]


def _output_sections(ordered: list[Failure]) -> list[tuple[str, str]]:
    return [(f"Captured output (rank {one.rank})", one.output) for one in ordered if one.output]


def _others_lines(others: list[Failure]) -> list[str]:
    lines = []
    for one in others:
        if one.is_collateral:  # cut off, or stopped
            lines.append(failures.collateral_line(one))
        elif one.kind == "raised":
            lines.append(f"rank {one.rank} failed too: {one.headline}")
        elif one.kind in ("died", "alive"):
            lines.append(f"rank {one.rank} {one.headline}")
    return lines  # those at work when the time was up are in the headline


def _properties(results: list[RankResult]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for result in results:
        for phase in result.phases[-1:]:
            for name, value in phase.report.get("user_properties") or ():
                if result.rank == 0:
                    found.append((name, value))
                elif (name, value) not in found:
                    found.append((f"{name} (rank {result.rank})", value))
    return found
