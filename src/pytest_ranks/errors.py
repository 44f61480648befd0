"""The exceptions that this package raises, and how a near-miss name is suggested."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class RanksError(Exception):
    """Base of every exception that is ours."""


class BadInputError(RanksError, ValueError):
    """An argument, option, file or subject that cannot be used; the text says what to do."""


class UnavailableError(RanksError):
    """Something that this machine or this installation does not have; the text names it."""


class FidelityError(RanksError):
    """Something that ranks of this fidelity cannot show; the text says why and what can."""


class RankFailure(RanksError):
    """A function or script on ranks failed.

    Attributes:
        rank: the rank that failed first.
        world_size: how many ranks there were.
    """

    def __init__(self, text: str, *, rank: int, world_size: int) -> None:
        super().__init__(text)
        self.rank = rank
        self.world_size = world_size


class RankTimeout(RankFailure):
    """Ranks did not finish before their deadline; the text holds the stacks of all of them."""


def not_installed(what: str, error: ModuleNotFoundError) -> str:
    """Return the sentence about a package that something of ours needs.

    Args:
        what: the option or the thing that needs it.
        error: from the import.

    Raises:
        ModuleNotFoundError: the error itself, where a module of ours is missing.
    """
    if (error.name or "").startswith("pytest_ranks"):
        raise error
    install = "install it with: pip install 'pytest-ranks[models]'"
    return f"{what}: needs {error.name}, found none; {install}"


def nearest_or_all(found: str, known: Sequence[str]) -> str:
    """Return `did you mean 'x'?` for the nearest of the known names, or all where none is near."""
    near = get_close_matches(found, known, n=1)
    one_of = "one of " if len(known) > 1 else ""
    return f"did you mean {near[0]!r}?" if near else f"expected {one_of}{', '.join(known)}."


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of the known names, or nothing."""
    near = get_close_matches(found, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
