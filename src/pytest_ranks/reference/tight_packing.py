"""Packers for where it is tight: bins filled to the brim, even ones, every plan for a few samples."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Bins = list[list[int]]  # indices into the lengths

MOST_WORDS = 20_000_000
"""Machine words that `fill_to_the_brim` may touch, a fraction of a second."""
MOST_DIFFERENCES = 50_000
"""Samples times bins that `even_by_difference` works on, a twentieth of a second."""
MOST_EXCHANGES = 40
"""Of samples between two bins of a micro-batch."""
MOST_SAMPLES = 8
"""Of which `every_plan` tries all partitions: 4,140 of eight."""


def fill_to_the_brim(
    lengths: Sequence[int], longest_first: list[int], capacity: int, count: int
) -> Bins | None:
    """Fill one bin after the other: its longest sample first, then the set that leaves the least room.

    Minimum bin slack (J. N. D. Gupta and J. C. Ho, A new heuristic algorithm for the one-dimensional
    bin-packing problem, 1999), each set found exactly, by the sums that can be reached: bit s of a number
    says whether s tokens can.

    Args:
        lengths: tokens of each sample, each at most the capacity.
        longest_first: indices.
        capacity: tokens of a bin.
        count: bins.

    Returns:
        The bins; None where samples are left over, or where this would take long.
    """
    if count * len(longest_first) * (capacity // 64 + 1) > MOST_WORDS:
        return None
    left = longest_first
    bins: Bins = []
    for _ in range(count):
        if not left:
            bins.append([])
            continue
        room = capacity - lengths[left[0]]
        others = [index for index in left[1:] if lengths[index] <= room]
        chosen = {left[0], *_fullest(lengths, others, room)}
        bins.append([index for index in left if index in chosen])
        left = [index for index in left if index not in chosen]
    return None if left else bins


def _fullest(lengths: Sequence[int], indices: list[int], room: int) -> Iterator[int]:
    """Yield a set of indices whose lengths add up to the most that fits; longer ones where there is a choice."""
    mask, sums = (1 << room + 1) - 1, [1]
    for index in indices:
        sums.append(sums[-1] | (sums[-1] << lengths[index]) & mask)
        if sums[-1] >> room:
            break
    rest = sums[-1].bit_length() - 1
    for place in range(len(sums) - 1, 0, -1):
        if not sums[place - 1] >> rest & 1:
            yield indices[place - 1]
            rest -= lengths[indices[place - 1]]


def even_by_difference(weights: Sequence[int], indices: list[int], count: int) -> Bins | None:
    """Put samples into bins of weights as even as can be.

    The largest differencing method (N. Karmarkar and R. M. Karp, 1982) for several bins: of the partial
    plans that differ the most in themselves, the heaviest bin of one joins the lightest of the other.

    Returns:
        The bins; None where this would take long.
    """
    if len(indices) * count > MOST_DIFFERENCES:
        return None
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for number, index in enumerate(indices):
        parts: list[tuple[int, list[int]]] = [(weights[index], [index])]
        parts.extend((0, []) for _ in range(count - 1))
        heap.append((-weights[index], number, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [indices for _, indices in heap[0][2]] if heap else [[] for _ in range(count)]


def exchange(weights: Sequence[int], bins: Bins) -> Bins:
    """Lighten the heaviest bin, one sample moved or exchanged at a time, while that helps.

    Args:
        weights: of each sample.
        bins: of one micro-batch.

    Returns:
        Bins of which none is heavier than the heaviest one was.
    """
    ordered = [sorted((weights[index], index) for index in one) for one in bins]
    loads = [sum(weight for weight, _ in one) for one in ordered]
    for _ in range(MOST_EXCHANGES):
        heavy = max(range(len(loads)), key=loads.__getitem__)
        best = (loads[heavy], -1, (0, -1), (0, -1))
        for light, load in enumerate(loads):
            gap = loads[heavy] - load
            if gap < 2 or light == heavy:
                continue
            for mine in ordered[heavy]:
                for theirs in _nearest(ordered[light], mine[0] - gap / 2):
                    shift = mine[0] - theirs[0]
                    heavier = max(loads[heavy] - shift, load + shift)
                    if heavier < best[0]:
                        best = (heavier, light, mine, theirs)
        _, light, mine, theirs = best
        if light < 0:
            break
        for one, out, into in ((heavy, mine, theirs), (light, theirs, mine)):
            if out[1] >= 0:
                ordered[one].remove(out)
            if into[1] >= 0:
                insort(ordered[one], into)
            loads[one] += into[0] - out[0]
    return [[index for _, index in reversed(one)] for one in ordered]


def _nearest(ordered: list[tuple[int, int]], weight: float) -> Iterator[tuple[int, int]]:
    """Yield the samples of about this weight, and none at all."""
    at = bisect_left(ordered, (weight, -1))
    yield from ordered[max(0, at - 1) : at + 1]
    yield 0, -1


def every_plan(lengths: Sequence[int], longest_first: list[int], capacity: int) -> Iterator[Bins]:
    """Yield every way to put a few samples into bins; the bins have no order and none is empty."""

    def place(at: int, bins: Bins, loads: list[int]) -> Iterator[Bins]:
        if at == len(longest_first):
            yield [list(one) for one in bins]
            return
        index = longest_first[at]
        for number, load in enumerate(loads):
            if load + lengths[index] <= capacity:
                bins[number].append(index)
                loads[number] += lengths[index]
                yield from place(at + 1, bins, loads)
                bins[number].pop()
                loads[number] -= lengths[index]
        bins.append([index])
        loads.append(lengths[index])
        yield from place(at + 1, bins, loads)
        bins.pop()
        loads.pop()

    yield from place(0, [], [])
