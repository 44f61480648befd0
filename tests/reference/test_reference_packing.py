from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.packing import PACKERS, deal, pack_greedy, pack_lpt

CAPACITY = 100
lengths_of_samples = st.lists(st.integers(0, CAPACITY), max_size=60)
ranks = st.integers(1, 9)
packers = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)


def loads(plan, lengths):
    return [[sum(lengths[i] for i in indices) for indices in ranks] for ranks in plan.micro_batches]


@packers
@given(lengths=lengths_of_samples, world_size=ranks)
def test_every_sample_is_placed_once_within_capacity_and_no_pass_is_idle(pack, lengths, world_size):
    plan = pack(lengths, CAPACITY, world_size)
    placed = [i for ranks in plan.micro_batches for indices in ranks for i in indices]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(len(ranks) == world_size for ranks in plan.micro_batches)
    assert all(any(ranks) for ranks in plan.micro_batches)
    assert all(load <= CAPACITY for ranks in loads(plan, lengths) for load in ranks)
    assert pack(tuple(lengths), CAPACITY, world_size) == plan


@packers
@given(lengths=lengths_of_samples, world_size=ranks)
def test_the_number_of_micro_batches_is_between_simple_bounds(pack, lengths, world_size):
    count = len(pack(lengths, CAPACITY, world_size).micro_batches)
    big = sum(length > CAPACITY / 2 for length in lengths)
    needed = max(math.ceil(sum(lengths) / CAPACITY), big, min(1, len(lengths)))
    assert count >= math.ceil(needed / world_size)
    assert count <= len(lengths)


@given(lengths=lengths_of_samples, world_size=ranks)
def test_lpt_is_within_a_small_factor_of_the_fewest_micro_batches(lengths, world_size):
    count = len(pack_lpt(lengths, CAPACITY, world_size).micro_batches)
    big = sum(length > CAPACITY / 2 for length in lengths)
    needed = max(math.ceil(sum(lengths) / CAPACITY), big)
    # Any two bins of a list-scheduling answer that just failed hold more than one capacity.
    assert count <= max(1, math.ceil(2 * needed / world_size) + 1)


@given(lengths=lengths_of_samples, world_size=ranks)
def test_greedy_keeps_the_order(lengths, world_size):
    plan = pack_greedy(lengths, CAPACITY, world_size)
    firsts = [min(i for indices in ranks for i in indices) for ranks in plan.micro_batches]
    lasts = [max(i for indices in ranks for i in indices) for ranks in plan.micro_batches]
    assert all(last < first for last, first in zip(lasts, firsts[1:], strict=False))
    for ranks_ in plan.micro_batches:
        assert all(list(indices) == sorted(indices) for indices in ranks_)


def test_lpt_mixes_long_with_short():
    """Sorted-prefix packers need 3 passes here."""
    lengths = [51] * 8 + [49] * 8
    assert len(pack_lpt(lengths, 100, 4).micro_batches) == 2


@given(lengths=lengths_of_samples, world_size=ranks, shuffle=st.randoms(use_true_random=False))
def test_lpt_loads_do_not_depend_on_the_order_of_samples(lengths, world_size, shuffle):
    shuffled = list(lengths)
    shuffle.shuffle(shuffled)
    found = loads(pack_lpt(shuffled, CAPACITY, world_size), shuffled)
    assert found == loads(pack_lpt(lengths, CAPACITY, world_size), lengths)


def test_lpt_spreads_loads_evenly():
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    assert loads(pack_lpt(lengths, 100, 2), lengths) == [[18, 18]]


def test_greedy_gives_each_sample_to_the_least_loaded_rank():
    assert pack_greedy([5, 3, 4, 9], 10, 2).micro_batches == (((0,), (1, 2)), ((3,), ()))


@packers
def test_fewer_samples_than_ranks_leave_ranks_empty(pack):
    plan = pack([10, 20], CAPACITY, 4)
    assert sorted(map(len, plan.micro_batches[0])) == [0, 0, 1, 1]
    assert len(plan.for_rank(3)) == 1


@packers
def test_nothing_gives_nothing(pack):
    assert pack([], CAPACITY, 2).micro_batches == ()


@packers
@pytest.mark.parametrize("position", [0, 1, 2])
def test_overlong_sample_is_refused_by_name(pack, position):
    lengths = [50, 30]
    lengths.insert(position, CAPACITY + 1)
    expected = f"sample {position} has 101 tokens, more than the 100 that a packed row may hold"
    with pytest.raises(BadInputError, match=expected):
        pack(lengths, CAPACITY, 2)


@packers
@pytest.mark.parametrize("bad", [-1, 2.0, "3", None, True])
def test_lengths_that_are_no_counts_are_refused(pack, bad):
    with pytest.raises(BadInputError, match="sample 1 has length"):
        pack([3, bad], CAPACITY, 2)


@packers
def test_integer_tensors_pack_like_integers(pack):
    lengths = [50, 51, 7, 30, 30]
    plan = pack(torch.tensor(lengths), CAPACITY, 2)
    assert plan == pack(lengths, CAPACITY, 2)
    assert all(type(i) is int for ranks in plan.micro_batches for ix in ranks for i in ix)


@packers
def test_ties_are_broken_alike_in_another_process(pack):
    lengths = [(i * 7) % 5 + 1 for i in range(200)]
    program = (
        f"from pytest_ranks.reference.packing import {pack.__name__} as pack;"
        f"print(pack({lengths}, 20, 3).micro_batches)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(pack(lengths, 20, 3).micro_batches)


def test_lpt_finds_the_count_of_many_halves_by_bisection():
    """One more than half each: the token bound is half of what is needed."""
    assert len(pack_lpt([51] * 4000, 100, 1).micro_batches) == 4000


@given(rows=st.integers(0, 30), micro_batch=st.integers(1, 4), world_size=ranks)
def test_dealing_gives_every_row_to_one_rank_and_all_ranks_as_many_turns(
    rows, micro_batch, world_size
):
    plan = deal([[row] for row in range(rows)], micro_batch, world_size)
    assert all(len(ranks) == world_size for ranks in plan)
    assert all(len(own) <= micro_batch for ranks in plan for own in ranks)
    assert sorted(r for ranks in plan for own in ranks for (r,) in own) == list(range(rows))
    assert len(plan) == math.ceil(math.ceil(rows / world_size) / micro_batch)
