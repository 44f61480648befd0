"""Mixed precision on CPU ranks: the bodies of `tests/gpu_tests/test_mixed_precision.py`, and bugs that they find."""

from __future__ import annotations

import pytest
import torch

from bodies.precision import lost_updates, observe, wrong_precision
from bodies.runs import planted

CPU = torch.device("cpu")
FSDP2 = {"strategy": "fsdp2"}


class TestMixedPrecisionDtypes:
    @pytest.mark.ranks([1, 2, 4])
    def test_fsdp2_mixed_precision_dtypes(self, rank):
        seen = observe(rank.device, micro_batch=8 // rank.world_size, **FSDP2)
        assert wrong_precision(seen, world_size=rank.world_size) == []
        if rank.world_size > 1:
            assert seen.gathered == {"bfloat16"}  # what FSDP2 sends for the forward
            assert seen.reduced == {"float32"}
            # As seen: a sum of values with 8 bits fits into 8 bits in one case of 2 on two ranks, of 4 on four.
            assert max(seen.census) == pytest.approx(1 / rank.world_size, abs=0.1)

    @pytest.mark.ranks(2)
    def test_ddp_under_autocast(self, rank):
        seen = observe(rank.device, micro_batch=4, strategy="ddp")
        assert wrong_precision(seen, world_size=2) == []
        assert seen.reduced == {"float32"}

    def test_accumulation_on_one_device(self):
        seen = observe(CPU, micro_batch=2, gradient_accumulation_steps=4)
        assert wrong_precision(seen, world_size=1, accumulates=True) == []

    def test_computing_in_float32_is_seen(self):
        seen = observe(CPU, micro_batch=8, precision="fp32")
        assert wrong_precision(seen, world_size=1) == [
            "computation MUST be in bfloat16: layers return {'float32'}"
        ]


class TestSmallUpdates:
    @pytest.mark.ranks([1, 2])
    def test_every_entry_moves_by_the_learning_rate(self, rank):
        assert lost_updates(rank.device, micro_batch=8 // rank.world_size, **FSDP2) == []

    @pytest.mark.parametrize("name", ["ParametersInBf16", "WeightsRoundedEachStep"])
    def test_bf16_weights_of_one_do_not_move(self, name):
        found = lost_updates(CPU, trainer=planted(name), micro_batch=8)
        stuck = [text for text in found if "norm.weight" in text]
        assert len(stuck) == 5  # two in each of two blocks, and the last one
        assert all("0.00 of" in text and "64 of 64 not at all" in text for text in stuck)


def rules(found):
    return sorted({text.partition(":")[0] for text in found})


WEIGHTS, GRADIENTS = "master weights MUST be float32", "gradients MUST be float32"
MOMENTS, BUFFERS = "optimizer moments MUST be float32", "buffers MUST be float32"
ROUNDED = "buffers MUST keep their values"
REDUCED = "gradients MUST be reduced over ranks in float32"
COLLECTIVES = "reductions MUST be in float32"


class TestPlantedBugs:
    """Each is caught by its own name; what it does not touch is not blamed."""

    @pytest.mark.ranks([2, 4])
    @pytest.mark.parametrize(
        ("name", "strategy", "caught"),
        [
            ("ReducesInBf16", "fsdp2", [REDUCED, COLLECTIVES]),
            ("ReduceDtypeLeftOut", "fsdp2", [REDUCED, COLLECTIVES]),
            ("CompressedReduction", "ddp", [REDUCED, COLLECTIVES]),
            ("BuffersInBf16", "fsdp2", [BUFFERS, ROUNDED]),
        ],
    )
    def test_on_ranks(self, rank, name, strategy, caught):
        trainer = planted(name)
        seen = observe(
            rank.device, trainer=trainer, micro_batch=8 // rank.world_size, strategy=strategy
        )
        assert rules(wrong_precision(seen, world_size=rank.world_size)) == caught

    @pytest.mark.ranks(2)
    def test_bf16_shards(self, rank):
        seen = observe(rank.device, trainer=planted("ShardsInBf16"), micro_batch=4, **FSDP2)
        found = rules(wrong_precision(seen, world_size=2))
        assert found == sorted([WEIGHTS, GRADIENTS, MOMENTS, REDUCED])

    @pytest.mark.parametrize(
        ("name", "caught"),
        [
            ("ParametersInBf16", [GRADIENTS, WEIGHTS, MOMENTS]),
            ("MomentsInBf16", [MOMENTS]),
            ("BuffersInBf16", [BUFFERS, ROUNDED]),
        ],
    )
    def test_on_one_device(self, name, caught):
        seen = observe(CPU, trainer=planted(name), micro_batch=8)
        assert rules(wrong_precision(seen, world_size=1)) == sorted(caught)

    def test_accumulation_in_bf16(self):
        seen = observe(
            CPU, trainer=planted("AccumulatesInBf16"), micro_batch=2, gradient_accumulation_steps=4
        )
        found = wrong_precision(seen, world_size=1, accumulates=True)
        assert rules(found) == ["gradients MUST be accumulated in float32"]
