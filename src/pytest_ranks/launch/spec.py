"""What a `ranks` mark asks for: world size, mesh, backend, deadline."""

from __future__ import annotations

import inspect
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_ranks.errors import BadInputError, did_you_mean, nearest_or_all
from pytest_ranks.launch.fidelity import ladder

BACKENDS = ("gloo", *ladder.DEVICE_BACKENDS)
MOST_RANKS = 1 << 20  # pretended ones cost memory too
DIMENSIONS = ("dp", "tp", "pp", "cp", "ep")  # data, tensor, pipeline, context, expert


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """The ranks that one test item runs on.

    Attributes:
        world_size: number of ranks.
        mesh: names and sizes of the mesh dimensions, in the order they were given.
        backend: the process group's backend: "gloo" on CPU, else one with a device a rank.
        timeout: seconds for the item after its ranks are ready, or None for the default.
        isolate: whether the item gets freshly forked ranks of its own.
        init: whether the process group is initialised before the test.
        keep_group: whether the process group is kept for the next test under the same mark.
        fidelity: how real the ranks are, one of `ladder.FIDELITIES`.
        lowest_fidelity: the lowest fidelity that the test is valid on.
        is_pinned: whether the session has no say in the fidelity.
        as_rank: which rank the body plays at fidelity "fake".
        device: the accelerator that fidelity "simulated" plays.
        expect_deaths: ranks whose processes have to end, each with the name of the signal or the
            exit code.
    """

    world_size: int
    mesh: tuple[tuple[str, int], ...] = ()
    backend: str = "gloo"
    timeout: float | None = None
    isolate: bool = False
    init: bool = True
    keep_group: bool = False
    fidelity: str = ladder.DEFAULT
    lowest_fidelity: str = ladder.DEFAULT
    is_pinned: bool = False
    as_rank: int = 0
    device: str = ladder.SIMULATED_DEVICE
    expect_deaths: tuple[tuple[int, str | int], ...] = ()

    @property
    def processes(self) -> int:
        """How many processes play the ranks."""
        return 1 if self.fidelity in ladder.HOSTED else self.world_size

    @property
    def simulated(self) -> str:
        """The accelerator that is simulated, nothing where none is."""
        return self.device if self.fidelity == "simulated" else ""

    @property
    def is_limited(self) -> bool:
        """Whether its ranks cost so much that the option `max_world_size` applies."""
        return self.fidelity not in ladder.UNLIMITED


def ranks(
    world_size: int | Sequence[int] | None = None,
    /,
    *,
    timeout: float | None = None,
    backend: str | None = None,
    isolate: bool = False,
    init: bool = True,
    keep_group: bool = False,
    fidelity: str | Sequence[str] | None = None,
    lowest_fidelity: str | None = None,
    as_rank: int | None = None,
    device: str | None = None,
    expect_deaths: Mapping[int, str | int] | None = None,
    **mesh: int | None,
) -> tuple[RankSpec, ...]:
    """Return what the mark `ranks` with these arguments asks for, one spec for each world size.

    Args:
        world_size: number of ranks, or several for one test item each.
        timeout: seconds for the test after its ranks are ready.
        backend: the process group's backend: "gloo" on CPU; with a device a rank "nccl" (CUDA
            and ROCm), "xccl" (Intel) or "neuron" (Trainium).
        isolate: give the test freshly forked ranks, kept by no other test.
        init: initialise the process group; False leaves that to the test.
        keep_group: keep the process group for the next test of the class or module that has the
            mark, where it is proven clean.
        fidelity: how real the ranks are, or several for one test item each.
        lowest_fidelity: the lowest fidelity that the test is valid on.
        as_rank: which rank the body plays at fidelity "fake", which runs for one only.
        device: the accelerator that fidelity "simulated" plays.
        expect_deaths: rank -> signal, such as "SIGKILL", or exit code, that has to end its process.
        mesh: sizes of the mesh dimensions `dp`, `tp`, `pp`, `cp`, `ep`, in the order of the mesh.

    Raises:
        BadInputError: an argument is unknown, of a wrong type or out of range.
    """
    dimensions = _mesh_dimensions(mesh)
    sizes = _world_sizes(world_size, dimensions)
    if backend is not None and backend not in BACKENDS:
        raise BadInputError(
            f"ranks(backend={backend!r}): expected one of {', '.join(map(repr, BACKENDS))}."
            f"{did_you_mean(str(backend), BACKENDS)}"
        )
    if timeout is not None and not _is_positive_number(timeout):
        raise BadInputError(f"ranks(timeout={timeout!r}): expected a number of seconds above 0.")
    _check_flags(isolate=isolate, init=init, keep_group=keep_group, has_mesh=bool(dimensions))
    levels = ladder.levels(fidelity, lowest_fidelity, backend)
    simulated = ladder.check_device(device, levels)
    played = ladder.check_as_rank(as_rank, [level.fidelity for level in levels], sizes)
    deaths = _deaths(expect_deaths, min(sizes), keep_group=keep_group)
    ladder.check_deaths(deaths, levels)
    return tuple(
        RankSpec(
            world_size=size,
            mesh=dimensions,
            backend=level.backend,
            timeout=timeout,
            isolate=isolate,
            init=init,
            keep_group=keep_group,
            fidelity=level.fidelity,
            lowest_fidelity=level.lowest,
            is_pinned=level.is_pinned,
            as_rank=played,
            device=simulated,
            expect_deaths=deaths,
        )
        for size in sizes
        for level in levels
    )


