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
from typing import TYPE_CHECKING, Protocol

from pytest_ranks.conformance.check import Check, Setting, select
from pytest_ranks.conformance.materials import Materials
from pytest_ranks.conformance.preload import modules_for
from pytest_ranks.conformance.runner import Session, run_check
from pytest_ranks.conformance.subject import find_subject
from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pytest_ranks.conformance.findings import CheckResult
    from pytest_ranks.launch.host import RankHost

MUTANTS = "pytest_ranks.reference.mutants"
"""Where `all_mutants` is: above this room in the house, so it is found by name."""

GATE = "subject"
"""The suite whose kills are adapter errors, or strategies that were not seen to take effect."""


class Planted(Protocol):
    """A subject with a planted bug: what `pytest_ranks.reference.mutants.all_mutants()` gives."""

    @property
    def name(self) -> str:
        """The subject's class."""

    @property
    def suite(self) -> str:
        """The suite that it stands in; "adapter" for bugs of adapters."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A mutant and those of its declared kills that are to be shown."""

    mutant: Planted
    kills: Mapping[str, str]


class SharedRanks(Session):
    """A session on ranks that others use too.

    Args:
        subject: as for `Session`.
        folder: where models and runs are written; may be shared, since runs lie under the subject's
            name.
        host: the ranks; whoever made it closes it.
        materials: the models of this folder, where others have them in memory.
    """

    def __init__(
        self, subject: object, folder: Path, host: RankHost, materials: Materials | None = None
    ) -> None:
        self._shared = host
        super().__init__(subject, folder)
        if materials is not None:
            self.materials = materials

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


def kill(session: Session, chosen: Chosen) -> list[Kill]:
    """Run a mutant's declared checks on it."""
    kills, mutant = [], chosen.mutant
    for name, fragment in chosen.kills.items():
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
                killed=_found(mutant, result) and fragment in said,
            )
        )
    return kills


def _found(mutant: Planted, result: CheckResult) -> bool:
    """Tell whether a check found something: a trainer's bug as a finding, an adapter's as an adapter error."""
    gate = result.check.startswith(f"{GATE}.") or mutant.suite == "adapter"
    return result.outcome in (("failed", "adapter error", "not run") if gate else ("failed",))


