"""Trainers whose loss falls, or seems to, without the model learning its samples by heart."""

# ruff: noqa: D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pytest_ranks.reference.loss import counted_targets
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.reference.collate import MicroBatch


@plant(
    row="O1",
    issue="https://github.com/huggingface/transformers/pull/24088",
    kills={"overfitting.single_sample[single]": "learning rate"},
)
class ScheduleEndsEarly(Trainer):
    """The schedule is moved on many times a step, and the learning rate is soon zero."""

    def schedule(self) -> None:
        super().schedule()
        if self.steps_taken >= 4:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0


@plant(
    row="overfitting",
    kills={"overfitting.small_batch[single]": "some samples of the batch are not in the loss"},
)
class FirstRowOnly(Trainer):
    """Only the first row of each micro-batch is in the loss and in its count."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().cross_entropy(logits[:1], labels[:1])

    def count(self, batches: list[MicroBatch]) -> int:
        return sum(int(counted_targets(batch.labels[:1])) for batch in batches)


@plant(
    row="overfitting",
    kills={"overfitting.small_batch[single]": "targets are inconsistent"},
)
class LabelsOfNeighbour(Trainer):
    """Rows take turns with each other's labels: each step trains other targets."""

    def collate(self, rows: list[Any]) -> MicroBatch:
        batch = super().collate(rows)
        return dataclasses.replace(batch, labels=batch.labels.roll(self.steps_taken, dims=0))
