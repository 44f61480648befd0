"""The packer that meets the bounds, the bounds themselves, and the policies around any packer."""

from __future__ import annotations

import functools
import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.packing import attention_cost, pack, pack_level, pack_lpt
from pytest_ranks.reference.packing_bounds import lower_bounds

CAPACITY = 100
few = st.lists(st.integers(0, CAPACITY), max_size=8)  # of which level tries all plans
many = st.lists(st.integers(0, CAPACITY), max_size=60)
ranks = st.integers(1, 9)


def fewest_bins(lengths, capacity):
    """Return the true minimum, by trying everything."""
    best = len(lengths)
    ordered = sorted(lengths, reverse=True)

    def place(at, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if at == len(ordered):
            best = len(rooms)
            return
        for number in {room: number for number, room in enumerate(rooms)}.values():
            if rooms[number] >= ordered[at]:
                rooms[number] -= ordered[at]
                place(at + 1, rooms)
                rooms[number] += ordered[at]
        place(at + 1, [*rooms, capacity - ordered[at]])

    place(0, [])
    return best


def step_tokens(plan, lengths):
    return sum(map(max, plan.loads(lengths)))


@given(lengths=few, world_size=ranks)
def test_level_needs_as_few_micro_batches_as_any_plan(lengths, world_size):
    least = -(-fewest_bins(lengths, CAPACITY) // world_size)
    assert len(pack_level(lengths, CAPACITY, world_size).micro_batches) == least


@given(lengths=many, world_size=ranks)
def test_no_plan_is_below_the_bounds(lengths, world_size):
    least = lower_bounds(lengths, CAPACITY, world_size)
    for packer in (pack_level, pack_lpt):
        plan = packer(lengths, CAPACITY, world_size)
        assert len(plan.micro_batches) >= least.micro_batches
        assert step_tokens(plan, lengths) >= least.step_tokens


@given(lengths=few, world_size=ranks)
def test_the_bound_on_micro_batches_is_no_more_than_the_truth(lengths, world_size):
    truth = -(-fewest_bins(lengths, CAPACITY) // world_size)
    assert lower_bounds(lengths, CAPACITY, world_size).micro_batches <= truth


@given(lengths=many, world_size=ranks)
def test_level_needs_no_more_micro_batches_than_lpt(lengths, world_size):
    level = pack_level(lengths, CAPACITY, world_size)
    assert len(level.micro_batches) <= len(pack_lpt(lengths, CAPACITY, world_size).micro_batches)


@pytest.mark.parametrize(
    ("lengths", "capacity", "least"),
    [
        ([51] * 8 + [49] * 8, 100, 8),  # pairs
        ([3000] * 87, 131072, 3),  # 43 fill one: only the dual functions see that
        ([60] * 9, 100, 9),  # none shares
        ([34] * 9, 100, 5),  # two of three
        ([70, 30, 70, 30], 100, 2),
        ([0, 0, 0], 100, 1),
    ],
)
def test_bounds_that_a_sum_does_not_find(lengths, capacity, least):
    assert lower_bounds(lengths, capacity, 1).micro_batches == least


@pytest.mark.parametrize(
    ("lengths", "world_size", "least"),
    [
        ([10, 10, 10, 10], 2, 20),  # the mean
        ([90, 1, 1], 3, 90),  # the longest
        ([50, 50, 50], 2, 100),  # one rank runs two of three
        ([90, 80, 70, 60], 2, 160),  # two passes: 90 in one, 70 in the other
    ],
)
def test_what_ranks_wait_for_at_least(lengths, world_size, least):
    assert lower_bounds(lengths, 100, world_size).step_tokens == least


@pytest.mark.parametrize("world_size", [1, 8, 64])
@pytest.mark.parametrize("capacity", [8192, 32768])
def test_level_is_within_a_fiftieth_of_the_bounds_on_ordinary_lengths(world_size, capacity):
    generator = numpy.random.default_rng(world_size)
    lengths = numpy.clip(generator.lognormal(numpy.log(600) - 0.5, 1, 1024), 1, 8192).astype(int)
    report = pack_level(lengths, capacity, world_size).report(lengths, capacity)
    assert report.micro_batches == report.least.micro_batches
    assert report.step_tokens <= 1.02 * report.least.step_tokens
    assert report.idle <= 0.02


def test_level_balances_by_cost():
    lengths = [*[500] * 4, *[50] * 40]
    cost = attention_cost(hidden_size=64)
    assert cost(384) == 384 + 384

    def slowest(plan):
        return max(sum(cost(lengths[i]) for i in one) for one in plan.micro_batches[0])

    # a rank with two of the long ones is slower than its tokens say
    by_tokens = pack(lengths, 4000, 3)
    by_cost = pack(lengths, 4000, 3, cost=cost)
    assert slowest(by_cost) < slowest(by_tokens)


@pytest.mark.parametrize("kind", [tuple, numpy.array, torch.tensor])
@pytest.mark.parametrize("packer", ["level", "lpt", "greedy"])
def test_any_integers_give_the_same_plan(kind, packer):
    lengths = [random.Random(n).randrange(100) for n in range(50)]
    plan = pack(kind(lengths), CAPACITY, 3, packer=packer)
    assert plan == pack(lengths, CAPACITY, 3, packer=packer)
    assert all(type(i) is int for ranks_ in plan.micro_batches for one in ranks_ for i in one)


def test_an_overlong_sample_is_an_error_unless_asked_otherwise():
    with pytest.raises(BadInputError, match="sample 1 has 101 tokens, more than the 100"):
        pack([50, 101], CAPACITY, 2)


@pytest.mark.parametrize("packer", ["level", "lpt", "greedy"])
def test_overlong_samples_are_dropped_and_named(packer):
    lengths = [150, 50, 30, 101]
    plan = pack(lengths, CAPACITY, 2, packer=packer, overlong="drop")
    assert plan.dropped == (0, 3)
    assert sorted(i for ranks_ in plan.micro_batches for one in ranks_ for i in one) == [1, 2]
    assert plan.report(lengths, CAPACITY).dropped == 251


@pytest.mark.parametrize("overlong", ["error", "drop", "own"])
@pytest.mark.parametrize("bad", [-1, 2.0, "3", None])
def test_lengths_that_are_no_counts_are_refused_whatever_the_policy(overlong, bad):
    with pytest.raises(BadInputError, match="sample 1 has length"):
        pack([200, bad], CAPACITY, 2, overlong="own" if overlong == "error" else overlong)


@pytest.mark.parametrize("packer", ["level", "lpt", "greedy"])
def test_overlong_samples_get_a_rank_of_their_own(packer):
    lengths = [150, 50, 30, 101, 20]
    plan = pack(lengths, CAPACITY, 2, packer=packer, overlong="own")
    found = [one for ranks_ in plan.micro_batches for one in ranks_]
    assert (0,) in found
    assert (3,) in found
    assert sorted(i for one in found for i in one) == [0, 1, 2, 3, 4]
    assert plan.dropped == ()


def test_empty_ranks_are_filled_from_those_that_have_several():
    lengths = [60, 10, 10]
    assert sorted(map(len, pack(lengths, CAPACITY, 3, packer="greedy").micro_batches[0])) == [
        1,
        1,
        1,
    ]
    alone = functools.partial(pack, [100, 0, 0], CAPACITY, 3)
    assert sorted(map(len, alone().micro_batches[0])) != [1, 1, 1]
    assert sorted(map(len, alone(empty="fill").micro_batches[0])) == [1, 1, 1]
    short = pack([10], CAPACITY, 3, empty="fill")
    assert sorted(map(len, short.micro_batches[0])) == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"packer": "ltp"}, "packer='ltp': expected one of 'level', 'lpt', 'greedy'. Did you mean"),
        ({"overlong": "truncate"}, "overlong='truncate': expected one of 'error', 'drop', 'own'."),
        ({"empty": "no"}, "empty='no': expected one of 'allow', 'fill'."),
        ({"capacity": 0}, "capacity=0: expected a whole number of at least 1."),
        ({"world_size": 2.0}, "world_size=2.0: expected a whole number of at least 1."),
        ({"packer": "lpt", "cost": int}, "cost= is for packer='level'; 'lpt' balances tokens."),
    ],
)
def test_what_cannot_be_used_is_said(arguments, text):
    with pytest.raises(BadInputError) as caught:
        pack([1, 2], **{"capacity": 10, "world_size": 2, **arguments})
    assert text in str(caught.value)