def clean_checks(planted: Iterable[Chosen]) -> dict[str, list[str]]:
    """Return for each clean subject the checks with settings that kill its mutants: it must pass them all."""
    wanted: dict[str, dict[str, None]] = {}
    for entry in planted:
        wanted.setdefault(entry.mutant.clean, {}).update(dict.fromkeys(entry.kills))
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
    suites: Iterable[str] | None = None,
    *,
    only: Iterable[str] | None = None,
    progress: Callable[[str], object] | None = None,
    ranks: int | None = None,
) -> list[Kill]:
    """Run every mutant on the checks that must kill it, and the clean subjects on all of these checks.

    Args:
        suites: names of suites or check ids to prove; None means all.
        only: names of mutants; None means all of those that the suites' checks kill.
        progress: called with a line of text for each result as it comes.
        ranks: how many subjects are judged side by side; None: one for each two cores, from 2 to 4.

    Returns:
        One entry a mutant and check, then those of the clean subjects.

    Raises:
        BadInputError: for a suite, check or mutant that does not exist.
    """
    chosen = chosen_mutants(suites, only)
    side_by_side = ranks or min(4, max(2, (os.cpu_count() or 2) // 2))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pytest-ranks-")))
        materials = Materials(folder)
        hosts: SimpleQueue[RankHost] = SimpleQueue()
        for _ in range(
            side_by_side
        ):  # here, not in a thread: a host ends with the thread it began in
            hosts.put(stack.enter_context(start_ranks()))

        def on_ranks(subject: str, work: Callable[[Session], list[Kill]]) -> list[Kill]:
            host = hosts.get()
            try:
                return work(SharedRanks(subject, folder, host, materials))
            finally:
                hosts.put(host)

        pool = stack.enter_context(ThreadPoolExecutor(side_by_side))
        pending = [
            *(pool.submit(on_ranks, entry.mutant.subject, _killing(entry)) for entry in chosen),
            *(
                pool.submit(on_ranks, subject, _passing(names))
                for subject, names in clean_checks(chosen).items()
            ),
        ]
        kills: list[Kill] = []
        for future in pending:
            for entry in future.result():
                kills.append(entry)
                if progress is not None:
                    progress(in_one_line(entry))
        return kills


def chosen_mutants(
    suites: Iterable[str] | None = None, only: Iterable[str] | None = None
) -> list[Chosen]:
    """Return the mutants that the named checks kill, each with those of its kills that are among them.

    Raises:
        BadInputError: for a suite, check or mutant that does not exist.
    """
    known = {mutant.name: mutant for mutant in mutants()}
    for name in only or ():
        if name not in known:
            raise BadInputError(f"{name!r} is no mutant.{did_you_mean(name, known)}")
    wanted = {check.id for check in select(suites)}
    names = known if only is None else list(only)
    chosen = []
    for name in names:
        mutant = known[name]
        kills = {check: said for check, said in mutant.kills.items() if _id(check) in wanted}
        if kills:
            chosen.append(Chosen(mutant=mutant, kills=kills))
    return chosen


def _id(name: str) -> str:
    return name.partition("[")[0]


def _killing(chosen: Chosen) -> Callable[[Session], list[Kill]]:
    return lambda session: kill(session, chosen)


def _passing(names: Sequence[str]) -> Callable[[Session], list[Kill]]:
    return lambda session: pass_clean(session, names)


def in_one_line(entry: Kill) -> str:
    """Return a result in one line: subject, catalogue row, check, what it said, seconds."""
    seconds = f"({entry.result.seconds:.1f} s)"
    if not entry.mutant:
        found = "passes" if entry.killed else f"FAILS: {entry.result.outcome} {_short(entry.said)}"
        return f"clean subject  {entry.check}  {found}  {seconds}"
    found = _short(entry.said) if entry.killed else f"SURVIVED: {_survival(entry)}"
    return f"{entry.mutant}  {entry.row}  {entry.check}  {found}  {seconds}"


def print_matrix(kills: Iterable[Kill], write: Callable[[str], object]) -> int:
    """Write the kill matrix: mutant, catalogue row, check, what the finding said, seconds.

    Args:
        kills: what `self_check` returned.
        write: called with each line, without its end.

    Returns:
        0 when every mutant was killed and the clean subjects passed, else 1: an exit status.
    """
    entries = list(kills)
    planted = [entry for entry in entries if entry.mutant]
    clean = [entry for entry in entries if not entry.mutant]
    names = max((len(entry.mutant) for entry in planted), default=6)
    checks = max((len(entry.check) for entry in planted), default=9)
    write(f"{'mutant':<{names}}  {'row':<12}  {'killed by':<{checks}}  what it said")
    for entry in planted:
        said = _short(entry.said) if entry.killed else f"SURVIVED: {_survival(entry)}"
        place = (
            f"{entry.mutant:<{names}}  {_short(entry.row, most=12):<12}  {entry.check:<{checks}}"
        )
        write(f"{place}  {said}  ({entry.result.seconds:.1f} s)")
    for entry in clean:
        if not entry.killed:
            write(in_one_line(entry))
    every = {entry.mutant for entry in planted}
    survivors = {entry.mutant for entry in planted if not entry.killed}
    passed = sum(entry.killed for entry in clean)
    of = "" if passed == len(clean) else f" of {len(clean)}"
    write(
        f"{len(every) - len(survivors)} of {len(every)} mutants killed; "
        f"clean subject passes {passed}{of} checks"
    )
    return 0 if not survivors and passed == len(clean) else 1


def _survival(entry: Kill) -> str:
    if entry.result.outcome != "passed":
        return f"{entry.result.outcome}, but not for {entry.fragment!r}: {_short(entry.said)}"
    return "passed"


def _short(text: str, *, most: int = 110) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else words[: most - 3] + "..."
