"""Bins filled to the brim, even bins, and every plan of a few samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_ranks.reference import tight_packing
from pytest_ranks.reference.packing import pack, pack_lpt
from pytest_ranks.reference.tight_packing import (
    even_by_difference,
    every_plan,
    exchange,
    fill_to_the_brim,
)

lengths_up_to_50 = st.lists(st.integers(0, 50), max_size=25)


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def loads(bins, lengths):
    return [sum(lengths[index] for index in one) for one in bins]


@given(lengths=lengths_up_to_50, count=st.integers(1, 9))
def test_bins_hold_every_sample_once_and_not_too_much(lengths, count):
    found = fill_to_the_brim(lengths, longest_first(lengths), 50, count)
    if found is None:
        return
    assert len(found) == count
    assert sorted(index for one in found for index in one) == list(range(len(lengths)))
    assert max(loads(found, lengths)) <= 50


def test_a_perfect_packing_is_found_where_longest_first_finds_none():
    lengths = [50, 40, 30, 30, 20, 20, 20, 15, 15, 10]  # five bins of 50, no room left
    assert sum(lengths) == 5 * 50
    found = fill_to_the_brim(lengths, longest_first(lengths), 50, 5)
    assert loads(found, lengths) == [50] * 5
    assert len(pack_lpt(lengths, 50, 1).micro_batches) == 6
    assert len(pack(lengths, 50, 1).micro_batches) == 5


@given(lengths=st.lists(st.integers(0, 20), max_size=10), room=st.integers(0, 40))
def test_the_fullest_set_is_the_fullest_of_all(lengths, room):
    """Beside the first sample, what is chosen fills a bin as no other set does."""
    first = 20
    found = fill_to_the_brim([first, *lengths], longest_first([first, *lengths]), first + room, 99)
    assert found is not None
    sums = {0}
    for length in lengths:
        sums |= {one + length for one in sums}
    assert loads(found, [first, *lengths])[0] == first + max(one for one in sums if one <= room)


def test_what_takes_long_is_left_to_others(monkeypatch):
    assert fill_to_the_brim([1], [0], 64 * tight_packing.MOST_WORDS, 1) is None
    monkeypatch.setattr(tight_packing, "MOST_DIFFERENCES", 5)
    assert even_by_difference([1, 2, 3], [2, 1, 0], 2) is None
    assert even_by_difference([1, 2], [1, 0], 2) is not None


@given(weights=lengths_up_to_50, count=st.integers(1, 9))
def test_even_bins_hold_every_sample_once(weights, count):
    found = even_by_difference(weights, longest_first(weights), count)
    assert len(found) == count
    assert sorted(index for one in found for index in one) == list(range(len(weights)))


def test_differences_find_what_longest_first_does_not():
    """Karmarkar and Karp's own kind of case: 8 7 6 5 4 in two bins is 16 and 14, longest first 17 and 13."""
    weights = [8, 7, 6, 5, 4]
    assert sorted(loads(even_by_difference(weights, [0, 1, 2, 3, 4], 2), weights)) == [14, 16]


@pytest.mark.parametrize("count", range(8))
def test_every_plan_is_every_partition_once(count):
    found = [
        frozenset(frozenset(one) for one in bins)
        for bins in every_plan([1] * count, list(range(count)), 99)
    ]
    assert len(set(found)) == len(found)
    bell = [1, 1, 2, 5, 15, 52, 203, 877]
    assert len(found) == bell[count]


def test_plans_above_the_capacity_are_left_out():
    found = list(every_plan([3, 2, 2], [0, 1, 2], 4))
    assert found == [[[0], [1, 2]], [[0], [1], [2]]]


@given(weights=lengths_up_to_50, count=st.integers(1, 6))
def test_exchanges_lose_nothing_and_lighten_the_heaviest(weights, count):
    bins = [longest_first(weights)[number::count] for number in range(count)]
    found = exchange(weights, bins)
    assert sorted(index for one in found for index in one) == list(range(len(weights)))
    assert max(loads(found, weights)) <= max(loads(bins, weights))


@pytest.mark.parametrize(
    ("bins", "evened"),
    [([[0, 1], []], [9, 8]), ([[0, 3], [1, 2]], [13, 13]), ([[0], [1, 2, 3]], [13, 13])],
    ids=["moved", "exchanged", "moved the other way"],
)
def test_an_exchange_evens_out(bins, evened):
    weights = [9, 8, 5, 4] if len(bins[1]) else [9, 8]
    assert sorted(loads(exchange(weights, bins), weights), reverse=True) == evened
