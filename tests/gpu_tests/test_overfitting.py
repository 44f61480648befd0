"""Overfitting on GPUs: the bodies that `tests/test_overfitting_on_ranks.py` runs on CPU ranks.

Each test has a process of its own, so that a CUDA context never is in the one that forks ranks.
"""

from __future__ import annotations

import pytest

from bodies.overfitting import (
    losses_agree,
    overfits_one_sample,
    pipeline_overfits,
    scales_with_the_world,
)


@pytest.mark.gpu
@pytest.mark.ranks(1, backend="nccl")
class TestSingleSampleOverfitting:
    def test_single_sample_overfitting_loss_decreases(self, rank):
        overfits_one_sample(rank.device)

    def test_loss_decreases_in_bf16(self, rank):
        overfits_one_sample(rank.device, precision="bf16", strategy="fsdp2")

    def test_compare_loss_computation_methods(self, rank):
        losses_agree(rank.device)

    def test_loss_scaling_with_world_size(self, rank):
        scales_with_the_world(rank)


@pytest.mark.gpu
@pytest.mark.ranks(1, backend="nccl")
class TestBatchOverfitting:
    def test_training_pipeline_with_small_batch(self, rank, tmp_path):
        pipeline_overfits(rank.device, tmp_path)


@pytest.mark.multi_gpu(2)
@pytest.mark.ranks(2, backend="nccl")
class TestOverfittingOnTwoGPUs:
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_loss_scaling_with_world_size(self, rank, strategy):
        scales_with_the_world(rank, strategy=strategy)

    def test_pipeline_with_small_batch(self, rank, tmp_path):
        pipeline_overfits(rank.device, tmp_path, strategy="fsdp2")
