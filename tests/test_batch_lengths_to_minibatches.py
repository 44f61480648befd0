"""From the lengths of a batch to micro-batches for every rank.

As a test, with pytest: what every packer must do, and how near to the best plan there is. As a script,
it prints how the packers compare:

    python tests/test_batch_lengths_to_minibatches.py [--samples 1024 4096] [--ranks 1 8 64]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.packing import PACKERS, Plan, pack
from pytest_ranks.reference.packing_bounds import lower_bounds
from pytest_ranks.reference.packing_comparison import (
    Refused,
    ahead_of,
    compare,
    ours,
    table,
    why_wrong,
)

CAPACITY = 24
LENGTHS = st.lists(st.integers(0, CAPACITY), max_size=30)
FEW = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=7)
RANKS = st.integers(1, 6)
every_packer = pytest.mark.parametrize("packer", PACKERS)


def minibatches(lengths, capacity, world_size, rank, *, packer="level", **policies):
    """Return one rank's micro-batches, from a plan that this rank makes by itself."""
    return pack(lengths, capacity, world_size, packer=packer, **policies).for_rank(rank)


def best_plan(lengths, capacity, world_size):
    """Return the fewest micro-batches, and the fewest tokens waited for in as many: all are tried."""
    best = None

    def place(at, bins):
        nonlocal best
        if at == len(lengths):
            loads = sorted(bins, reverse=True)
            found = (-(-len(loads) // world_size), sum(loads[::world_size]))
            best = found if best is None else min(best, found)
            return
        for number in range(len(bins)):
            if bins[number] + lengths[at] <= capacity:
                bins[number] += lengths[at]
                place(at + 1, bins)
                bins[number] -= lengths[at]
        place(at + 1, [*bins, lengths[at]])

    place(0, [])
    return best


def reached(plan, lengths):
    loads = plan.loads(lengths)
    return len(loads), sum(map(max, loads))


class TestEveryPacker:
    @every_packer
    @given(lengths=LENGTHS, world_size=RANKS)
    def test_no_sample_is_lost_or_repeated_and_ranks_run_as_often(
        self, packer, lengths, world_size
    ):
        ranks = [
            minibatches(lengths, CAPACITY, world_size, rank, packer=packer)
            for rank in range(world_size)
        ]
        assert len({len(own) for own in ranks}) == 1
        placed = sorted(index for own in ranks for one in own for index in one)
        assert placed == list(range(len(lengths)))

    @every_packer
    @given(lengths=LENGTHS, world_size=RANKS)
    def test_the_token_limit_holds_and_no_micro_batch_is_without_samples(
        self, packer, lengths, world_size
    ):
        plan = pack(lengths, CAPACITY, world_size, packer=packer)
        assert all(load <= CAPACITY for ranks in plan.loads(lengths) for load in ranks)
        assert all(any(indices for indices in ranks) for ranks in plan.micro_batches)

    @every_packer
    @given(lengths=FEW, world_size=RANKS)
    def test_no_bound_is_above_the_best_plan_and_no_plan_below(self, packer, lengths, world_size):
        best = best_plan(lengths, CAPACITY, world_size)
        least = lower_bounds(lengths, CAPACITY, world_size)
        assert least.micro_batches <= best[0]
        found = reached(pack(lengths, CAPACITY, world_size, packer=packer), lengths)
        assert found >= best
        assert found[1] >= least.step_tokens
        assert best[1] >= least.step_tokens

    @every_packer
    def test_an_empty_batch_has_no_micro_batch(self, packer):
        assert [minibatches([], CAPACITY, 3, rank, packer=packer) for rank in range(3)] == [[]] * 3

    @every_packer
    def test_a_single_sequence_leaves_the_other_ranks_an_empty_micro_batch(self, packer):
        found = [minibatches([5], CAPACITY, 3, rank, packer=packer) for rank in range(3)]
        assert sorted(found) == [[()], [()], [(0,)]]

    @every_packer
    def test_uniform_lengths_that_fill_every_rank_leave_no_room(self, packer):
        plan = pack([CAPACITY // 4] * 32, CAPACITY, 4, packer=packer)
        assert plan.loads([CAPACITY // 4] * 32) == [[CAPACITY] * 4] * 2

    @every_packer
    def test_many_tiny_sequences_take_one_micro_batch(self, packer):
        plan = pack([1] * 90, CAPACITY, 4, packer=packer)
        assert sorted(map(len, plan.micro_batches[0])) == [22, 22, 23, 23]

    @every_packer
    def test_sequences_of_no_token_are_placed(self, packer):
        """Greedy packers have lost them: a micro-batch without tokens looks empty."""
        plan = pack([0, 0, 0], CAPACITY, 2, packer=packer)
        assert sorted(index for own in plan.micro_batches[0] for index in own) == [0, 1, 2]

    @every_packer
    @pytest.mark.parametrize("overlong", ["error", "drop", "own"])
    def test_sequences_exceeding_the_limit(self, packer, overlong):
        lengths = [3, CAPACITY + 1, 4, 2 * CAPACITY]
        if overlong == "error":
            with pytest.raises(BadInputError) as caught:
                pack(lengths, CAPACITY, 2, packer=packer)
            assert str(caught.value) == (
                "sample 1 has 25 tokens, more than the 24 that a packed row may hold; raise the "
                "limit, or shorten or leave out the sample."
            )
            return
        plan = pack(lengths, CAPACITY, 2, packer=packer, overlong=overlong)
        kept = sorted(index for ranks in plan.micro_batches for one in ranks for index in one)
        assert (kept, plan.dropped) == (
            ([0, 2], (1, 3)) if overlong == "drop" else ([0, 1, 2, 3], ())
        )
        assert all(
            len(one) == 1
            for ranks in plan.micro_batches
            for one in ranks
            if any(lengths[index] > CAPACITY for index in one)
        )

    @every_packer
    @given(lengths=LENGTHS, world_size=RANKS)
    def test_ranks_are_filled_wherever_one_has_several(self, packer, lengths, world_size):
        plan = pack(lengths, CAPACITY, world_size, packer=packer, empty="fill")
        placed = sorted(index for ranks in plan.micro_batches for one in ranks for index in one)
        assert placed == list(range(len(lengths)))
        assert all(load <= CAPACITY for ranks in plan.loads(lengths) for load in ranks)
        for ranks in plan.micro_batches:
            sizes = sorted(map(len, ranks))
            assert sizes[0] > 0 or sizes[-1] <= 1

    @every_packer
    @given(lengths=LENGTHS, world_size=RANKS)
    def test_lists_arrays_and_tensors_give_the_same_plan(self, packer, lengths, world_size):
        import numpy
        import torch

        plans = [
            pack(given, CAPACITY, world_size, packer=packer)
            for given in (
                lengths,
                tuple(lengths),
                numpy.array(lengths, dtype=numpy.int32),
                [numpy.int64(one) for one in lengths],
                torch.tensor(lengths, dtype=torch.int64),
            )
        ]
        assert plans == [plans[0]] * 5
        for ranks in plans[-1].micro_batches:
            assert all(type(index) is int for one in ranks for index in one)

    @every_packer
    def test_another_hash_seed_gives_the_same_plan(self, packer):
        lengths = [(7 * number) % 13 for number in range(100)]
        program = (
            "from pytest_ranks.reference.packing import pack;"
            f"print(pack({lengths}, 24, 3, packer={packer!r}).micro_batches)"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "12345"}
        printed = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout
        assert printed.strip() == str(pack(lengths, 24, 3, packer=packer).micro_batches)


class TestQuality:
    @given(lengths=FEW, world_size=RANKS)
    def test_of_a_few_samples_level_finds_the_best_plan(self, lengths, world_size):
        """The fewest micro-batches, and of all plans of so many the one that ranks wait for least."""
        found = reached(pack(lengths, CAPACITY, world_size), lengths)
        assert found == best_plan(lengths, CAPACITY, world_size)

    @pytest.mark.parametrize(
        ("lengths", "world_size"),
        [([10, 9, 10, 5, 3, 3, 8], 1), ([12, 8, 10, 4, 6, 4, 4], 1), ([7, 10, 11, 8, 5, 7], 1)],
    )
    def test_also_where_longest_first_does_not(self, lengths, world_size):
        found = reached(pack(lengths, CAPACITY, world_size), lengths)
        assert found == best_plan(lengths, CAPACITY, world_size)
        lpt = reached(pack(lengths, CAPACITY, world_size, packer="lpt"), lengths)
        assert found < lpt

    def test_where_arrival_order_happens_to_be_best_level_takes_it(self):
        lengths = [7, 13, 13, 9, 5, 11, 8, 5]
        for extra in ([], [1, 0]):  # eight samples, and more than all plans are tried of
            counts = {
                name: len(pack([*lengths, *extra], CAPACITY, 3, packer=name).micro_batches)
                for name in ("level", "greedy")
            }
            assert counts == {"level": 1, "greedy": 1}

    @given(lengths=LENGTHS, world_size=RANKS)
    def test_level_is_never_behind_the_others(self, lengths, world_size):
        counts = {
            name: len(pack(lengths, CAPACITY, world_size, packer=name).micro_batches)
            for name in PACKERS
        }
        assert counts["level"] == min(counts.values())

    def test_long_and_short_share_a_micro_batch(self):
        """Packers that go by arrival, or sort and cut, need 3 micro-batches; the best plan has 2."""
        lengths = [13] * 8 + [11] * 8
        assert {
            name: len(pack(lengths, CAPACITY, 4, packer=name).micro_batches) for name in PACKERS
        } == {"level": 2, "lpt": 2, "greedy": 3}

    def test_one_large_among_mixed_scales_does_not_keep_the_others_waiting(self):
        """The first micro-batch is as long as its longest: what fits beside it runs beside it."""
        lengths = [20, 1, 1, 2, 10, 9, 11, 10, 8, 8]
        assert pack(lengths, CAPACITY, 4).loads(lengths) == [[20, 20, 20, 20]]

    def test_a_report_says_how_good_a_plan_is(self):
        lengths = [10, 6, 6]
        report = Plan(micro_batches=(((0,), (1,)), ((2,), ()))).report(lengths, CAPACITY)
        assert (report.micro_batches, report.step_tokens) == (2, 16)
        assert (report.least.micro_batches, report.least.step_tokens) == (1, 12)
        assert report.idle == pytest.approx(1 - 22 / 32)
        assert report.fill == pytest.approx(22 / 96)


class TestOnRanks:
    @pytest.mark.ranks(2)
    @every_packer
    def test_ranks_find_the_same_plan_without_a_word(self, rank, packer):
        import random

        import torch
        import torch.distributed as dist

        from pytest_ranks.observe.spies import watch

        random.seed(rank.index)  # what differs between ranks must not matter
        torch.manual_seed(rank.index)
        lengths = [1 + (11 * number) % 23 for number in range(60)]
        with watch(torch.nn.Linear, rank=rank.index) as seen:
            plan = pack(lengths, CAPACITY, rank.world_size, packer=packer)
        assert seen.collectives == []
        plans = [None] * rank.world_size
        with watch(torch.nn.Linear, rank=rank.index) as seen:
            dist.all_gather_object(plans, plan.micro_batches)
        assert seen.collectives != []  # the spy does see them
        assert plans[0] == plans[1]
        own = plan.for_rank(rank.index)
        other = plan.for_rank(1 - rank.index)
        assert len(own) == len(other)
        assert not {i for one in own for i in one} & {i for one in other for i in one}


class TestComparison:
    def test_our_packers_side_by_side(self):
        cells, wrong = compare(ours(), samples=(64,), ranks=(1, 4, 32), limit=0)
        assert wrong == []
        assert len(cells) == 5 * 2 * 2 * len(PACKERS)  # 64 samples are too few for 32 ranks
        assert all(cell.micro_batches >= 1 and cell.step_tokens >= 1 for cell in cells)
        level = [cell for cell in cells if cell.packer == "ours, level"]
        assert max(one.micro_batches for one in level if one.lengths != "no_slack") == 1
        rows = table(cells)
        assert len(rows) == 2 + 5 * len(PACKERS)
        assert rows[2].startswith("| lognormal | **ours, level** | 1.000 | 1.00 | 1.0")

    def test_a_better_plan_is_told(self):
        def alone(lengths, capacity, ranks):
            return [[[index], *[[]] * (ranks - 1)] for index in range(len(lengths))]

        packers = {"ours, level": alone, "better": ours()["ours, level"]}
        cells, _ = compare(packers, samples=(16,), ranks=(2,), limit=0)
        assert len(ahead_of("ours, level", cells)) == 10
        assert ahead_of("better", cells) == []

    def test_what_is_no_plan_is_told(self):
        def refusing(lengths, capacity, ranks):
            raise Refused("too few")

        packers = {"loses": lambda *_: [[[0]]], "refuses": refusing}
        cells, wrong = compare(packers, samples=(16,), ranks=(1,), limit=0)
        assert cells == []
        assert wrong == [
            "loses: 10 times, such as 15 samples lost",
            "refuses: 10 times, such as refused: too few",
        ]
        assert why_wrong([[[0, 1], [1]]], [5, 5], 10) == "1 samples placed twice"
        assert why_wrong([[[0, 1]]], [5, 6], 10) == "a row of 11 tokens in 10"
        assert why_wrong([[[0], []], [[1]]], [5, 5], 10) == (
            "not every rank has a part in each micro-batch"
        )
        assert why_wrong([[[0], [1]]], [5, 5], 10) == ""

    def test_as_a_script_it_prints_the_comparison(self):
        options = ["--samples", "32", "--ranks", "1", "4", "--limit", "0"]
        printed = subprocess.run(
            [sys.executable, __file__, *options], capture_output=True, text=True, check=True
        ).stdout
        assert printed.startswith("| lengths | packer | micro-batches / least | most |")
        for name in PACKERS:
            assert printed.count(f"| **ours, {name}** |") == 5
        assert "Cases in which another packer is ahead of ours, level: " in printed


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the packers.")
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--limit", type=float, default=0.5, help="seconds of a packer on a case")
    chosen = parser.parse_args()
    cells, wrong = compare(ours(), samples=chosen.samples, ranks=chosen.ranks, limit=chosen.limit)
    ahead = ahead_of("ours, level", cells)
    lines = [*table(cells), "", *(f"No valid plan: {one}." for one in wrong)]
    lines += [f"Cases in which another packer is ahead of ours, level: {len(ahead)}.", *ahead]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
