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

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.level_packing import pack_by_level
from pytest_ranks.reference.packing_bounds import Bounds, lower_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OVERLONG = ("error", "drop", "own")
EMPTY = ("allow", "fill")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How good a plan is.

    Attributes:
        micro_batches: how many there are.
        step_tokens: tokens of the busiest rank of each micro-batch, added up: all ranks wait for it.
        least: what no plan can do better than.
        idle: share of the time, counted in tokens, in which ranks wait for the busiest one.
        fill: share of the room in all micro-batches that holds tokens.
        dropped: tokens of the samples that were left out.
    """

    micro_batches: int
    step_tokens: int
    least: Bounds
    idle: float
    fill: float
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say which samples each rank runs in each micro-batch.

    Attributes:
        micro_batches: for each micro-batch, for each rank, indices into the lengths that were
            packed. A rank may have none; a micro-batch has at least one sample.
        dropped: indices of over-long samples that were left out, as was asked for.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    dropped: tuple[int, ...] = ()

    def for_rank(self, rank: int) -> list[tuple[int, ...]]:
        """Return one rank's index lists, one for each micro-batch."""
        return [ranks[rank] for ranks in self.micro_batches]

    def loads(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the tokens of each rank in each micro-batch."""
        return [
            [sum(int(lengths[index]) for index in indices) for indices in ranks]
            for ranks in self.micro_batches
        ]

    def report(self, lengths: Sequence[int], capacity: int) -> Report:
        """Return how good this plan is for the lengths it was made from.

        Args:
            lengths: tokens of each sample.
            capacity: tokens that a rank may take in one micro-batch.
        """
        loads = self.loads(lengths)
        world_size = len(loads[0]) if loads else 1
        busiest = sum(map(max, loads))
        packed = sum(map(sum, loads))
        dropped = set(self.dropped)
        kept = [
            min(int(length), capacity)
            for index, length in enumerate(lengths)
            if index not in dropped
        ]
        return Report(
            micro_batches=len(loads),
            step_tokens=busiest,
            least=lower_bounds(kept, capacity, world_size),
            idle=1 - packed / (busiest * world_size) if busiest else 0.0,
            fill=packed / (len(loads) * world_size * capacity) if loads else 0.0,
            dropped=sum(int(lengths[index]) for index in self.dropped),
        )


class Packer(Protocol):
    """A function that packs: pure, deterministic, the same answer on every rank."""

    def __call__(self, lengths: Sequence[int], capacity: int, world_size: int) -> Plan:
        """Place every sample once, at most `capacity` tokens a rank and micro-batch."""
        ...


def sample_number(index: int) -> str:
    """Return what messages call a sample that has no better name."""
    return f"sample {index}"


def checked_lengths(
    lengths: Sequence[int], capacity: int | None, *, name: Callable[[int], str] = sample_number
) -> list[int]:
    """Return the lengths as Python integers.

    Args:
        lengths: tokens of each sample.
        capacity: tokens that a rank may take in one micro-batch, None where any length will do.
        name: gives what messages call the sample of an index.

    Raises:
        BadInputError: a length is no whole number, is negative, or is more than the capacity.
    """
    checked = []
    # an array or a tensor gives all its numbers at once a hundred times faster than one by one
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    for index, length in enumerate(values):
        try:
            tokens = operator.index(length)
        except TypeError:
            tokens = -1
        if tokens < 0 or isinstance(length, bool):
            raise BadInputError(
                f"{name(index)} has length {length!r}; lengths are whole numbers of at least 0."
            )
        if capacity is not None and tokens > capacity:
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


def pack_level(
    lengths: Sequence[int],
    capacity: int,
    world_size: int,
    *,
    cost: Callable[[int], int] | None = None,
) -> Plan:
    """Spread the samples over all bins at once, each micro-batch up to a level of its own.

    The fewest micro-batches and the least waiting of all packers here; meets the lower bounds on ordinary
    lengths (`benchmarks/packing.py`).

    Args:
        lengths: tokens of each sample.
        capacity: tokens that a rank may take in one micro-batch.
        world_size: number of ranks.
        cost: what ranks are balanced by, tokens where None; see `attention_cost`.
    """
    checked = checked_lengths(lengths, capacity)
    micro_batches = pack_by_level(checked, capacity, world_size, cost=cost)
    found = _plan([bins for bins in micro_batches if any(bins)])
    if sum(checked) > (len(found.micro_batches) - 1) * capacity * world_size:
        return found  # fewer could not hold all tokens
    in_turn = pack_greedy(checked, capacity, world_size)
    return min(found, in_turn, key=lambda plan: len(plan.micro_batches))


def attention_cost(hidden_size: int) -> Callable[[int], int]:
    """Return the time of a sample in a transformer, in tokens' worth of its linear layers.

    A token costs about 24 h^2 operations in the linear layers and 4 h l in attention to l others, so that a
    sample of l tokens takes l + l^2 / (6 h); packed samples do not attend to each other.

    Args:
        hidden_size: h, the width of the model.
    """
    scale = 6 * hidden_size
    return lambda length: length + length * length // scale


def pack(
    lengths: Sequence[int],
    capacity: int,
    world_size: int,
    *,
    packer: str = "level",
    cost: Callable[[int], int] | None = None,
    overlong: str = "error",
    empty: str = "allow",
) -> Plan:
    """Pack samples, with a policy for those that fit nowhere and for ranks that get none.

    Args:
        lengths: tokens of each sample: a list, an array or a tensor of integers.
        capacity: tokens that a rank may take in one micro-batch.
        world_size: number of ranks.
        packer: "level", "lpt" or "greedy".
        cost: what "level" balances ranks by; tokens where None.
        overlong: a sample longer than the capacity is an "error", "drop"ped and named in the plan, or
            gets its "own" rank in a micro-batch.
        empty: "allow" ranks without a sample, or "fill" them from ranks that have several.

    Raises:
        BadInputError: an argument cannot be used, or a sample is too long.
    """
    for name, value, allowed in (
        ("packer", packer, tuple(PACKERS)),
        ("overlong", overlong, OVERLONG),
        ("empty", empty, EMPTY),
    ):
        if value not in allowed:
            raise BadInputError(
                f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}."
                f"{did_you_mean(str(value), allowed)}"
            )
    for name, number in (("capacity", capacity), ("world_size", world_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise BadInputError(f"{name}={number!r}: expected a whole number of at least 1.")
    if cost is not None and packer != "level":
        raise BadInputError(f"cost= is for packer='level'; {packer!r} balances tokens.")
    checked = checked_lengths(lengths, capacity if overlong == "error" else None)
    chosen = [
        index for index, length in enumerate(checked) if length <= capacity or overlong == "own"
    ]
    fitting = [min(checked[index], capacity) for index in chosen]
    if packer == "level":
        found = pack_level(fitting, capacity, world_size, cost=cost)
    else:
        found = PACKERS[packer](fitting, capacity, world_size)
    micro_batches = [
        [[chosen[index] for index in indices] for indices in ranks] for ranks in found.micro_batches
    ]
    if empty == "fill":
        for ranks in micro_batches:
            _fill_empty(ranks, checked)
    dropped = tuple(sorted(set(range(len(checked))) - set(chosen)))
    return Plan(micro_batches=_plan(micro_batches).micro_batches, dropped=dropped)


def _fill_empty(ranks: list[list[int]], lengths: list[int]) -> None:
    """Give ranks without a sample one of a rank that has several, the shortest of them."""
    for rank, indices in enumerate(ranks):
        if indices:
            continue
        giver = max(range(len(ranks)), key=lambda one: (len(ranks[one]), -one))
        if len(ranks[giver]) < 2:
            return
        shortest = min(ranks[giver], key=lambda index: (lengths[index], index))
        ranks[giver].remove(shortest)
        ranks[rank].append(shortest)


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


PACKERS: dict[str, Packer] = {"level": pack_level, "lpt": pack_lpt, "greedy": pack_greedy}
"""The packers that `TrainConfig.packer` names."""
