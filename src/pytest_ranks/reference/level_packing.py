"""The packer that needs the fewest micro-batches and leaves ranks idle the least.

Samples are spread, longest first, over all bins of all micro-batches at once, each bin measured against
the level that its micro-batch has to reach: a micro-batch that holds an unavoidably long sample is
filled up to it, the others share one level. A lower bound says when that is as good as can be; only
where it is not, other ways to fill the same bins are tried.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from pytest_ranks.reference.packing_bounds import (
    bins_by_dual,
    bins_by_size,
    tokens_in_a_row,
)
from pytest_ranks.reference.tight_packing import (
    MOST_SAMPLES,
    even_by_difference,
    every_plan,
    exchange,
    fill_to_the_brim,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A plan whose busiest ranks take at most this much more than the bound is not improved any further.
GOOD_ENOUGH = 1.00002

Bins = list[list[int]]  # indices into the lengths
MicroBatches = list[Bins]  # for each micro-batch, a bin for each rank


def pack_by_level(
    lengths: Sequence[int],
    capacity: int,
    world_size: int,
    *,
    cost: Callable[[int], int] | None = None,
) -> MicroBatches:
    """Return the bins of each micro-batch.

    Args:
        lengths: tokens of each sample, each at most the capacity.
        capacity: tokens that a rank may take in one micro-batch.
        world_size: number of ranks.
        cost: the time that a sample of so many tokens takes, in any unit, as an integer: what ranks
            are balanced by. Tokens where None.
    """
    if not lengths:
        return []
    import numpy

    weights = lengths if cost is None else [cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: (-weights[index], index))
    longest_first = numpy.sort(numpy.asarray(lengths, dtype=numpy.int64))[::-1]
    fewest = bins_by_size(longest_first, capacity)
    task = Task(lengths, weights, order, capacity, world_size)
    count = max(1, -(-fewest // world_size))
    if (found := task.fill(count)) is None:
        fewest = bins_by_dual(longest_first, capacity)
        count = max(count + 1, -(-fewest // world_size))
        while (found := task.fill(count)) is None:
            count += 1
    if cost is None:
        bound = tokens_in_a_row(longest_first, capacity, world_size)
    else:
        bound = max(-(-sum(weights) // world_size), *weights)
    found = task.improve(found, bound)
    is_best = len(found) * world_size < fewest + world_size and task.time(found) <= bound
    return found if is_best or len(lengths) > MOST_SAMPLES else task.best_of_all(found)


class Task:
    """Samples to be put into the bins of so many micro-batches.

    Args:
        lengths: tokens of each sample.
        weights: what ranks are balanced by.
        order: indices, heaviest first.
        capacity: tokens of a bin.
        world_size: bins of a micro-batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[int],
        order: list[int],
        capacity: int,
        world_size: int,
    ) -> None:
        self._lengths = lengths
        self._weights = weights
        self._order = order
        self._capacity = capacity
        self._world_size = world_size

    def fill(self, count: int) -> MicroBatches | None:
        """Return all samples in so many micro-batches, None where no way to do that was found."""
        levels = self._levels(count)
        bins = self._spread(self._order, levels)
        if bins is not None:
            return self._cut(bins)
        level = [0] * len(levels)
        longest_first = sorted(self._order, key=lambda index: (-self._lengths[index], index))
        bins = (
            self._spread(self._order, level)
            or self._best_fit(longest_first, len(levels), self._capacity)
            or fill_to_the_brim(self._lengths, longest_first, self._capacity, len(levels))
        )
        return None if bins is None else self._cut(self._by_weight(bins))

    def improve(self, found: MicroBatches, bound: int) -> MicroBatches:
        """Return the same number of micro-batches, with ranks that wait less where that is possible."""
        best, least = found, self.time(found)
        ways = (self._even_out, self._spread_again, self._difference_again)
        for way in ways:
            if least <= GOOD_ENOUGH * bound:
                break
            other = way(best)
            if other is not None and (time := self.time(other)) < least:
                best, least = other, time
        return best

    def best_of_all(self, found: MicroBatches) -> MicroBatches:
        """Return the fewest micro-batches, of those the ones that wait least: all plans are tried."""
        best, least = found, (len(found), self.time(found))
        for bins in every_plan(self._lengths, self._order, self._capacity):
            bins.extend([] for _ in range(-len(bins) % self._world_size))
            other = self._cut(self._by_weight(bins))
            if (reached := (len(other), self.time(other))) < least:
                best, least = other, reached
        return best

    def time(self, micro_batches: MicroBatches) -> int:
        """Return what the busiest rank of each micro-batch takes, added up."""
        return sum(max(map(self._weight, bins)) for bins in micro_batches)

    def _weight(self, indices: list[int]) -> int:
        return sum(map(self._weights.__getitem__, indices))

    def _cut(self, bins: Bins) -> MicroBatches:
        size = self._world_size
        return [bins[start : start + size] for start in range(0, len(bins), size)]

    def _by_weight(self, bins: Bins) -> Bins:
        return sorted(bins, key=lambda one: (-self._weight(one), one))

    def _levels(self, count: int) -> list[int]:
        """Return the level of each bin: its micro-batch's longest sample that no plan can avoid, or more.

        The m-th longest run of `world_size` samples has to be somewhere; what is left over fills the
        lower micro-batches up to one level.
        """
        size = self._world_size
        floors = [
            self._weights[self._order[start]] if start < len(self._order) else 0
            for start in range(0, count * size, size)
        ]
        water = -(-sum(self._weights) // size)
        above = common = 0
        for first in range(count):  # those before `first` keep their own
            common = -(-(water - above) // (count - first))
            if common >= floors[first]:
                break
            above += floors[first]
        return [level for floor in floors for level in itertools.repeat(max(floor, common), size)]

    def _spread(self, order: list[int], levels: list[int]) -> Bins | None:
        """Put each sample where most is missing to the level; None if one finds no room.

        A bin without room for a sample is closed for good: the next ones are seldom much shorter.
        """
        lengths, weights, capacity = self._lengths, self._weights, self._capacity
        count, top = len(levels), max(levels)
        placed: Bins = [[] for _ in range(count)]
        tokens = [0] * count
        heap = [(top - level) * count + number for number, level in enumerate(levels)]
        heapq.heapify(heap)
        for index in order:
            length = lengths[index]
            while heap:
                key = heap[0]
                number = key % count
                if tokens[number] + length <= capacity:
                    break
                heapq.heappop(heap)
            else:
                return None
            tokens[number] += length
            placed[number].append(index)
            heapq.heapreplace(heap, key + weights[index] * count)
        return placed

    def _best_fit(self, order: list[int], count: int, capacity: int) -> Bins | None:
        """Put each sample into the fullest bin that has room (best-fit decreasing)."""
        rooms = [(capacity, number) for number in range(count)]  # ascending by room
        placed: Bins = [[] for _ in range(count)]
        for index in order:
            length = self._lengths[index]
            at = bisect_left(rooms, (length, -1))
            if at == len(rooms):
                return None
            room, number = rooms.pop(at)
            placed[number].append(index)
            insort(rooms, (room - length, number))
        return placed

    def _even_out(self, micro_batches: MicroBatches) -> MicroBatches:
        """Spread the samples of each micro-batch over its ranks anew; keep what is better."""
        found = []
        for bins in micro_batches:
            order = sorted(
                itertools.chain.from_iterable(bins), key=lambda one: (-self._weights[one], one)
            )
            ways = [
                bins,
                self._spread(order, [0] * len(bins)),
                self._multifit(order, bins),
                even_by_difference(self._weights, order, len(bins)),
            ]
            fitting = [way for way in ways if way is not None and self._fits(way)]
            best = min(fitting, key=lambda way: max(map(self._weight, way)))
            evened = exchange(self._weights, best)
            found.append(evened if self._fits(evened) else best)
        return found

    def _fits(self, bins: Bins) -> bool:
        return all(sum(map(self._lengths.__getitem__, one)) <= self._capacity for one in bins)

    def _multifit(self, order: list[int], bins: Bins) -> Bins | None:
        """Return the bins for the least capacity found at which best-fit decreasing still fits.

        Coffman, Garey and Johnson, An application of bin-packing to multiprocessor scheduling, 1978.
        """
        if self._weights is not self._lengths:
            return None  # its bins are measured in tokens
        high = max(map(self._weight, bins))
        low = max(
            -(-sum(map(self._weight, bins)) // len(bins)), self._weights[order[0]] if order else 0
        )
        best = None
        while low < high:
            middle = (low + high) // 2
            found = self._best_fit(order, len(bins), middle)
            if found is None:
                low = middle + 1
            else:
                best, high = found, middle
        return best

    def _spread_again(self, micro_batches: MicroBatches) -> MicroBatches | None:
        """Spread by weight alone, cut by load, and even out."""
        count = len(micro_batches)
        bins = self._spread(self._order, [0] * (count * self._world_size))
        return None if bins is None else self._even_out(self._cut(self._by_weight(bins)))

    def _difference_again(self, micro_batches: MicroBatches) -> MicroBatches | None:
        """Even out all bins at once, cut by load, and even out each micro-batch."""
        bins = even_by_difference(self._weights, self._order, len(micro_batches) * self._world_size)
        if bins is None or not self._fits(bins):
            return None
        return self._even_out(self._cut(self._by_weight(bins)))
