"""Training on one GPU: the bodies that `tests/test_training_on_ranks.py` runs on a CPU rank.

Liger's kernels run on the CPU in Triton's interpreter: `tests/reference/test_reference_liger.py`.
Each test has a process of its own, so that a CUDA context never is in the one that forks ranks.
"""

from __future__ import annotations

import pytest

from bodies.liger import assert_liger_losses_agree, compare_liger_losses
from bodies.runs import make_model, uneven_samples
from bodies.single_device import (
    accumulation_is_one_batch,
    loss_falls_at_each_step,
    training_is_gradient_descent,
)


@pytest.mark.gpu
@pytest.mark.ranks(1, backend="nccl")
class TestSingleGPUTraining:
    def test_single_gpu_training_loop(self, rank):
        training_is_gradient_descent(rank.device)
        loss_falls_at_each_step(rank.device)

    def test_training_loop_sharded(self, rank):
        training_is_gradient_descent(rank.device, strategy="fsdp2")

    def test_gradient_accumulation(self, rank):
        accumulation_is_one_batch(rank.device)

    @pytest.mark.requires("liger_kernel")
    def test_loss_with_liger_kernels(self, rank):
        found = compare_liger_losses(make_model(), uneven_samples(), device=str(rank.device))
        assert_liger_losses_agree(found)
        assert found["update_error"] < 1e-2
