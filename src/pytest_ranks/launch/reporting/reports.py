"""What the controller reports for an item that ran on ranks, phase by phase."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.launch import outcome
from pytest_ranks.launch.reporting import failures, item_text, sections
from pytest_ranks.launch.reporting.item_failures import failures_of
from pytest_ranks.launch.wire import Raised
from pytest_ranks.report.records import ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_ranks.launch.outcome import ExpectedEnd, RankResult
    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.reporting.failures import Failure
    from pytest_ranks.launch.wire import Phase

AGREED = ("passed", "xpassed", "xfailed", "skipped", "strict_xpass")
NO_PDB = (
    "note: --pdb found nothing to stop at: no rank raised; --ranks-debug=RANK stops a rank at "
    "breakpoint()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is known about a run besides what its ranks said.

    Attributes:
        timeout: the deadline, in seconds.
        world_size: number of ranks; one body may have played them all.
        seconds: how long the run took, from its request to its last message.
        notes: on how the ranks were started, where that may matter to a death.
        explanations: what we found out about the failure, each a line or a block of lines; they
            stand right below the headline.
        unawaited: who left a collective behind in a test that is over, nothing where nobody did.
        expected_ends: rank -> how its process has to end.
        fidelity: how real the ranks were.
        played: whom one body stood for, nothing where every rank had its own.
    """

    timeout: float
    world_size: int = 0
    seconds: float = 0.0
    notes: Sequence[str] = ()
    explanations: Sequence[str] = ()
    unawaited: str = ""
    expected_ends: Mapping[int, ExpectedEnd] = field(default_factory=dict)
    fidelity: str = "gloo"
    played: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOutcome:
    """What is reported for one phase of an item.

    Attributes:
        outcome: passed, failed or skipped.
        text: one line.
        longrepr: what pytest prints, None where there is nothing.
        was_xfail: the reason of an expected failure or unexpected pass.
    """

    outcome: str = "passed"
    text: str = ""
    longrepr: Any = None
    was_xfail: str | None = None


@dataclass(slots=True, kw_only=True)
class ItemOutcome:
    """The one outcome of an item that ran on N ranks.

    Attributes:
        verdict: see `outcome.verdict`.
        when: the phase that the verdict belongs to.
        phases: what is reported for each phase that is not simply passed.
        seconds: for each phase, the time of the slowest rank.
        failures: what failed, root cause first, one for each rank.
        sections: captured output of the ranks.
        properties: recorded with `record_property`.
        session_end: message and status of a `pytest.exit` that was the root cause.
        results: what each rank made of it.
        record: what the JSON report says of it, where one is written.
    """

    verdict: str
    when: str = "call"
    phases: dict[str, PhaseOutcome] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    sections: list[tuple[str, str]] = field(default_factory=list)
    properties: list[tuple[str, object]] = field(default_factory=list)
    session_end: tuple[str, int | None] | None = None
    results: Sequence[RankResult] = ()
    record: dict[str, Any] | None = None

    @property
    def is_clean(self) -> bool:
        """Whether the ranks may serve another test."""
        return self.verdict in AGREED

    @property
    def text(self) -> str:
        """The verdict in one line, empty for a pass."""
        return self.of(self.when).text

    def of(self, when: str) -> PhaseOutcome:
        """Return what is reported for a phase."""
        return self.phases.get(when) or PhaseOutcome()

    def place(self, report: pytest.TestReport) -> None:
        """Write this outcome over a report of the controller's."""
        found = self.of(report.when)
        report.outcome = found.outcome  # type: ignore[assignment]
        report.longrepr = found.longrepr
        report.duration = self.seconds.get(report.when, 0.0)
        report.sections = sections.until(report.when, self.sections)
        report.user_properties.extend(self.properties)
        if self.record is not None and report.when == self.when:
            setattr(report, ATTRIBUTE, self.record)
        if found.was_xfail is not None:
            report.wasxfail = found.was_xfail
        elif hasattr(report, "wasxfail"):
            del report.wasxfail

    def fail_teardown(self, item: pytest.Item, errors: Sequence[str]) -> None:
        """Report what the teardowns of wider fixtures raised, after this test failed."""
        text = f"teardown of wider fixtures failed: {errors[0].splitlines()[0]}"
        if self.of("teardown").outcome == "failed":
            self.sections.extend(("Teardown of wider fixtures", error) for error in errors)
            return
        longrepr = _compat.make_longrepr(
            item, head=text, inner=None, text="\n".join(errors), tail=reproduce(item)
        )
        self.phases["teardown"] = PhaseOutcome(outcome="failed", text=text, longrepr=longrepr)


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
    if context.unawaited and word in ("passed", "xpassed"):
        word = "disagree"  # on the collectives that there were
    is_agreed = word in AGREED
    decided = (
        _agreed(item, results, word) if is_agreed else _failed(item, runs, results, word, context)
    )
    decided.seconds = _seconds(results, context.seconds)
    decided.results = results
    decided.properties = [
        ("fidelity", context.fidelity),
        ("world_size", context.world_size or len(runs)),
        ("verdict", word),
        *([("root_rank", decided.failures[0].rank)] if decided.failures else []),
        *sections.properties(results),
    ]
    return decided


def _agreed(item: pytest.Item, results: list[RankResult], word: str) -> ItemOutcome:
    """Return the outcome where all ranks say the same: a report of the first that has any."""
    phases = next((one.phases for one in results if one.status != outcome.DIED_AS_EXPECTED), ())
    told = {
        phase.when: PhaseOutcome(
            outcome=phase.outcome,
            text=_reason(phase),
            longrepr=_longrepr(item, phase),
            was_xfail=phase.was_xfail,
        )
        for phase in phases
        if phase.outcome != "passed" or phase.was_xfail is not None
    }
    when = next(iter(told), "call")
    return ItemOutcome(verdict=word, when=when, phases=told, sections=sections.captured(results))


