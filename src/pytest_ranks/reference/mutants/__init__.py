"""The reference trainer with one planted bug each: what every check must find.

`pytest_ranks.reference.mutants:MeanOfMeans` is a subject like any other. Each mutant overrides one
step, and names the catalogue's row, a public issue, and the checks that must kill it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_ranks.reference.mutants.planted import Mutant

SUITES = (
    "loss",
    "targets",
    "gradient_sync",
    "data_loading",
    "packing",
    "mixed_precision",
    "overfitting",
    "adapter",
)
"""The modules that hold mutants."""


def all_mutants() -> tuple[Mutant, ...]:
    """Return every mutant, in the order of their files."""
    from pytest_ranks.reference.mutants.planted import PLANTED

    for suite in SUITES:
        importlib.import_module(f"{__name__}.{suite}")
    order = {suite: place for place, suite in enumerate(SUITES)}
    return tuple(sorted(PLANTED.values(), key=lambda mutant: order[mutant.suite]))


def __getattr__(name: str) -> Any:
    """Find a mutant's class by its name."""
    if name.startswith("_") or name in SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for mutant in all_mutants():
        if mutant.name == name:
            return getattr(importlib.import_module(f"{__name__}.{mutant.suite}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
