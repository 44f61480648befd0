"""The loss on samples that are not trained: exact, and without a trace in the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import holdout, loss, parallel
from pytest_ranks.reference.preparation import PreparationSteps
from pytest_ranks.reference.updates import UpdateSteps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.reference.data import Samples

    Record = dict[str, Any]


class EvaluationSteps(PreparationSteps, UpdateSteps):
    """The steps of `Trainer` that evaluate; each can be overridden there."""

    eval_samples: Samples | None
    eval_lengths: Sequence[int] | None
    cut_short = False
    """Whether a request to stop ended the last evaluation."""

    def hold_out(
        self, samples: Samples, eval_samples: Samples | None
    ) -> tuple[Samples, Samples | None]:
        """Return what to train on and what to evaluate on.

        Raises:
            BadInputError: there are two ways to evaluate, or none where one is needed.
        """
        share = self.config.validation_split
        if share and eval_samples is not None:
            raise BadInputError(
                f"validation_split={share!r} and samples to evaluate on were both given; "
                "give one of them."
            )
        if share:
            return holdout.split(samples, share, seed=self.config.seed)
        for name in ("checkpoint_best", "eval_at_start"):
            if getattr(self.config, name) and eval_samples is None:
                raise BadInputError(
                    f"{name}=True needs samples to evaluate on; give eval_samples (--eval-data), or "
                    "validation_split."
                )
        return samples, eval_samples

    def evaluation_due(self, *, last_of_epoch: bool) -> bool:
        """Whether to evaluate after this step."""
        if self.eval_samples is None:
            return False
        if self.config.eval_every is None:
            return last_of_epoch or self.finished()
        return self.steps_taken % self.config.eval_every == 0

    def evaluate_into(self, record: Record) -> bool:
        """Add an evaluation to a step's record; return whether it is the best of the run so far.

        One that was cut short by a request to stop says nothing: a note stands in its place.
        """
        if self.stopping:
            record["note"] = "no evaluation: the run was asked to stop"
            return False
        self.cut_short = False
        found = self.evaluate()
        if self.cut_short:
            record["note"] = "evaluation cut short: the run was asked to stop"
            return False
        record["eval_loss"] = found
        return self.progress.is_best(found)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss of the evaluation set's tokens, each counted once.

        It ends early, on all ranks alike, once a rank is asked to stop: `cut_short` is then set.

        Raises:
            BadInputError: there is no such token, so that every model would be as good.
        """
        assert self.eval_samples is not None
        everything = list(range(len(self.eval_samples)))
        exact = torch.float64 if self.world.device.type in ("cpu", "cuda") else torch.float32
        total = torch.zeros((), device=self.world.device, dtype=exact)
        tokens = 0
        self.model.eval()
        for start in range(0, len(everything), self.global_batch):
            window = everything[start : start + self.global_batch]
            rows = self.shard(self.pack(window, self.eval_lengths))
            batches = [self.collate(self.draw(each, self.eval_samples)) for each in rows]
            tokens += self.count(batches)
            if self.stopping:
                self.cut_short = True
                break
            for batch in batches:
                total += loss.shifted_cross_entropy_sum(self.forward(batch), batch.labels)
        parallel.reshard(self.model)
        self.set_train_mode()
        if tokens == 0 and not self.cut_short:
            raise BadInputError(
                f"none of the {len(everything)} samples to evaluate on has a label other than -100 "
                "behind its first; give some that have."
            )
        return self.mean_loss(total, tokens) if tokens else 0.0
