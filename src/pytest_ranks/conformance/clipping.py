"""Wrong ways of clipping, each with the update that it leaves."""

from __future__ import annotations

from pytest_ranks.conformance import oracle

CLIP_TOLERANCE = 1e-4
"""torch's clipping adds 1e-6 to the norm that it divides by; measured 6e-6."""


def clipping_cause(
    world_size: int, update: oracle.Weights, wanted: oracle.Weights, limit: float
) -> str:
    """Return which wrong way of clipping the update shows."""
    length, size = oracle.norm(update), oracle.norm(wanted)
    _, rest = oracle.best_factor(update, wanted)
    if abs(length / size - 1) < CLIP_TOLERANCE and rest < CLIP_TOLERANCE:
        return "gradients are not clipped"
    ways = {
        "each tensor is clipped by its own norm, not all of them together": [
            {name: value} for name, value in wanted.items()
        ],
        "each rank clips by the norm of its own shard: the update's norm is up to sqrt(world_size) x the limit": [
            {
                name: shards[rank]
                for name, value in wanted.items()
                if len(shards := value.chunk(world_size)) > rank
            }
            for rank in range(world_size)
        ],
    }
    for cause, parts in ways.items():
        expected = sum(min(oracle.norm(part), limit) ** 2 for part in parts) ** 0.5
        if abs(length / expected - 1) < CLIP_TOLERANCE and rest > CLIP_TOLERANCE:
            return cause
    if rest > CLIP_TOLERANCE:
        return "the direction changed: clipping happens per micro-batch or before the reduction over ranks"
    return (
        f"another limit is used ({length:.3f} in place of {limit}), or the norm that clipping divides by is "
        f"{limit / length:.3f} of the true one"
    )
