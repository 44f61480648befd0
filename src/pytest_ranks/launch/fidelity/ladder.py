"""The fidelities by name, from the least real to the most, and which of them a test allows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from pytest_ranks.launch.spec import RankSpec

# What a lower one cannot show, each higher one can; `simulated` is gloo on a device that is not
# there, so it lies between real processes and real devices.
FIDELITIES = ("fake", "local_tensor", "threads", "gloo", "simulated", "device")
# All ranks in one process; each of the others has a process a rank.
HOSTED = ("fake", "local_tensor", "threads")
# A body that runs once for all ranks costs no process a rank: the limit on them does not apply.
UNLIMITED = ("fake", "local_tensor")
DEFAULT = "gloo"
DEVICE_BACKEND = "nccl"
SIMULATED_DEVICE = "neuron"  # Trainium: torch_neuronx registers it under this name
# Names of devices that torch has itself; it takes one more in a process.
_TORCHS_DEVICES = ("cpu", "cuda", "xpu", "mps", "xla", "hpu", "mtia", "meta", "vulkan", "ipu")
DEVICE_BACKENDS = (DEVICE_BACKEND, "xccl", "neuron")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One fidelity that a mark asks for.

    Attributes:
        fidelity: its name.
        lowest: the lowest fidelity that the test is valid on.
        backend: of the process group.
        is_pinned: whether the session has no say, because the mark names the fidelity alone.
    """

    fidelity: str
    lowest: str
    backend: str
    is_pinned: bool


def levels(fidelity: object, lowest_fidelity: object, backend: str | None) -> tuple[Level, ...]:
    """Return the fidelities that a mark with these arguments asks for.

    Args:
        fidelity: a name, several of them, or None for what the backend implies.
        lowest_fidelity: the lowest one that the test is valid on; None: the lowest it names.
        backend: one by name, or None for what the fidelity implies.

    Raises:
        BadInputError: a name is unknown, or the arguments contradict each other.
    """
    implied = "device" if backend in DEVICE_BACKENDS else DEFAULT
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
        if backend is not None and (backend in DEVICE_BACKENDS) != (name == "device"):
            raise BadInputError(
                f"ranks(fidelity={name!r}, backend={backend!r}): expected backend "
                f"{_backend_of(name)!r} or none."
            )
    is_pinned = len(names) > 1 or (fidelity is not None and lowest_fidelity is None)
    return tuple(
        Level(fidelity=one, lowest=lowest, backend=backend or _backend_of(one), is_pinned=is_pinned)
        for one in names
    )


def check_as_rank(as_rank: object, names: Sequence[str], sizes: Sequence[int]) -> int:
    """Return the rank that a body at fidelity "fake" plays.

    Raises:
        BadInputError: it is no rank of the world, or ranks play themselves.
    """
    if as_rank is None:
        return 0
    is_number = isinstance(as_rank, int) and not isinstance(as_rank, bool)
    if not is_number or not 0 <= as_rank < min(sizes):  # type: ignore[operator]
        raise BadInputError(
            f"ranks(as_rank={as_rank!r}): expected a rank of the world, 0 to {min(sizes) - 1}."
        )
    if set(names) != {"fake"}:
        raise BadInputError(
            f"ranks(as_rank={as_rank!r}): only a body at fidelity='fake' plays one rank of many; "
            "at the others every rank plays itself."
        )
    return as_rank  # type: ignore[return-value]


def check_deaths(deaths: Sequence[object], levels: Sequence[Level]) -> None:
    """Check that ranks that have to die are processes.

    Raises:
        BadInputError: one process plays all of them.
    """
    hosted = [level.lowest for level in levels if level.lowest in HOSTED]
    if deaths and hosted:
        raise BadInputError(
            f"ranks(expect_deaths=...): at fidelity {hosted[0]!r} one process plays all ranks, so "
            f"none dies alone; expected lowest_fidelity {DEFAULT!r} or above."
        )


def check_device(device: object, levels: Sequence[Level]) -> str:
    """Return the name of the accelerator that a simulated one plays.

    Raises:
        BadInputError: it is no name for one, or nothing is simulated.
    """
    if device is None:
        return SIMULATED_DEVICE
    is_name = isinstance(device, str) and re.fullmatch(r"[a-z_]+", device) is not None
    if not is_name or device in _TORCHS_DEVICES:
        raise BadInputError(
            f"ranks(device={device!r}): expected a name in small letters of an accelerator that "
            f"torch does not have itself, such as {SIMULATED_DEVICE!r}."
        )
    assert isinstance(device, str)
    if all(level.is_pinned and level.fidelity != "simulated" for level in levels):
        raise BadInputError(
            f"ranks(device={device!r}): only fidelity='simulated' names a device; a real one is "
            "what the backend has."
        )
    return device


def place(fidelity: str) -> int:
    """Return how real a fidelity is, as a number to compare."""
    return FIDELITIES.index(fidelity)


def is_allowed(spec: RankSpec, fidelity: str) -> bool:
    """Return whether a test leaves its fidelity to the session, and is valid at this one."""
    return not spec.is_pinned and place(fidelity) >= place(spec.lowest_fidelity)


def at(spec: RankSpec, fidelity: str) -> RankSpec:
    """Return the same ranks at another fidelity."""
    as_rank = spec.as_rank if fidelity == "fake" else 0
    return replace(spec, fidelity=fidelity, backend=_backend_of(fidelity), as_rank=as_rank)


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
