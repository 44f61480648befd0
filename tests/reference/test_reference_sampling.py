from __future__ import annotations

from itertools import islice

import torch

from pytest_ranks.reference.sampling import EpochSampler, InfiniteSampler, epoch_order


def test_an_epoch_draws_each_index_once_in_its_own_order():
    sampler = EpochSampler(20, seed=7)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert len(sampler) == 20


def test_the_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    one = epoch_order(20, seed=3, epoch=2)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert epoch_order(20, seed=3, epoch=2) == one != epoch_order(20, seed=4, epoch=2)
    torch.set_rng_state(before)
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(5)).tolist()
    assert one == expected


def test_drawing_an_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch_order(20, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffle_the_order_is_the_files():
    assert list(EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


def test_infinite_sampler_strings_epochs_together_and_starts_anywhere():
    three_epochs = [i for epoch in range(3) for i in epoch_order(5, seed=1, epoch=epoch)]
    assert list(islice(InfiniteSampler(5, seed=1), 15)) == three_epochs
    assert list(islice(InfiniteSampler(5, seed=1, start=7), 8)) == three_epochs[7:]
    assert list(InfiniteSampler(0)) == []
