"""Training on one CPU rank and on several: the bodies of `tests/gpu_tests/`, and bugs that they find."""

from __future__ import annotations

import pytest

from bodies.multi_device import (
    gradients_are_synchronised,
    losses_are_consistent,
    training_is_that_of_one_process,
)
from bodies.runs import planted
from bodies.single_device import (
    accumulation_is_one_batch,
    loss_falls_at_each_step,
    training_is_gradient_descent,
)
from pytest_ranks.reference import Trainer


class ReportsOwnLoss(Trainer):
    """Each rank reports the mean of its own samples; the update is right."""

    def update(self, batches, tokens):
        own = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
        record = super().update(batches, tokens)
        return record | {"loss": self.own / own}

    def mean_loss(self, cross_entropy, tokens):
        self.own = cross_entropy.item()
        return super().mean_loss(cross_entropy, tokens)


class SyncTurnedOff(Trainer):
    """FSDP2 is told to keep gradients to itself, and never told otherwise."""

    def parallelize(self):
        wrapped = super().parallelize()
        wrapped.set_requires_gradient_sync(False)
        return wrapped

    def check_gradients(self):  # which refuses this: the bodies must find it by themselves
        pass


@pytest.mark.ranks(1)
class TestSingleDeviceTraining:
    def test_training_loop(self, rank):
        training_is_gradient_descent(rank.device)
        training_is_gradient_descent(rank.device, strategy="fsdp2")
        loss_falls_at_each_step(rank.device)

    def test_gradient_accumulation(self, rank):
        accumulation_is_one_batch(rank.device)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("NoBackward", "step 1: norm"),
            ("NeverZeroed", "step 2: norm"),
            ("OneTensorTwice", "step 2: loss"),
            ("NotShifted", "step 1: loss"),
            ("PromptsTrained", "step 1: loss"),
            ("NormsLeftOut", "step 2: loss"),
        ],
    )
    def test_a_bug_of_the_loop_is_found(self, rank, name, said):
        with pytest.raises(AssertionError, match=said):
            training_is_gradient_descent(rank.device, trainer=planted(name))

    def test_climbing_on_the_gradient_is_found(self, rank):
        class Climbs(Trainer):
            def scale(self, cross_entropy, tokens):
                return -super().scale(cross_entropy, tokens)

        with pytest.raises(AssertionError):
            loss_falls_at_each_step(rank.device, trainer=Climbs)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("MeanOfMeans", "2 micro-batches of 4: "),
            ("DividedTwice", "2 micro-batches of 4: "),
            ("TimesAccumulation", "2 micro-batches of 4: "),
            ("OnlyLastMicroBatch", "2 micro-batches of 4: "),
            ("StepsEachMicroBatch", "2 micro-batches of 4: "),
            ("MeanDividedByCount", "1 micro-batches of 8: "),
        ],
    )
    def test_a_bug_of_accumulation_is_found(self, rank, name, said):
        with pytest.raises(AssertionError, match=said):
            accumulation_is_one_batch(rank.device, trainer=planted(name))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
class TestMultiDeviceTraining:
    @pytest.mark.ranks([2, 4])
    def test_training_is_that_of_one_process(self, rank, strategy):
        training_is_that_of_one_process(rank, strategy=strategy)

    @pytest.mark.ranks(2)
    def test_gradient_synchronization(self, rank, strategy):
        gradients_are_synchronised(rank, strategy=strategy)

    @pytest.mark.ranks(2)
    def test_loss_consistency_across_ranks(self, rank, strategy):
        losses_are_consistent(rank, strategy=strategy)


@pytest.mark.ranks(2)
class TestPlantedBugsOnTwoRanks:
    @pytest.mark.parametrize(
        ("body", "trainer", "strategy", "said"),
        [
            (gradients_are_synchronised, planted("NeverReduced"), "ddp", "gradients are .* off"),
            (gradients_are_synchronised, SyncTurnedOff, "fsdp2", "rank .: no gradient for"),
            (gradients_are_synchronised, planted("WorldSizeForgotten"), "fsdp2", "5.0e-01 off"),
            (losses_are_consistent, ReportsOwnLoss, "fsdp2", "rank . reports"),
            (losses_are_consistent, planted("CountOfOwnRank"), "ddp", "rank . reports"),
            (training_is_that_of_one_process, planted("ReplicasBeginDifferent"), "ddp", "loss"),
            (training_is_that_of_one_process, planted("OptimizerBeforeSharding"), "fsdp2", "loss"),
            (training_is_that_of_one_process, planted("NeverReduced"), "ddp", "a loss of"),
        ],
    )
    def test_is_found(self, rank, body, trainer, strategy, said):
        with pytest.raises(AssertionError, match=said):
            body(rank, trainer=trainer, strategy=strategy)
