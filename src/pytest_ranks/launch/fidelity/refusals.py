"""What a fidelity cannot show, refused where a test asks for it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import FidelityError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One thing of torch that some fidelities cannot show.

    Attributes:
        what: its name for people.
        module: where it is.
        path: attributes down to the function that every use of it calls.
        why: fidelity -> the reason.
        instead: the lowest fidelity that shows it.
    """

    what: str
    module: str
    path: tuple[str, ...]
    why: Mapping[str, str]
    instead: str


_ONE_BODY = "one body runs for all ranks, so no rank has an object of its own to send"
_NO_DATA = "no data moves, so what arrives is this rank's own"
OBJECTS = {"fake": _NO_DATA, "local_tensor": _ONE_BODY}

# The places lie below the public names, so that names which a module imported earlier are held too.
REFUSALS = (
    Refusal(
        what="collectives of Python objects",
        module="torch.distributed.distributed_c10d",
        path=("_tensor_to_object",),
        why=OBJECTS,
        instead="threads",
    ),
    Refusal(
        what="DistributedDataParallel",
        module="torch.nn.parallel.distributed",
        path=("DistributedDataParallel", "__init__"),
        why={
            "fake": "its reducer compares parameters between ranks",
            "local_tensor": "its reducer needs the storage of each parameter",
        },
        instead="threads",
    ),
    Refusal(
        what="FSDP2 (fully_shard)",
        module="torch.distributed.fsdp._fully_shard._fsdp_param_group",
        path=("FSDPParamGroup", "__init__"),
        why={
            "local_tensor": "it resizes the storage of parameters, and one tensor that stands for "
            "all ranks has none; with that stubbed its numbers are wrong"
        },
        instead="threads",
    ),
    Refusal(
        what="FSDP1 (FullyShardedDataParallel)",
        module="torch.distributed.fsdp.fully_sharded_data_parallel",
        path=("FullyShardedDataParallel", "__init__"),
        why={
            "fake": "it exchanges objects between ranks",
            "local_tensor": "it resizes the storage of parameters, and one tensor that stands for "
            "all ranks has none",
        },
        instead="threads",
    ),
    Refusal(
        what="pipeline stages",
        module="torch.distributed.pipelining.stage",
        path=("_PipelineStageBase", "__init__"),
        why={"fake": _NO_DATA, "local_tensor": "each rank runs another part of the model"},
        instead="threads",
    ),
    Refusal(
        what="the samples of a rank (DistributedSampler)",
        module="torch.utils.data.distributed",
        path=("DistributedSampler", "__init__"),
        why={"local_tensor": "one body runs for all ranks, which would all see those of rank 0"},
        instead="threads",
    ),
    Refusal(
        what="distributed checkpoints",
        module="torch.distributed.checkpoint.utils",
        path=("_DistWrapper", "__init__"),
        why=OBJECTS,
        instead="threads",
    ),
)


def sentence(fidelity: str, what: str, why: str, instead: str) -> str:
    """Return the text of a refusal."""
    return (
        f"fidelity {fidelity!r} cannot show {what}: {why}; "
        f"run the test at fidelity {instead!r} or above."
    )


def enforce(fidelity: str, rows: Sequence[Refusal] = REFUSALS) -> None:
    """Put the refusals of a fidelity in force in this process, for good.

    Modules that nobody has imported yet get theirs at their import.
    """
    for row in rows:
        if fidelity in row.why:
            at_import(row.module, functools.partial(_apply, row, fidelity))


def at_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Do something to a module: now, or as soon as it is imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AtImport(name, action))


def refuse(row: Refusal, fidelity: str) -> Callable[..., Any]:
    """Return a function that refuses every call."""

    def refused(*_: object, **__: object) -> Any:
        __tracebackhide__ = True
        raise FidelityError(sentence(fidelity, row.what, row.why[fidelity], row.instead))

    return refused


def _apply(row: Refusal, fidelity: str, module: ModuleType) -> None:
    target: Any = module
    for name in row.path[:-1]:
        target = getattr(target, name, None)
    # A torch without this place is a torch in which the thing fails by itself, or works.
    if target is not None and hasattr(target, row.path[-1]):
        setattr(target, row.path[-1], refuse(row, fidelity))


class _AtImport:
    """Finds one module like everybody before it, and acts on it once it is loaded."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action
        self._is_busy = False

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the module, with a loader that tells when it is done."""
        del path, target
        if name != self._name or self._is_busy:
            return None
        self._is_busy = True
        try:
            found = importlib.util.find_spec(name)
        finally:
            self._is_busy = False
        if found is not None and found.loader is not None:
            load = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self._action(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found
