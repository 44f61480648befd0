"""One item to be run on ranks, and the world that each of them is given for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.launch.wire import World

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_ranks.launch.pools import Pool, PoolKey
    from pytest_ranks.launch.spec import RankSpec
    from pytest_ranks.launch.wire import Rendezvous


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRequest:
    """One item to be run on ranks.

    Attributes:
        node_id: of the item.
        spec: the ranks that it asks for.
        key: the shape of its pool.
        seconds: its deadline, counted from the moment its ranks are ready.
        following: what its pool runs next, None where that is nothing or not known.
        hold: keep wide fixtures, since what the pool runs next is not known.
        is_detailed: have torch compare each collective between the ranks.
        is_last: whether no later item of this session asks for ranks of this shape.
    """

    node_id: str
    spec: RankSpec
    key: PoolKey
    seconds: float
    following: str | None = None
    hold: bool = False
    is_detailed: bool = False
    is_last: bool = True


def is_alone(spec: RankSpec) -> bool:
    """Return whether an item gets ranks of its own: a CUDA context is not handed to another test."""
    return spec.isolate or spec.backend != "gloo"


def world_of(
    request: ItemRequest, pool: Pool, rank: int, rendezvous: Rendezvous, shared: Path
) -> World:
    """Return the place of one rank in the run of an item on these ranks.

    Args:
        request: the item.
        pool: the ranks.
        rank: number of the process.
        rendezvous: how they find each other.
        shared: folder that is the same for all of them.
    """
    spec = request.spec
    return World(
        rank=rank + spec.as_rank,
        world_size=spec.world_size,
        backend=spec.simulated or spec.backend,
        mesh=spec.mesh,
        fidelity=spec.fidelity,
        init=spec.init,
        keep_group=request.key.scope is not None and not is_alone(spec),
        fresh_group=not pool.group_is_clean,
        is_detailed=request.is_detailed,
        rendezvous=rendezvous,
        shared_tmp_path=str(shared),
        environment=None if pool.devices is None else pool.devices.variables(rank),
        device=_device_name(spec, pool, rank),
    )


def _device_name(spec: RankSpec, pool: Pool, rank: int) -> str:
    if pool.devices is not None:
        return pool.devices.torch_name(rank)
    return f"{spec.simulated}:0" if spec.simulated else ""
