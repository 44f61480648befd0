"""When a fault strikes: at a collective, at an optimizer step, or after a time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.launch.injection.collective_calls import NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

COLLECTIVES = tuple(dict.fromkeys(NAMES.values()))
_AT = re.compile(r"(\w*)#(-?\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AtCollective:
    """A collective of this rank: the third all_reduce, or the third of any name.

    Attributes:
        name: as in torch.distributed, empty for any.
        number: counted from 1.
    """

    name: str
    number: int

    def __repr__(self) -> str:
        return repr(f"{self.name}#{self.number}")

    def describe_shortfall(self, counts: Mapping[str, int]) -> str:
        """Return what the rank issued, where that was too little."""
        others = {name: count for name, count in counts.items() if name != self.name}
        parts = [f"{counts.get(self.name, 0)} {self.name}"] if self.name else []
        parts += [f"{count} {name}" for name, count in others.items()]
        return f"issued {', '.join(parts) or 'no collective'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtStep:
    """An optimizer step of this rank; those of all its optimizers are counted together.

    Attributes:
        number: counted from 1.
        when: `before` the parameters change, with the gradients there, or `after`.
    """

    number: int
    when: Literal["before", "after"] = "before"

    def __repr__(self) -> str:
        when = "" if self.when == "before" else f", when={self.when!r}"
        return f"step({self.number}{when})"


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterSeconds:
    """A time after the call."""

    seconds: float


Trigger = AtCollective | AtStep | AfterSeconds


def step(number: int, *, when: Literal["before", "after"] = "before") -> AtStep:
    """Return the moment of an optimizer step, for `at=` of a fault.

    Args:
        number: which step of the rank, counted from 1 and over all its optimizers.
        when: "before" the parameters change, when the gradients are there, or "after".

    Raises:
        BadInputError: the number is no whole number of at least 1, or `when` is neither.
    """
    __tracebackhide__ = True
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BadInputError(f"step({number!r}): expected a whole number of at least 1.")
    if when not in ("before", "after"):
        hint = did_you_mean(str(when), ("before", "after"))
        raise BadInputError(
            f"step({number}, when={when!r}): expected 'before' or 'after' the parameters "
            f"change.{hint}"
        )
    return AtStep(number=number, when=when)


def parse(call: str, at: object, after: object) -> Trigger | None:
    """Return the trigger that a fault was given, None where it strikes at once.

    Args:
        call: name of the fault, for messages.
        at: "all_reduce#3", "#5", `step(2)` or None.
        after: seconds, or None.

    Raises:
        BadInputError: it cannot be read, or both were given.
    """
    __tracebackhide__ = True
    if at is not None and after is not None:
        raise BadInputError(f"{call}(at={at!r}, after={after!r}): expected one of them.")
    if after is not None:
        return AfterSeconds(seconds=check_seconds(call, "after", after))
    if at is None or isinstance(at, AtStep):
        return at
    match = _AT.fullmatch(at) if isinstance(at, str) else None
    if match is None:
        raise BadInputError(
            f"{call}(at={at!r}): expected a collective and its number, such as 'all_reduce#3', "
            "'#5' for the fifth of any name, or step(2)."
        )
    name, number = match[1], int(match[2])
    if name and name not in COLLECTIVES:
        near = did_you_mean(name, COLLECTIVES).replace("'?", f"#{number}'?")
        raise BadInputError(
            f"{call}(at={at!r}): unknown collective {name!r}, expected one of "
            f"{', '.join(COLLECTIVES)}.{near}"
        )
    if number < 1:
        raise BadInputError(f"{call}(at={at!r}): number {number}, they are counted from 1.")
    return AtCollective(name=name, number=number)


def check_seconds(call: str, name: str, value: object) -> float:
    """Return a time that a fault was given.

    Raises:
        BadInputError: it is no number of seconds of at least 0.
    """
    __tracebackhide__ = True
    if is_number(value) and 0 <= value < math.inf:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise BadInputError(f"{call}({name}={value!r}): expected a number of seconds, 0 or more.")


def is_number(value: object) -> bool:
    """Return whether a value is a number and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)
