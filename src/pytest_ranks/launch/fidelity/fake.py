"""One rank of a world of any size, in one process: collectives that move no data.

What is real: shapes, shard sizes, mesh coordinates, which collectives are issued, divisibility
errors. What is not: every value that would have come from another rank. Such values are NaN here, so
that no assertion about them passes by chance.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat_fidelity
from pytest_ranks.launch.group import original_init

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode

    from pytest_ranks.launch.wire import World

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_dtensor")
# Their results are this rank's own data, or none.
_OWN = ("send", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


def join(world: World) -> None:
    """Initialise a default group that only pretends."""
    import torch.distributed as dist

    store = _compat_fidelity.fake_store()
    if dist.is_initialized():
        dist.destroy_process_group()
    initialise = original_init()
    initialise("fake", store=store, rank=world.rank, world_size=world.world_size)


@functools.cache
def _mode_class() -> type[TorchDispatchMode]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Unknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Makes NaN of all floating-point data that a collective would have brought."""

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """Keep torch from importing its compiler, for seconds, at the first operation."""
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            """Run one operation."""
            del types
            result = func(*args, **(kwargs or {}))
            if func.namespace in _NAMESPACES:
                name = func.overloadpacket.__name__
                if name.startswith(("recv", "gather")):
                    result_like: Any = args[0]  # they return no tensors
                else:
                    result_like = () if name in _OWN else result
                for tensor in tree_leaves(result_like):
                    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                        tensor.detach().fill_(float("nan"))
            return result

    return Unknown


def around() -> TorchDispatchMode:
    """Return the context that a test's fixtures and body run in."""
    return _mode_class()()
