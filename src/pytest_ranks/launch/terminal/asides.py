"""What a rank and its controller say to each other beside the work: coverage, debugger, subtests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How ranks measure coverage.

    Attributes:
        config: coverage's configuration, as it serialises that.
        contexts: whether each phase of a test is a dynamic context.
    """

    config: str
    contexts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """Whether the rank has the terminal now; with a yes descriptors to read and to write come along."""

    is_yours: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtest:
    """A subtest ended inside the call of an item; `report` as pytest serialises it."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskTerminal:
    """The rank's debugger wants the terminal, or is done with it."""

    is_over: bool = False
