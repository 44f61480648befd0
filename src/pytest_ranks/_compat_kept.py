"""Private torch names that the proof of a clean process group needs, each with a probe."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Methods of `torch.distributed.ProcessGroup` that put something on the wire (torch 2.11 to 2.13).
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "scatter", "gather", "barrier"),
    *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced", "alltoall"),
    *("alltoall_base", "all_to_all_single", "reduce_scatter", "_reduce_scatter_base"),
    *("reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
    "reduce_scatter_single_coalesced",
)
_MESSAGES = ("send", "recv", "recv_anysource")
# gloo makes them of an all-reduce, and the work that it hands out never says that it is complete,
# waited for or not (torch 2.11 to 2.13). Whether all ranks issued them, the sequence numbers tell.
_NEVER_COMPLETE_ON_GLOO = "reduce_scatter"


def watch_operations(note: Callable[[Any, str, int | None, Any], None]) -> bool:
    """Call `note(group, operation, peer, work)` for each operation that Python issues on a group.

    The methods are those of a class of torch's, which cannot be told apart from a wrapper; where
    torch refuses, or has none of a name that messages need, the answer is False.
    """
    from torch.distributed import ProcessGroup

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = original(group, *args, **kwargs)
            peer = None
            if name in _MESSAGES:
                peer = -1 if name == "recv_anysource" else args[1] if len(args) > 1 else -1
            tells = _NEVER_COMPLETE_ON_GLOO not in name or "gloo" not in group.name()
            note(group, name, peer, work if tells else None)
            return work

        return method

    if not all(hasattr(ProcessGroup, name) for name in _MESSAGES):
        return False
    try:
        for name in (*_COLLECTIVES, *_MESSAGES):
            if (original := getattr(ProcessGroup, name, None)) is not None:
                setattr(ProcessGroup, name, watched(name, original))
    except (AttributeError, TypeError):
        return False
    return True
