"""When a run ends, evaluates and saves: decided from counts alone, so that every rank decides alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from pytest_ranks.reference.config import TrainConfig

ENDS = ("max_steps", "epochs", "max_tokens", "until_stopped")
"""The fields that say when training ends."""

SAVING = (
    *("checkpoint_every", "checkpoint_every_samples", "checkpoint_each_epoch"),
    *("checkpoint_best", "keep_checkpoints", "async_checkpoints"),
)
"""The fields that mean nothing without a folder."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come; saved with each checkpoint.

    Attributes:
        step: optimizer steps taken, those that were skipped for lack of targets included.
        epoch: passes over the samples that are complete.
        cursor: samples of this epoch that are already trained.
        tokens: trained tokens of the whole run, over all ranks.
        samples: samples of the whole run, over all ranks.
        best_loss: the lowest evaluation loss so far; None before the first evaluation.
        best_step: the step that it was found after.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    tokens: int = 0
    samples: int = 0
    best_loss: float | None = None
    best_step: int | None = None

    def is_best(self, loss: float) -> bool:
        """Keep an evaluation's loss if it is the lowest so far; say whether it is."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step = loss, self.step
            return True
        return False


class Counter:
    """An attribute of the trainer that is a field of its `progress`."""

    def __init__(self, field: str, meaning: str) -> None:
        self._field = field
        self.__doc__ = meaning

    def __get__(self, owner: Any, kind: Any = None) -> int:
        return getattr(owner.progress, self._field)  # type: ignore[no-any-return]

    def __set__(self, owner: Any, value: int) -> None:
        setattr(owner.progress, self._field, value)


def is_finished(config: TrainConfig, progress: Progress) -> bool:
    """Whether a run has come to the end that its configuration names."""
    if config.max_steps is not None:
        return progress.step >= config.max_steps
    if config.max_tokens is not None:
        return progress.tokens >= config.max_tokens
    if config.until_stopped:
        return False
    assert config.epochs is not None
    return progress.epoch >= config.epochs


def is_saving_due(
    config: TrainConfig, progress: Progress, *, trained: int, last_of_epoch: bool, best: bool
) -> bool:
    """Whether to save a checkpoint after a step; several reasons make one checkpoint.

    Args:
        config: what was asked for.
        progress: after the step.
        trained: samples that the step trained.
        last_of_epoch: whether an epoch ended with it.
        best: whether the evaluation after it was the best so far.
    """
    every, samples = config.checkpoint_every, config.checkpoint_every_samples
    before = progress.samples - trained
    return (
        (every is not None and progress.step % every == 0)
        or (samples is not None and progress.samples // samples > before // samples)
        or (config.checkpoint_each_epoch and last_of_epoch)
        or (config.checkpoint_best and best)
    )


def check_loop(config: TrainConfig) -> None:
    """Refuse what cannot be: no end or several, a schedule towards an end that nobody knows.

    Raises:
        BadInputError: fields contradict each other, or one has a value outside its range.
    """
    given = [name for name in ENDS if getattr(config, name) not in (None, False)]
    if len(given) != 1:
        shown = [f"{name}={getattr(config, name)!r}" for name in given or ENDS[:2]]
        further = "" if given else " (or of max_tokens and until_stopped)"
        raise BadInputError(
            f"found {' and '.join(shown)}; give exactly one of them{further}, "
            "it says when training ends."
        )
    if config.until_stopped and config.schedule != "constant":
        raise BadInputError(
            f"schedule={config.schedule!r} ends at the last step, and until_stopped=True has none; "
            "use schedule='constant', or give max_steps, epochs or max_tokens."
        )
    share: Any = config.validation_split
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise BadInputError(f"validation_split={share!r} is not a share of at least 0 and below 1.")
    for name in SAVING:
        found = getattr(config, name)
        if found not in (None, False) and config.out_dir is None:
            raise BadInputError(
                f"{name}={found!r} needs out_dir, the folder that checkpoints go to."
            )
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and config.out_dir is None:
            raise BadInputError(f"{name}=True needs out_dir, the folder that its files go to.")
