"""Pack samples of uneven length into micro-batches that all ranks run together.

A plan is computed from the lengths alone, without communication, so that every rank finds the same
one; for that it may depend on nothing else, and ties are broken by index.
"""

from __future__ import annotations

import heapq
import math
import operator
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say which samples each rank runs in each micro-batch.

    Attributes:
        micro_batches: for each micro-batch, for each rank, indices into the lengths that were
            packed. A rank may have none; a micro-batch has at least one sample.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    def for_rank(self, rank: int) -> list[tuple[int, ...]]:
        """Return one rank's index lists, one for each micro-batch."""
        return [ranks[rank] for ranks in self.micro_batches]


class Packer(Protocol):
    """A function that packs: pure, deterministic, the same answer on every rank."""

    def __call__(self, lengths: Sequence[int], capacity: int, world_size: int) -> Plan:
        """Place every sample once, at most `capacity` tokens a rank and micro-batch."""
        ...


def sample_number(index: int) -> str:
    """Return what messages call a sample that has no better name."""
    return f"sample {index}"


def checked_lengths(
    lengths: Sequence[int], capacity: int, *, name: Callable[[int], str] = sample_number
) -> list[int]:
    """Return the lengths as Python integers.

    Args:
        lengths: tokens of each sample.
        capacity: tokens that a rank may take in one micro-batch.
        name: gives what messages call the sample of an index.

    Raises:
        BadInputError: a length is no whole number, is negative, or is more than the capacity.
    """
    checked = []
    for index, length in enumerate(lengths):
        try:
            tokens = operator.index(length)
        except TypeError:
            tokens = -1
        if tokens < 0 or isinstance(length, bool):
            raise BadInputError(
                f"{name(index)} has length {length!r}; lengths are whole numbers of at least 0."
            )
        if tokens > capacity:
            raise BadInputError(
                f"{name(index)} has {tokens} tokens, more than the {capacity} that a packed row "
                "may hold; raise the limit, or shorten or leave out the sample."
            )
        checked.append(tokens)
    return checked


def pack_greedy(lengths: Sequence[int], capacity: int, world_size: int) -> Plan:
    """Give each sample, in order, to the rank with the fewest tokens so far.

    When that rank is too full for it, so is every other: the micro-batch is closed. Keeps samples
    in arrival order and costs O(n log ranks), but leaves ranks idle: on ordinary lengths it needs
    about a fifth more micro-batches than `pack_lpt`.
    """
    micro_batches: list[list[list[int]]] = []
    loads: list[tuple[int, int]] = []  # a heap of (tokens, rank)
    for index, length in enumerate(checked_lengths(lengths, capacity)):
        if not loads or loads[0][0] + length > capacity:
            micro_batches.append([[] for _ in range(world_size)])
            loads = [(0, rank) for rank in range(world_size)]
        tokens, rank = loads[0]
        heapq.heapreplace(loads, (tokens + length, rank))
        micro_batches[-1][rank].append(index)
    return _plan(micro_batches)


def pack_lpt(lengths: Sequence[int], capacity: int, world_size: int) -> Plan:
    """Spread the samples, longest first, over all ranks of all micro-batches at once.

    Longest processing time first (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969):
    each sample goes to the emptiest of `micro-batches x world_size` bins. How many micro-batches
    that takes is found by bisection between the fewest that could hold all tokens and the number
    at which every sample has a bin to itself. Bins of like load then run side by side, so that
    ranks wait little for each other.
    """
    checked = checked_lengths(lengths, capacity)
    longest_first = sorted(range(len(checked)), key=lambda index: (-checked[index], index))

    def spread(count: int) -> list[list[int]] | None:
        return _spread(longest_first, checked, capacity, count * world_size)

    fewest = max(1, math.ceil(sum(checked) / (capacity * world_size)))
    enough = max(1, math.ceil(len(checked) / world_size))
    candidates = range(fewest, enough)
    count = fewest + bisect_left(candidates, True, key=lambda count: spread(count) is not None)
    bins = spread(count) or []
    bins.sort(key=lambda indices: (not indices, -sum(checked[i] for i in indices), indices))
    groups = [bins[start : start + world_size] for start in range(0, len(bins), world_size)]
    return _plan([group for group in groups if any(group)])


def _spread(
    order: list[int], lengths: list[int], capacity: int, bins: int
) -> list[list[int]] | None:
    """Place each index in the emptiest bin; None if one does not fit."""
    placed: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, 0, number) for number in range(bins)]  # a heap of (tokens, samples, bin)
    for index in order:
        tokens, samples, number = loads[0]
        if tokens + lengths[index] > capacity:
            return None
        heapq.heapreplace(loads, (tokens + lengths[index], samples + 1, number))
        placed[number].append(index)
    return placed


def _plan(micro_batches: list[list[list[int]]]) -> Plan:
    return Plan(
        micro_batches=tuple(tuple(tuple(indices) for indices in ranks) for ranks in micro_batches)
    )


def deal(
    rows: Sequence[list[int]], micro_batch: int, world_size: int
) -> list[list[list[list[int]]]]:
    """Deal rows out to ranks in turn, and cut each rank's into micro-batches.

    Returns:
        For each micro-batch, for each rank, at most `micro_batch` rows. Each rank has an entry in
        each micro-batch; a short global batch leaves some entries empty.
    """
    own = [rows[rank::world_size] for rank in range(world_size)]
    starts = range(0, len(own[0]), micro_batch)
    return [[list(part[start : start + micro_batch]) for part in own] for start in starts]


PACKERS: dict[str, Packer] = {"greedy": pack_greedy, "lpt": pack_lpt}
"""The packers that `TrainConfig.packer` names."""
