"""Deaths that a test declares on its mark: then they have to happen, and are no failure."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from pytest_ranks.launch.outcome import ExpectedEnd

if TYPE_CHECKING:
    from pytest_ranks.launch.spec import RankSpec


def expected_ends(spec: RankSpec) -> dict[int, ExpectedEnd]:
    """Return, for each rank that has to die, how its process has to end."""
    return {rank: _end(death) for rank, death in spec.expect_deaths}


def _end(death: str | int) -> ExpectedEnd:
    if isinstance(death, int):
        return ExpectedEnd(text=f"exit with code {death}", statuses=frozenset({death}))
    return ExpectedEnd(text=f"die of {death}", statuses=frozenset({-signal.Signals[death]}))