# What users read is the promise: the dimensions by name. The function takes **mesh
# because only that keeps the order in which they were written.
ranks.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(ranks).parameters.values())[:1],
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in DIMENSIONS
        ),
        *list(inspect.signature(ranks).parameters.values())[1:-1],
    ],
    return_annotation=inspect.signature(ranks).return_annotation,
)


def fill(
    args: Sequence[object], kwargs: Mapping[str, object], parameters: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Put the values of a test's parameters where the mark names them as a size.

    Args:
        args: positional arguments of the mark.
        kwargs: its keyword arguments.
        parameters: values of the parametrized arguments of one test item, by name.

    Returns:
        The arguments with `ranks("ws")` and `ranks(dp="dp")` filled in.

    Raises:
        BadInputError: the test has no parametrized argument of that name.
    """

    def value(name: str, found: object) -> object:
        if not isinstance(found, str):
            return found
        if found not in parameters:
            has = ", ".join(map(repr, parameters)) or "none"
            raise BadInputError(
                f"ranks({name}{found!r}): expected a number, or the name of a parametrized "
                f"argument of the test, which has {has}.{did_you_mean(found, list(parameters))}"
            )
        return parameters[found]

    return (
        tuple(value("", one) for one in args),
        {
            name: value(f"{name}=", one) if name in DIMENSIONS else one
            for name, one in kwargs.items()
        },
    )


def check_run(world_size: object, timeout: object) -> None:
    """Check what a run of a function or a script on ranks was asked for.

    Raises:
        BadInputError: the world size is no count, or the timeout no number of seconds.
    """
    __tracebackhide__ = True
    if not _is_count(world_size):
        raise BadInputError(f"world_size={world_size!r}: expected a whole number of at least 1.")
    if not _is_positive_number(timeout):
        raise BadInputError(f"timeout={timeout!r}: expected a number of seconds above 0.")


def check_environment(env: object) -> None:
    """Check variables for ranks.

    Raises:
        BadInputError: they are no mapping of texts.
    """
    __tracebackhide__ = True
    if env is None:
        return
    texts = [text for pair in env.items() for text in pair] if isinstance(env, Mapping) else [env]
    if not all(isinstance(text, str) for text in texts) or isinstance(env, str):
        raise BadInputError(
            f"env={env!r}: expected names and values as texts, such as {{'A': '1'}}."
        )


def _mesh_dimensions(mesh: dict[str, int | None]) -> tuple[tuple[str, int], ...]:
    for name in mesh:
        if name == "world_size":
            raise BadInputError(
                f"ranks(world_size=...): expected the world size without its name: "
                f"ranks({mesh[name]!r})."
            )
        if name not in DIMENSIONS:
            known = list(inspect.signature(ranks).parameters)[1:]
            raise BadInputError(
                f"ranks({name}=...): unknown argument {name!r}, {nearest_or_all(name, known)}"
            )
    dimensions = []
    for name, size in mesh.items():
        if size is None:
            continue
        if not _is_count(size):
            raise BadInputError(f"ranks({name}={size!r}): expected a whole number of at least 1.")
        dimensions.append((name, size))
    return tuple(dimensions)


def _world_sizes(found: object, dimensions: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    product = math.prod(size for _, size in dimensions)
    if found is None:
        if not dimensions:
            raise BadInputError("ranks(): expected a world size, as ranks(2), or a mesh, as dp=2.")
        sizes: tuple[Any, ...] = (product,)
    elif isinstance(found, Sequence) and not isinstance(found, str | bytes):
        sizes = tuple(found)
        if not sizes:
            raise BadInputError("ranks([]): expected at least one world size.")
        if len(set(map(repr, sizes))) != len(sizes):
            raise BadInputError(f"ranks({list(sizes)!r}): a world size is named twice.")
    else:
        sizes = (found,)
    for size in sizes:
        if not _is_count(size):
            raise BadInputError(
                f"ranks({found!r}): world size {size!r}, expected a whole number of at least 1."
            )
        if size > MOST_RANKS:
            raise BadInputError(
                f"ranks: world size {size}, expected at most {MOST_RANKS}; no machine has more."
            )
        if dimensions and size != product:
            mesh = ", ".join(f"{name}={value}" for name, value in dimensions)
            raise BadInputError(
                f"ranks({found!r}, {mesh}): the mesh multiplies out to {product} ranks, "
                f"the world size is {size}."
            )
    return sizes


def _check_flags(*, isolate: object, init: object, keep_group: object, has_mesh: bool) -> None:
    for name, flag in (("isolate", isolate), ("init", init), ("keep_group", keep_group)):
        if not isinstance(flag, bool):
            raise BadInputError(f"ranks({name}={flag!r}): expected True or False.")
    if not init and has_mesh:
        raise BadInputError(
            "ranks(init=False) and a mesh: a mesh needs the process group, which init=False "
            "leaves to the test; let the test make the mesh too."
        )
    if keep_group and isolate:
        raise BadInputError(
            "ranks(keep_group=True, isolate=True): fresh ranks have no group of an earlier test; "
            "leave one of the two out."
        )
    if keep_group and not init:
        raise BadInputError(
            "ranks(keep_group=True, init=False): the test that initialises a group itself has "
            "none to keep; leave one of the two out."
        )


def _deaths(
    found: object, world_size: int, *, keep_group: bool
) -> tuple[tuple[int, str | int], ...]:
    """Return the deaths that a mark declares; `world_size` is the smallest that it asks for."""
    if found is None:
        return ()
    if keep_group:
        raise BadInputError(
            f"ranks(keep_group=True, expect_deaths={found!r}): a group with a dead rank cannot be "
            "kept; leave one of the two out."
        )
    if not isinstance(found, Mapping) or not found:
        raise BadInputError(
            f"ranks(expect_deaths={found!r}): expected signals or exit codes by rank, such as "
            "{1: 'SIGKILL'} or {1: 3}."
        )
    for rank in found:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < world_size:
            raise BadInputError(
                f"ranks(expect_deaths={found!r}): rank {rank!r}, expected one from 0 to "
                f"{world_size - 1}, since the world has {world_size}."
            )
    return tuple((rank, _death(found, end)) for rank, end in sorted(found.items()))


def _death(found: object, end: object) -> str | int:
    if isinstance(end, signal.Signals):
        return end.name
    if isinstance(end, str) and end in signal.Signals.__members__:
        return end
    if isinstance(end, int) and not isinstance(end, bool) and 0 <= end <= 255:
        return end
    hint = did_you_mean(end, signal.Signals.__members__) if isinstance(end, str) else ""
    raise BadInputError(
        f"ranks(expect_deaths={found!r}): found {end!r}, expected a signal, such as 'SIGKILL', or "
        f"an exit code from 0 to 255.{hint}"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]
