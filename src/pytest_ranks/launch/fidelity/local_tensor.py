"""All ranks of a world as one tensor subclass: real numbers of many ranks, one body in one process.

The body runs once. Each tensor holds what every rank has, and a collective does its arithmetic on all
of them. There is no rank whose number the body could ask for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_fidelity
from pytest_ranks.errors import FidelityError
from pytest_ranks.launch.fidelity import fake, refusals

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pytest_ranks.launch.wire import World

NO_NUMBER = refusals.sentence(
    "local_tensor",
    "the number of a rank",
    "one body runs for all ranks at once; take what differs from rank.mesh and DTensor",
    "threads",
)


def join(world: World) -> None:
    """Initialise the default group, whose collectives the mode takes over."""
    import torch.distributed as dist

    _mode()  # its import takes seconds, which are not the test's
    fake.join(world)
    _compat_fidelity.replace_everywhere(dist.get_rank, "get_rank", _refuse_number)


def around(world: World) -> AbstractContextManager[Any]:
    """Return the context that a test's fixtures and body run in."""
    mode: AbstractContextManager[Any] = _mode()(world.world_size)
    return mode


def _mode() -> Any:
    return _compat_fidelity.find(
        "local_tensor", "torch.distributed._local_tensor", "LocalTensorMode"
    )


def _refuse_number(group: object = None) -> int:
    """Refuse a test's own `get_rank()`; torch asks in the name of the first rank."""
    import torch.distributed as dist

    if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
        return dist.distributed_c10d.get_rank(group)  # type: ignore[arg-type]
    raise FidelityError(NO_NUMBER)
