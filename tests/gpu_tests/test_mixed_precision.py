"""Mixed precision on GPUs: the bodies that `tests/test_mixed_precision_on_ranks.py` runs on CPU ranks.

Each test has a process of its own, so that a CUDA context never is in the one that forks ranks.
"""

from __future__ import annotations

import pytest

from bodies.precision import lost_updates, observe, wrong_precision
from bodies.runs import planted

FSDP2 = {"strategy": "fsdp2"}


@pytest.mark.gpu
@pytest.mark.ranks(1, backend="nccl")
class TestMixedPrecisionDtypes:
    def test_fsdp2_mixed_precision_dtypes(self, rank):
        seen = observe(rank.device, micro_batch=8, **FSDP2)
        assert wrong_precision(seen, world_size=1) == []

    def test_accumulation_is_in_float32(self, rank):
        seen = observe(rank.device, micro_batch=2, gradient_accumulation_steps=4)
        assert wrong_precision(seen, world_size=1, accumulates=True) == []

    def test_small_updates_survive(self, rank):
        assert lost_updates(rank.device, micro_batch=8, **FSDP2) == []

    def test_bf16_weights_are_caught(self, rank):
        seen = observe(rank.device, trainer=planted("ParametersInBf16"), micro_batch=8)
        found = wrong_precision(seen, world_size=1)
        assert any(text.startswith("master weights MUST be float32") for text in found)


@pytest.mark.multi_gpu(2)
@pytest.mark.ranks(2, backend="nccl")
class TestReductionsOnTwoGPUs:
    @pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
    def test_gradients_are_reduced_in_float32(self, rank, strategy):
        seen = observe(rank.device, micro_batch=4, strategy=strategy)
        assert wrong_precision(seen, world_size=2) == []
        assert seen.reduced == {"float32"}

    def test_a_reduction_in_bf16_is_caught(self, rank):
        seen = observe(rank.device, trainer=planted("ReducesInBf16"), micro_batch=4, **FSDP2)
        found = wrong_precision(seen, world_size=2)
        assert [text.partition(":")[0] for text in found] == [
            "reductions MUST be in float32",
            "gradients MUST be reduced over ranks in float32",
        ]
