"""Overfitting on CPU ranks: the bodies of `tests/gpu_tests/test_overfitting.py`, and bugs that they find."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from bodies import overfitting
from bodies.overfitting import (
    losses_agree,
    overfits_one_sample,
    pipeline_overfits,
    scales_with_the_world,
)
from bodies.runs import planted


class TestSingleSampleOverfitting:
    @pytest.mark.ranks(1)
    def test_single_sample_overfitting_loss_decreases(self, rank):
        overfits_one_sample(rank.device)

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_loss_decreases_on_two_ranks(self, rank, strategy):
        overfits_one_sample(rank.device, world_size=2, strategy=strategy)

    @pytest.mark.ranks(1)
    def test_loss_decreases_in_bf16(self, rank):
        overfits_one_sample(rank.device, precision="bf16")

    @pytest.mark.ranks(1)
    def test_compare_loss_computation_methods(self, rank):
        losses_agree(rank.device)

    @pytest.mark.ranks([1, 2, 4])
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_loss_scaling_with_world_size(self, rank, strategy):
        scales_with_the_world(rank, strategy=strategy)


class TestBatchOverfitting:
    @pytest.mark.ranks(1)
    def test_training_pipeline_with_small_batch(self, rank, tmp_path):
        pipeline_overfits(rank.device, tmp_path)

    @pytest.mark.ranks(2)
    def test_pipeline_on_two_ranks(self, rank, tmp_path):
        pipeline_overfits(rank.device, tmp_path, strategy="fsdp2")


class TestPlantedBugs:
    @pytest.mark.ranks(1)
    @pytest.mark.parametrize(
        ("name", "settings", "said"),
        [
            (None, {"lr": 0.0}, "the loss went from 6.167 to 6.167"),
            ("ScheduleEndsEarly", {}, "the loss went from"),
            ("NoBackward", {}, "the loss went from"),
            ("ShiftedTwiceInLoss", {}, "but the saved weights have"),
        ],
    )
    def test_one_sample_is_not_learnt(self, rank, name, settings, said):
        bug = {"trainer": planted(name)} if name else {}
        with pytest.raises(AssertionError, match=said):
            overfits_one_sample(rank.device, **(settings | bug))

    @pytest.mark.ranks(1)
    @pytest.mark.parametrize("name", ["CountsPadding", "CountsPrompts", "MeanOverSequences"])
    def test_another_loss_is_reported(self, rank, name):
        with pytest.raises(AssertionError, match="trainer: the loss is"):
            losses_agree(rank.device, trainer=planted(name))

    @pytest.mark.ranks(1)
    def test_a_patch_leaks(self, rank, monkeypatch):
        undone = overfitting.losses_without_reduction
        original = overfitting.loss_utils.fixed_cross_entropy

        @contextmanager
        def leaks():
            with undone():
                patched = overfitting.loss_utils.fixed_cross_entropy
                yield
            monkeypatch.setattr(overfitting.loss_utils, "fixed_cross_entropy", patched)

        monkeypatch.setattr(overfitting, "losses_without_reduction", leaks)
        with pytest.raises(AssertionError, match="the patch is still there"):
            losses_agree(rank.device)
        monkeypatch.undo()
        assert overfitting.loss_utils.fixed_cross_entropy is original

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("WorldSizeForgotten", "2 ranks: the first gradient is 5.0e-01 off"),
            ("WorldSizeTwice", "2 ranks: the first gradient is 1.0e.00 off"),
            ("CountOfOwnRank", "2 ranks: .*, 1 process: "),
        ],
    )
    def test_the_world_size_shows(self, rank, name, said, strategy):
        one_step = {"max_steps": 1} if "gradient" in said else {}
        with pytest.raises(AssertionError, match=said):
            scales_with_the_world(rank, trainer=planted(name), strategy=strategy, **one_step)

    @pytest.mark.ranks(1)
    def test_one_sample_of_the_batch_is_left_out(self, rank, tmp_path):
        rows = {"max_tokens_per_rank": None, "micro_batch": 6, "shuffle": False}
        pipeline_overfits(rank.device, tmp_path, **rows)
        with pytest.raises(AssertionError, match=r"'A short one\.' was not learnt"):
            pipeline_overfits(rank.device, tmp_path, trainer=planted("FirstRowOnly"), **rows)