def _failed(
    item: pytest.Item,
    runs: list[RankRun],
    results: list[RankResult],
    word: str,
    context: Context,
) -> ItemOutcome:
    found = [
        failures_of(run, result, context.expected_ends.get(run.rank))
        for run, result in zip(runs, results, strict=True)
    ]
    first = failures.in_order([some[0] for some in found if some])
    later = [one for some in found for one in some[1:]]
    root = first[0] if first else None
    phase = _failed_phase(results, root)
    when = phase.when if word == "error" and phase is not None else "call"
    decided = ItemOutcome(
        verdict=word,
        when=when,
        failures=first,
        sections=[*sections.captured(results), *sections.of_failures([*first, *later])],
        session_end=_session_end(runs, root),
    )
    tail = [
        *_tail(first, later),
        *item_text.lines_of_what_was_asked_for(runs, results, context.expected_ends),
        *(context.notes if word == "crashed" else ()),
    ]
    if item.config.getoption("usepdb", False) and (root is None or root.kind != "raised"):
        tail.append(NO_PDB)
    head = _head(first, results, word, context)
    decided.phases[when] = PhaseOutcome(
        outcome="failed",
        text=head,
        longrepr=_compat.make_longrepr(
            item,
            head=head,
            below="\n".join(context.explanations),
            inner=_longrepr(item, phase) if phase is not None else None,
            text=root.text if root is not None and phase is None and root.kind == "raised" else "",
            tail="\n".join([*tail, reproduce(item)]),
        ),
    )
    if when != "teardown":
        _add_teardown(item, decided, results, [one for one in later if one.phase == "teardown"])
    return decided


def _tail(first: Sequence[Failure], later: Sequence[Failure]) -> list[str]:
    """Return what stands below the traceback of the rank that failed first."""
    root = first[0] if first else None
    return [
        *failures.hints(first),
        *item_text.lines_of_others(first[1:], root),
        *item_text.lines_of_later(later),
        *failures.tracebacks(root, first[1:]),
        *sections.last_lines([*first, *later]),
        *failures.stacks([*first, *later]),
    ]


def _add_teardown(
    item: pytest.Item, decided: ItemOutcome, results: list[RankResult], later: list[Failure]
) -> None:
    """Report teardowns that failed on ranks that had failed before, as pytest does."""
    if not later:
        return
    first = failures.in_order(later)
    phase = _failed_phase(results, first[0])
    head = failures.headline(first, world_size=len(results), timeout=0)
    decided.phases["teardown"] = PhaseOutcome(
        outcome="failed",
        text=head,
        longrepr=_compat.make_longrepr(
            item,
            head=head,
            inner=_longrepr(item, phase) if phase is not None else None,
            text="",
            tail="\n".join([*item_text.lines_of_others(first[1:], first[0]), reproduce(item)]),
        ),
    )


def _head(first: Sequence[Failure], results: list[RankResult], word: str, context: Context) -> str:
    if word == "disagree" and not first and context.unawaited:
        return f"the ranks disagree: {context.unawaited}"
    others_left = any(result.status in ("skipped", "xfailed") for result in results)
    if word == "disagree" or (others_left and all(one.is_collateral for one in first)):
        head = item_text.disagreement(results, first)
    elif context.played:
        head = failures.headline_of_one(first[0], context.played, timeout=context.timeout)
    else:
        head = failures.headline(first, world_size=len(results), timeout=context.timeout)
    return head if context.fidelity == "gloo" else f"fidelity {context.fidelity}: {head}"


def _failed_phase(results: list[RankResult], failure: Failure | None) -> Phase | None:
    """Return the report that a failure was read from, None where it came from elsewhere."""
    if failure is None or not failure.phase:
        return None
    phases = results[failure.rank].phases
    return next(one for one in phases if one.when == failure.phase and one.outcome == "failed")


def _session_end(runs: list[RankRun], root: Failure | None) -> tuple[str, int | None] | None:
    if root is None or root.phase:
        return None
    for message in runs[root.rank].messages:
        if isinstance(message, Raised) and message.session_end is not None:
            text, status = message.session_end
            return f"rank {root.rank} of {len(runs)}: {text}", status
    return None


def _seconds(results: list[RankResult], whole: float) -> dict[str, float]:
    """Return the slowest rank's time for each phase.

    A phase that a rank did not come to report took, on that rank, what the earlier ones left.
    """
    found: dict[str, float] = {}
    for when in sections.ORDER:
        told = [
            float(phase.report.get("duration") or 0.0)
            for result in results
            for phase in result.phases
            if phase.when == when
        ]
        found[when] = max(told, default=0.0)
    if any(result.status in ("crashed", "timed_out", "stopped") for result in results):
        found["call"] = max(found["call"], whole - found["setup"] - found["teardown"])
    return found


def _reason(phase: Phase) -> str:
    """Return the text of a skip, an expected failure, or a strict unexpected pass."""
    longrepr = phase.report.get("longrepr")
    if isinstance(longrepr, list | tuple):
        return str(longrepr[-1])
    return str(longrepr or "")


def _longrepr(item: pytest.Item, phase: Phase) -> Any:
    return _compat.report_from_data(item.config, phase.report).longrepr


def reproduce(item: pytest.Item) -> str:
    """Return the line that runs this item alone, quoted for a shell, from where pytest was run."""
    file, colons, names = item.nodeid.partition("::")
    path = os.path.relpath(item.config.rootpath / file, item.config.invocation_params.dir)
    quoted = f"{path}{colons}{names}".replace("'", "'\"'\"'")
    return f"reproduce: pytest '{quoted}'"
