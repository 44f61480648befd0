"""Proves the checks: each planted bug must be killed by the checks that it names, for the cause that it names.

A trainer that passes is only worth as much as the checks that it passed. `pytest
--ranks-self-check` runs this.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from pytest_ranks.conformance.check import Check, Setting, select
from pytest_ranks.conformance.preload import modules_for
from pytest_ranks.conformance.runner import Session, run_check
from pytest_ranks.conformance.subject import find_subject
from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytest_ranks.conformance.findings import CheckResult
    from pytest_ranks.launch.host import RankHost

MUTANTS = "pytest_ranks.reference.mutants"
"""Where `all_mutants` is: above this room in the house, so it is found by name."""

KILLS = ("failed", "adapter error", "not run")
"""Outcomes that are no pass. A mutant also says which words the text must hold, so a crash is no kill."""


class Planted(Protocol):
    """A subject with a planted bug: what `pytest_ranks.reference.mutants.all_mutants()` gives."""

    @property
    def name(self) -> str:
        """The subject's class."""

    @property
    def row(self) -> str:
        """The catalogue's row."""

    @property
    def summary(self) -> str:
        """What is wrong."""

    @property
    def kills(self) -> Mapping[str, str]:
        """Check id with setting -> a fragment of the cause."""

    @property
    def clean(self) -> str:
        """The same subject without the bug."""

    @property
    def subject(self) -> str:
        """The subject's reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What one check said about one mutant, or about the clean subject.

    Attributes:
        mutant: the mutant's name; empty for the clean subject.
        row: the catalogue's row.
        check: the check with its setting, such as "loss.token_weights[ddp-2]".
        fragment: what the cause must say.
        result: the check's result.
        said: the cause as the check gave it.
        killed: it found the bug and named it (or passed the clean subject).
    """

    mutant: str
    row: str
    check: str
    fragment: str
    result: CheckResult = field(repr=False)
    said: str
    killed: bool


class SharedRanks(Session):
    """A session on ranks that others use too.

    Args:
        subject: as for `Session`.
        folder: where models and runs are written; may be shared, since runs lie under the subject's
            name.
        host: the ranks; whoever made it closes it.
    """

    def __init__(self, subject: object, folder: Path, host: RankHost) -> None:
        self._shared = host
        super().__init__(subject, folder)

    def host(self) -> RankHost:
        """Return the shared ranks."""
        return self._shared

    def close(self) -> None:
        """Leave the shared ranks running."""


def mutants() -> tuple[Planted, ...]:
    """Return every mutant of the reference trainer."""
    found: tuple[Planted, ...] = importlib.import_module(MUTANTS).all_mutants()
    return found


def start_ranks() -> RankHost:
    """Start ranks that have the mutants imported before they are forked."""
    from pytest_ranks.launch.host import RankHost

    suites = importlib.import_module(MUTANTS).SUITES
    clean = modules_for(find_subject("pytest_ranks.subjects.reference:ReferenceTrainer"))
    return RankHost(preload=(*clean, *(f"{MUTANTS}.{suite}" for suite in suites)))


def judge(session: Session, name: str) -> CheckResult:
    """Run one check in one setting.

    Args:
        session: the subject's session.
        name: the check with its setting, such as "loss.token_weights[ddp-2]".

    Raises:
        BadInputError: there is no such check, or it is not run in that setting.
    """
    check, setting = _parse(name)
    if setting not in check.settings(session.capabilities):
        known = ", ".join(str(each) for each in check.settings(session.capabilities))
        raise BadInputError(f"{name!r} is not run in this setting; {check.id} is run in: {known}")
    return run_check(session, check, setting)


def _parse(name: str) -> tuple[Check, Setting]:
    check_id, _, rest = name.partition("[")
    strategy, _, size = rest.rstrip("]").partition("-")
    return select([check_id])[0], Setting(strategy=strategy, world_size=int(size or 1))


def kill(session: Session, mutant: Planted) -> list[Kill]:
    """Run a mutant's declared checks on it."""
    kills = []
    for name, fragment in mutant.kills.items():
        result = judge(session, name)
        said = result.finding.cause if result.finding is not None else result.text
        kills.append(
            Kill(
                mutant=mutant.name,
                row=mutant.row,
                check=name,
                fragment=fragment,
                result=result,
                said=said,
                killed=result.outcome in KILLS and fragment in said,
            )
        )
    return kills


