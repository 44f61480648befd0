"""How few micro-batches, and how few tokens in a row, any packing can take: what plans are judged by.

All bounds are exact in integers. Packing into the fewest bins and spreading over ranks evenly are both
NP-hard, so a plan that meets a bound is known to be optimal, and one that does not may still be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# Fekete and Schepers, New classes of fast lower bounds for bin packing problems, 2001: with k up to
# here their function finds the bound of every "k samples fill a bin" case that training has.
MOST_DUAL = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What no plan can do better than.

    Attributes:
        micro_batches: how many there are.
        step_tokens: tokens of the busiest rank of each micro-batch, added up: all ranks wait for it.
    """

    micro_batches: int
    step_tokens: int


def lower_bounds(lengths: Sequence[int], capacity: int, world_size: int) -> Bounds:
    """Return the least that a plan for these lengths can take.

    Args:
        lengths: tokens of each sample, each at most the capacity.
        capacity: tokens that a rank may take in one micro-batch.
        world_size: number of ranks.
    """
    longest_first = _sorted(lengths)
    if not len(longest_first):
        return Bounds(micro_batches=0, step_tokens=0)
    bins = max(bins_by_size(longest_first, capacity), bins_by_dual(longest_first, capacity))
    return Bounds(
        micro_batches=max(1, -(-bins // world_size)),
        step_tokens=tokens_in_a_row(longest_first, capacity, world_size),
    )


def _sorted(lengths: Sequence[int]) -> Any:
    import numpy

    found = numpy.asarray(lengths, dtype=numpy.int64)
    return numpy.sort(found)[::-1]


def bins_by_size(longest_first: Any, capacity: int) -> int:
    """Return Martello and Toth's bound L2 on the number of bins (Knapsack Problems, 1990, 8.3).

    For each threshold, samples too long to share a bin with one of that size count as a bin each, and what
    of the others does not fit beside those above half a bin needs bins of its own.
    """
    import numpy

    total = numpy.concatenate(([0], numpy.cumsum(longest_first)))
    ascending = longest_first[::-1]
    count = len(longest_first)

    def at_least(bound: Any) -> Any:
        return count - numpy.searchsorted(ascending, bound, side="left")

    small = numpy.unique(longest_first[2 * longest_first <= capacity])
    thresholds = numpy.concatenate(([0], small))
    alone = at_least(capacity - thresholds + 1)  # those above capacity - threshold
    halves = at_least(capacity // 2 + 1)
    upper = at_least(thresholds)
    beside = halves * capacity - (total[halves] - total[alone]) - alone * capacity
    rest = total[upper] - total[halves] - beside
    return int(numpy.max(halves + numpy.maximum(0, -(-rest // capacity))))


def bins_by_dual(longest_first: Any, capacity: int) -> int:
    """Return the bound of Fekete and Schepers' dual feasible functions on the number of bins."""
    import numpy

    best = 0
    for k in range(1, MOST_DUAL + 1):
        parts, left = numpy.divmod((k + 1) * longest_first, capacity)
        value = numpy.where(left == 0, k * longest_first, capacity * parts)
        best = max(best, -(-int(value.sum()) // (k * capacity)))
    return best


def tokens_in_a_row(longest_first: Any, capacity: int, world_size: int) -> int:
    """Return how many tokens the busiest ranks of all micro-batches take together at least.

    Whatever the plan: the mean over ranks; the longest sample; of any k x ranks + 1 samples one rank runs
    k + 1; and samples above half the capacity share no bin, so that each `ranks` of them are a pass.
    """
    import numpy

    total = numpy.concatenate(([0], numpy.cumsum(longest_first)))
    count = len(longest_first)
    ks = numpy.arange(0, (count - 1) // world_size + 1)
    last = ks * world_size + 1  # so many of the longest
    first = numpy.maximum(0, last - ks - 1)
    pigeonhole = int(numpy.max(total[last] - total[first]))
    long = longest_first[2 * longest_first > capacity]
    return max(math.ceil(int(total[-1]) / world_size), pigeonhole, int(long[::world_size].sum()))
