"""The reference trainer as a user might have broken it, where no planted bug does."""

from __future__ import annotations

from typing import Any

from pytest_ranks.reference import Trainer
from pytest_ranks.subjects.reference import ReferenceTrainer


class NoLearningRate(Trainer):
    """The learning rate is lost on the way to the optimizer."""

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Any:
        return super().build_optimizer([group | {"lr": 0.0} for group in groups])


class FrozenBlock(Trainer):
    """One block of the model was frozen for an experiment, and stayed so."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        self.model.model.layers[0].mlp.requires_grad_(False)
        return super().parameter_groups()


class NoLearningRateSubject(ReferenceTrainer):
    """Trains with `NoLearningRate`."""

    trainer_class = staticmethod(lambda: NoLearningRate)


class FrozenBlockSubject(ReferenceTrainer):
    """Trains with `FrozenBlock`."""

    trainer_class = staticmethod(lambda: FrozenBlock)
