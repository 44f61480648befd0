"""How a bug is planted: one step of the trainer (or of the adapter) overridden, and what must find it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.reference.trainer import Trainer
from pytest_ranks.subjects.reference import ReferenceTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A subject with one planted bug.

    Attributes:
        name: the subject's class, importable from `pytest_ranks.reference.mutants`.
        suite: the file it stands in.
        row: the catalogue's row, or the property (PK1, LG1 ...) where no public report has a row of its own.
        issue: a public report of the same bug; empty where none is known.
        summary: what is wrong, in one sentence.
        kills: check id with setting -> what the finding's cause must say, in lower or upper case.
        clean: the same subject without the bug.
    """

    name: str
    suite: str
    row: str
    issue: str
    summary: str
    kills: Mapping[str, str]
    clean: str

    @property
    def subject(self) -> str:
        """Return the text that `--ranks-subject` takes."""
        return f"pytest_ranks.reference.mutants:{self.name}"


PLANTED: dict[str, Mutant] = {}
"""Every mutant whose module is imported, by name."""

CLEAN = "pytest_ranks.subjects.reference:ReferenceTrainer"


class CleanByRows(ReferenceTrainer):
    """The reference trainer without a bug, declared to pack by rows."""

    capabilities = dataclasses.replace(ReferenceTrainer.capabilities, packing="rows")


def plant(
    *,
    row: str,
    kills: Mapping[str, str],
    issue: str = "",
    by_rows: bool = False,
) -> Callable[[type[Any]], type[Any]]:
    """Make a subject of a trainer (or adapter) with a bug, and register it.

    Args:
        row: the catalogue's row.
        kills: check id with setting -> a fragment of the cause that its finding must name.
        issue: a public report of the same bug.
        by_rows: whether the subject packs by rows in place of by step.
    """

    def planted(faulty: type[Any]) -> type[Any]:
        base: type[ReferenceTrainer] = CleanByRows if by_rows else ReferenceTrainer
        subject = _subject(faulty, base) if issubclass(faulty, Trainer) else faulty
        PLANTED[faulty.__name__] = Mutant(
            name=faulty.__name__,
            suite=faulty.__module__.rpartition(".")[2],
            row=row,
            issue=issue,
            summary=(faulty.__doc__ or "").strip().splitlines()[0],
            kills=dict(kills),
            clean=f"{__name__}:CleanByRows" if by_rows else CLEAN,
        )
        return subject

    return planted


def _subject(faulty: type[Trainer], base: type[ReferenceTrainer]) -> type[ReferenceTrainer]:
    return type(
        faulty.__name__,
        (base,),
        {
            "__doc__": faulty.__doc__,
            "__module__": faulty.__module__,
            "__qualname__": faulty.__qualname__,
            "trainer_class": staticmethod(lambda: faulty),
        },
    )
