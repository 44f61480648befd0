"""What a test knows of the rank it runs on, and how it asks for that."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import FidelityError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_ranks.launch.group import ProcessGroup
    from pytest_ranks.launch.wire import World


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RankContext:
    """What a test knows about the rank it runs on.

    Attributes:
        index: this rank, from 0.
        local_rank: its number on this machine.
        world_size: number of ranks.
        backend: the process group's backend.
        fidelity: how real the ranks are: "gloo", "device", or what the session chose.
    """

    index: int
    local_rank: int
    world_size: int
    backend: str
    fidelity: str
    _group: ProcessGroup
    _world: World
    _tell: Callable[[object], None] | None = None

    def __repr__(self) -> str:
        return f"<rank {self.index} of {self.world_size}>"

    @property
    def device(self) -> torch.device:
        """The device of this rank: its own accelerator where it has one, else the CPU."""
        import torch

        return torch.device(self._world.device_name)

    @property
    def shared_tmp_path(self) -> Path:
        """A folder that is the same for all ranks of the test, made when first asked for."""
        folder = Path(self._world.shared_tmp_path or os.curdir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh that the mark asked for, None where it asked for none."""
        return self._group.mesh(self._world)

    def gather(self, value: object) -> list[Any]:
        """Return the values of all ranks, in order of rank, on every rank.

        Raises:
            FidelityError: the ranks of this fidelity have no values of their own.
        """
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        dist.barrier()


class RankOfAll(RankContext):
    """The context of a body that runs once for all ranks: it has no number."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("index", "local_rank"):
            from pytest_ranks.launch.fidelity.local_tensor import NO_NUMBER

            raise FidelityError(NO_NUMBER)
        return super().__getattribute__(name)

    def __repr__(self) -> str:
        return f"<all {self.world_size} ranks>"


_of_thread: dict[int, RankContext] = {}  # where threads play ranks
_current: list[RankContext] = []  # none outside of a run, else one


def current_rank() -> RankContext:
    """Return the context of the rank that this process plays.

    Raises:
        UnavailableError: this process plays none.
    """
    own = _of_thread.get(threading.get_ident())
    if own is not None:
        return own
    if not _current:
        raise UnavailableError(
            "this process plays no rank: current_rank() works inside tests with "
            "@pytest.mark.ranks(...) and inside functions that run on ranks."
        )
    return _current[0]


def context_of(
    world: World, group: ProcessGroup, *, tell: Callable[[object], None] | None = None
) -> RankContext:
    """Return what a test knows of a rank at this place in the world.

    Args:
        world: the place.
        group: its process group.
        tell: sends a message to the controller, where the rank has a process of its own.
    """
    kind = RankOfAll if world.fidelity == "local_tensor" else RankContext
    return kind(
        index=world.rank,
        local_rank=world.local_rank,
        world_size=world.world_size,
        backend=world.backend,
        fidelity=world.fidelity,
        _group=group,
        _world=world,
        _tell=tell,
    )


def set_current(context: RankContext, *, thread: int | None = None) -> None:
    """Have `current_rank()` return this context, everywhere in this process or on one thread."""
    if thread is None:
        _current[:] = [context]
    else:
        _of_thread[thread] = context
