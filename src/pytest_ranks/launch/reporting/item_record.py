"""The record of one item, from what its ranks did and what was made of it."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch import deadline
from pytest_ranks.launch.reporting.reports import reproduce
from pytest_ranks.report.records import (
    ItemRecord,
    OutputRecord,
    PhaseRecord,
    RankRecord,
    shorten,
)

if TYPE_CHECKING:
    import pytest

    from pytest_ranks.launch.outcome import RankResult
    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.reporting.failures import Failure
    from pytest_ranks.launch.reporting.reports import ItemOutcome
    from pytest_ranks.launch.service import ItemRun
    from pytest_ranks.launch.spec import RankSpec


def record_of(
    item: pytest.Item, spec: RankSpec, decided: ItemOutcome, done: ItemRun
) -> dict[str, Any]:
    """Return the record of an item that ran, as plain data."""
    told = decided.of(decided.when)
    failures = {one.rank: one for one in reversed(decided.failures)}
    root = decided.failures[0].rank if decided.failures else None
    text = "" if told.longrepr is None or isinstance(told.longrepr, tuple) else str(told.longrepr)
    record = ItemRecord(
        node_id=item.nodeid,
        world_size=spec.world_size,
        mesh=dict(spec.mesh),
        backend=spec.backend,
        fidelity=spec.fidelity,
        verdict=decided.verdict,
        outcome=told.outcome,
        when=decided.when,
        seconds=decided.seconds,
        root_rank=root,
        headline=shorten(told.text),
        explanations=list(map(shorten, done.explanations)),
        text=shorten(text),
        reproduce=reproduce(item).removeprefix("reproduce: "),
        ranks=[
            _rank(run, result, failures.get(run.rank))
            for run, result in zip(done.runs, decided.results, strict=True)
        ],
    )
    return asdict(record)


def record_without_ranks(spec: RankSpec, report: pytest.TestReport, verdict: str) -> dict[str, Any]:
    """Return the record of what no rank reported: a skip before it, or a teardown long after it."""
    reason = report.longrepr
    text = str(reason[-1]) if isinstance(reason, tuple) else report.longreprtext
    record = ItemRecord(
        node_id=report.nodeid,
        world_size=spec.world_size,
        mesh=dict(spec.mesh),
        backend=spec.backend,
        fidelity=spec.fidelity,
        verdict=verdict,
        outcome=report.outcome,
        when=report.when,
        headline=shorten(text.splitlines()[0] if text else ""),
        text=shorten(text),
    )
    return asdict(record)


def _rank(run: RankRun, result: RankResult, failure: Failure | None) -> RankRecord:
    status = run.status if run.crashed else None
    return RankRecord(
        rank=run.rank,
        status=result.status,
        headline=shorten(failure.brief) if failure is not None else "",
        is_collateral=failure is not None and failure.is_collateral,
        traceback=shorten(failure.text) if failure is not None and failure.kind == "raised" else "",
        phases=[
            PhaseRecord(
                when=phase.when,
                outcome=phase.outcome,
                seconds=float(phase.report.get("duration") or 0.0),
            )
            for phase in result.phases
        ],
        exit_code=status if status is not None and status >= 0 else None,
        signal=_signal_name(-status) if status is not None and status < 0 else None,
        stacks=shorten(deadline.trim(run.stacks)),
        output=_output(run, result),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _output(run: RankRun, result: RankResult) -> list[OutputRecord]:
    found: dict[str, str] = {}
    for phase in result.phases:  # each repeats what earlier ones have
        found.update((name, text) for name, text in phase.report.get("sections") or ())
    if not run.done and (rest := (run.output + run.captured).strip()):
        found["Captured output"] = rest
    return [OutputRecord(name=name, text=shorten(text)) for name, text in found.items()]
