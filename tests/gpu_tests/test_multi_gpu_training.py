"""Training on two GPUs: the bodies that `tests/test_training_on_ranks.py` runs on CPU ranks."""

from __future__ import annotations

import pytest

from bodies.multi_device import (
    gradients_are_synchronised,
    losses_are_consistent,
    training_is_that_of_one_process,
)
from bodies.runs import planted


@pytest.mark.multi_gpu(2)
@pytest.mark.ranks(2, backend="nccl")
class TestMultiGPUTraining:
    @pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
    def test_two_gpu_training(self, rank, strategy):
        training_is_that_of_one_process(rank, strategy=strategy)

    @pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
    def test_gradient_synchronization(self, rank, strategy):
        gradients_are_synchronised(rank, strategy=strategy)

    @pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
    def test_loss_consistency_across_ranks(self, rank, strategy):
        losses_are_consistent(rank, strategy=strategy)

    def test_missing_synchronisation_is_found(self, rank):
        with pytest.raises(AssertionError, match="off the global batch's"):
            gradients_are_synchronised(rank, trainer=planted("NeverReduced"), strategy="ddp")