def clean_checks(planted: Iterable[Planted]) -> dict[str, list[str]]:
    """Return for each clean subject the checks with settings that kill its mutants: it must pass them all."""
    wanted: dict[str, dict[str, None]] = {}
    for mutant in planted:
        wanted.setdefault(mutant.clean, {}).update(dict.fromkeys(mutant.kills))
    return {subject: list(names) for subject, names in wanted.items()}


def pass_clean(session: Session, names: Sequence[str]) -> list[Kill]:
    """Run checks on a subject without a bug: each must pass."""
    results = [judge(session, name) for name in names]
    return [
        Kill(
            mutant="",
            row="",
            check=name,
            fragment="",
            result=result,
            said=result.text,
            killed=result.outcome == "passed",
        )
        for name, result in zip(names, results, strict=True)
    ]


def self_check(
    *,
    progress: Callable[[Kill], None] | None = None,
    only: Iterable[str] | None = None,
    ranks: int | None = None,
) -> list[Kill]:
    """Run every mutant on the checks that must kill it, and the clean subjects on all of these checks.

    Args:
        progress: called with each result as it comes, from one thread at a time.
        only: names of mutants; None means all, and the clean subjects.
        ranks: how many subjects are judged side by side; None: one for each two cores, at most 4.

    Returns:
        One entry a mutant and check, then those of the clean subjects.
    """
    chosen = [mutant for mutant in mutants() if only is None or mutant.name in set(only)]
    side_by_side = ranks or min(4, max(2, (os.cpu_count() or 2) // 2))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pytest-ranks-")))
        hosts: SimpleQueue[RankHost] = SimpleQueue()
        for _ in range(
            side_by_side
        ):  # here, not in a thread: a host ends with the thread it began in
            hosts.put(stack.enter_context(start_ranks()))

        def on_ranks(subject: str, work: Callable[[Session], list[Kill]]) -> list[Kill]:
            host = hosts.get()
            try:
                return work(SharedRanks(subject, folder, host))
            finally:
                hosts.put(host)

        pool = stack.enter_context(ThreadPoolExecutor(side_by_side))
        pending: list[Any] = []
        if only is None:
            for subject, names in clean_checks(chosen).items():
                pending.append(pool.submit(on_ranks, subject, _passing(names)))
        pending = [
            *(pool.submit(on_ranks, mutant.subject, _killing(mutant)) for mutant in chosen),
            *pending,
        ]
        kills: list[Kill] = []
        for future in pending:
            for entry in future.result():
                kills.append(entry)
                if progress is not None:
                    progress(entry)
        return kills


def _killing(mutant: Planted) -> Callable[[Session], list[Kill]]:
    return lambda session: kill(session, mutant)


def _passing(names: Sequence[str]) -> Callable[[Session], list[Kill]]:
    return lambda session: pass_clean(session, names)


def print_matrix(kills: Iterable[Kill], write: Callable[[str], object]) -> bool:
    """Write the kill matrix: mutant, catalogue row, check, what the finding said, seconds.

    Args:
        kills: what `self_check` returned.
        write: called with each line, without its end.

    Returns:
        Whether every mutant was killed, and the clean subjects passed.
    """
    entries = list(kills)
    planted = [entry for entry in entries if entry.mutant]
    clean = [entry for entry in entries if not entry.mutant]
    name_width = max((len(entry.mutant) for entry in planted), default=6)
    check_width = max((len(entry.check) for entry in planted), default=5)
    write(f"{'mutant':<{name_width}}  {'row':<12}  {'killed by':<{check_width}}  what it said")
    for entry in planted:
        verdict = _one_line(entry.said) if entry.killed else f"SURVIVED: {_survival(entry)}"
        write(
            f"{entry.mutant:<{name_width}}  {entry.row[:12]:<12}  {entry.check:<{check_width}}  "
            f"{verdict}  ({entry.result.seconds:.1f} s)"
        )
    for entry in clean:
        if not entry.killed:
            write(f"clean subject: {entry.check} {entry.result.outcome}: {_one_line(entry.said)}")
    names = {entry.mutant for entry in planted}
    survivors = {entry.mutant for entry in planted if not entry.killed}
    passed = sum(entry.killed for entry in clean)
    write(
        f"{len(names) - len(survivors)} of {len(names)} mutants killed; "
        f"clean subject passes {passed} of {len(clean)} checks"
    )
    return not survivors and passed == len(clean)


def _survival(entry: Kill) -> str:
    if entry.result.outcome in KILLS:
        return f"found, but the cause does not say {entry.fragment!r}: {_one_line(entry.said)}"
    return f"{entry.result.outcome} {_one_line(entry.said)}".rstrip()


def _one_line(text: str, *, most: int = 110) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else words[: most - 3] + "..."
