"""The fidelities by name, from the least real to the most, and which of them a test allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from pytest_ranks.launch.spec import RankSpec

# What a lower one cannot show, each higher one can; `simulated` is gloo on a device that is not
# there, so it lies between real processes and real devices.
FIDELITIES = ("gloo", "device")
# All ranks in one process; each of the others has a process a rank.
HOSTED = ("fake", "local_tensor", "threads")
# A body that runs once for all ranks costs no process a rank: the limit on them does not apply.
UNLIMITED = ("fake", "local_tensor")
DEFAULT = "gloo"
DEVICE_BACKEND = "nccl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One fidelity that a mark asks for.

    Attributes:
        fidelity: its name.
        lowest: the lowest fidelity that the test is valid on.
        backend: of the process group.
    """

    fidelity: str
    lowest: str
    backend: str


def levels(fidelity: object, lowest_fidelity: object, backend: str | None) -> tuple[Level, ...]:
    """Return the fidelities that a mark with these arguments asks for.

    Args:
        fidelity: a name, several of them, or None for what the backend implies.
        lowest_fidelity: the lowest one that the test is valid on; None: the lowest it names.
        backend: "gloo", "nccl", or None for what the fidelity implies.

    Raises:
        BadInputError: a name is unknown, or the arguments contradict each other.
    """
    implied = "device" if backend == DEVICE_BACKEND else DEFAULT
    names = _names(fidelity, (implied,))
    lowest = min(names, key=place) if lowest_fidelity is None else lowest_fidelity
    _check(lowest, f"lowest_fidelity={lowest_fidelity!r}")
    assert isinstance(lowest, str)
    if fidelity is None:
        names = (max(implied, lowest, key=place),)
    for name in names:
        if place(name) < place(lowest):
            raise BadInputError(
                f"ranks(fidelity={name!r}, lowest_fidelity={lowest!r}): {name!r} is lower than "
                f"the lowest; the order is {', '.join(FIDELITIES)}."
            )
        if backend is not None and (backend == DEVICE_BACKEND) != (name == "device"):
            raise BadInputError(
                f"ranks(fidelity={name!r}, backend={backend!r}): expected backend "
                f"{_backend_of(name)!r} or none."
            )
    return tuple(Level(fidelity=one, lowest=lowest, backend=_backend_of(one)) for one in names)


def place(fidelity: str) -> int:
    """Return how real a fidelity is, as a number to compare."""
    return FIDELITIES.index(fidelity)


def is_allowed(spec: RankSpec, fidelity: str) -> bool:
    """Return whether a test says that it is valid at this fidelity."""
    return place(fidelity) >= place(spec.lowest_fidelity)


def at(spec: RankSpec, fidelity: str) -> RankSpec:
    """Return the same ranks at another fidelity."""
    return replace(spec, fidelity=fidelity, backend=_backend_of(fidelity))


def parse(text: str) -> str:
    """Return the fidelity that an option names.

    Raises:
        ValueError: there is none of this name.
    """
    if text not in FIDELITIES:
        raise ValueError(f"no fidelity is called {text!r}.{did_you_mean(text, FIDELITIES)}")
    return text


def _names(found: object, default: tuple[str, ...]) -> tuple[str, ...]:
    if found is None:
        return default
    is_list = isinstance(found, Sequence) and not isinstance(found, str | bytes)
    names: tuple[str, ...] = tuple(found) if is_list else (found,)  # type: ignore[arg-type, assignment]
    for name in names:
        _check(name, f"fidelity={found!r}")
    if not names:
        raise BadInputError("ranks(fidelity=[]): expected at least one fidelity.")
    if len(set(names)) != len(names):
        raise BadInputError(f"ranks(fidelity={found!r}): a fidelity is named twice.")
    return names


def _check(name: object, said: str) -> None:
    if not isinstance(name, str) or name not in FIDELITIES:
        raise BadInputError(
            f"ranks({said}): expected one of {', '.join(map(repr, FIDELITIES))}."
            f"{did_you_mean(str(name), FIDELITIES)}"
        )


def _backend_of(fidelity: str) -> str:
    return DEVICE_BACKEND if fidelity == "device" else DEFAULT
