"""What one process said of the several ranks that it played, made into a run of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch import deadline
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Finished, OfRank, Phase, Raised

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from pytest_ranks.launch.spec import RankSpec

_PATCHING = {"monkeypatch", "mocker", "recwarn"}
ONE_PROCESS = (
    "all ranks of fidelity 'threads' are threads of one process: what ends it ends them all"
)


def unfold(runs: list[RankRun], spec: RankSpec) -> list[RankRun]:
    """Return the runs of a test's ranks.

    Args:
        runs: of the processes that played them.
        spec: what the test asked for.
    """
    if spec.fidelity != "threads":
        return runs
    (host,) = runs
    ranks = [_run_of(rank, host) for rank in range(spec.world_size)]
    for message in host.messages:
        _deal(message, ranks)
    ranks[0].output = host.output
    return ranks


def explanations(runs: Sequence[RankRun], spec: RankSpec) -> list[str]:
    """Return what a reader of a failure has to know about the process that played the ranks."""
    return [ONE_PROCESS] if spec.fidelity == "threads" and runs[0].crashed else []


def played(spec: RankSpec) -> str:
    """Return whom one body stands for, nothing where every rank has its own."""
    if spec.fidelity == "fake":
        return f"rank {spec.as_rank} of {spec.world_size}"
    return f"the body of all {spec.world_size} ranks" if spec.fidelity == "local_tensor" else ""


def reporter(message: object) -> object:
    """Return what a rank said, whoever carried it."""
    return message.message if isinstance(message, OfRank) else message


def is_spent(item: pytest.Item, spec: RankSpec) -> bool:
    """Return whether the process cannot serve another test: threads undo each other's patches.

    Each saves what it finds, which may be another's patch, and puts that back in the end.
    """
    names = getattr(item, "fixturenames", ())
    return spec.fidelity == "threads" and not _PATCHING.isdisjoint(names)


def _run_of(rank: int, host: RankRun) -> RankRun:
    own = [one.message for one in host.messages if isinstance(one, OfRank) and one.rank == rank]
    run = RankRun(rank=rank, messages=own, at=host.at)
    run.done = any(isinstance(message, Finished | Raised) for message in own)
    if host.crashed:
        run.done, run.crashed, run.status = False, True, host.status
        run.stacks, run.captured = host.stacks, host.captured if rank == 0 else ""
    elif not run.done:
        run.done, run.stopped = host.done, host.stopped
        thread = host.threads[rank] if rank < len(host.threads) else 0
        run.where = deadline.find_where(host.stacks, thread)
        run.stacks = deadline.only_thread(host.stacks, thread) or host.stacks
    return run


def _deal(message: Any, ranks: list[RankRun]) -> None:
    """Give what the process said for itself to the ranks that it is about."""
    if isinstance(message, Raised):
        for run in ranks:
            run.messages.append(message)
    elif isinstance(message, Finished):
        own = replace(message, sections=())
        for run in ranks if message.missing is not None else ranks[:1]:
            run.messages.append(own)
        for run in ranks:
            _add_sections(run, message.sections)


def _add_sections(run: RankRun, sections: Sequence[tuple[str, str]]) -> None:
    """Show on each rank's last report what was captured of all of them together."""
    phases = [
        phase
        for message in run.messages
        for phase in (message.phases if isinstance(message, Finished) else (message,))
        if isinstance(phase, Phase)
    ]
    for phase in phases[-1:]:
        phase.report["sections"] = [*(phase.report.get("sections") or ()), *sections]
