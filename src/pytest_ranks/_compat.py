"""Every private torch and pytest name that we use, each with a probe.

Nothing on the gloo path depends on one of them: each has an answer for the case that it is gone.
"""

from __future__ import annotations

from typing import Any


def all_process_groups() -> list[Any]:
    """Return every live process group (torch 2.11 to 2.13: `distributed_c10d._world.pg_map`).

    Where torch does not tell, subgroups are destroyed in the foreground: slower, not wrong.
    """
    from torch.distributed import distributed_c10d

    world = getattr(distributed_c10d, "_world", None)
    return list(getattr(world, "pg_map", ()))


def sequence_number(group: Any) -> int | None:
    """Return how many collectives a group has issued, None where torch does not tell."""
    probe = getattr(group, "_get_sequence_number_for_group", None)
    if probe is None:
        return None
    try:
        return int(probe())
    except RuntimeError:
        return None
