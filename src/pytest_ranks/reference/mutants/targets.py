"""Wrong targets: positions trained that must not be, left out, or trained on another token."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pytest_ranks.reference.collate import MicroBatch, next_token_labels
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.reference.collate import Row


@plant(
    row="L12",
    issue="https://github.com/huggingface/transformers/issues/47394",
    kills={
        "loss.targets[single]": "shifted twice",
        "overfitting.single_sample[single]": "shifted twice",
    },
)
class ShiftedTwiceInLoss(Trainer):
    """The loss shifts labels that are shifted already: every token is trained on the one after."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        rolled = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return super().cross_entropy(logits, rolled)


@plant(
    row="L13",
    issue="https://github.com/allenai/open-instruct/pull/1549",
    kills={"loss.targets[ddp-2]": "shifted twice"},
)
class ShiftedTwiceInCollator(Trainer):
    """The collator shifts labels, and the loss does it again."""

    def labels(self, row: Row, width: int) -> list[int]:
        return [*super().labels(row, width)[1:], IGNORED]


@plant(
    row="L12",
    kills={"loss.targets[single]": "not shifted"},
)
class NotShifted(Trainer):
    """Each token is trained to predict itself."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")


@plant(
    row="L14",
    issue="https://github.com/huggingface/transformers/issues/23530",
    kills={"loss.trained_positions[single]": "mask padding by length, not by id"},
)
class EndMaskedAsPadding(Trainer):
    """Labels that equal the padding id are masked, and with them every end of sequence."""

    def labels(self, row: Row, width: int) -> list[int]:
        return [IGNORED if label == self.pad_id else label for label in super().labels(row, width)]


@plant(
    row="L17",
    issue="https://github.com/huggingface/trl/pull/4201",
    kills={"loss.trained_positions[single]": "every label is masked"},
)
class EverythingMasked(Trainer):
    """The template marks no assistant tokens, so that every label is masked; steps go on."""

    def labels(self, row: Row, width: int) -> list[int]:
        return [IGNORED] * width

    def count(self, batches: list[MicroBatch]) -> int:
        return max(super().count(batches), 1)


@plant(
    row="L18",
    issue="https://github.com/MervinPraison/PraisonAI/pull/4358",
    kills={"loss.trained_positions[ddp-2]": "prompt tokens are in the loss"},
)
class PromptsTrained(Trainer):
    """Labels are rebuilt from the ids: prompts are trained."""

    def labels(self, row: Row, width: int) -> list[int]:
        ids = [token for sample in row for token in (IGNORED, *sample["input_ids"][1:])]
        return ids + [IGNORED] * (width - len(ids))


@plant(
    row="L19",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2227",
    kills={
        "loss.trained_positions[single]": "padding positions are in the loss",
        "loss.padding_is_inert[single]": "is in the loss",
    },
)
class PaddingTrained(Trainer):
    """Padding has the padding id for a label, in place of -100."""

    def labels(self, row: Row, width: int) -> list[int]:
        real = sum(len(sample["labels"]) for sample in row)
        return next_token_labels(row, real) + [self.pad_id] * (width - real)


@plant(
    row="L19",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2227",
    kills={
        "loss.padding_is_inert[ddp-2]": "padding is attended to",
        "loss.split_invariance[ddp-2]": "padding is attended to",
    },
)
class PadsLeftWithoutMask(Trainer):
    """Rows are padded on the left, and no mask keeps their tokens from attending to it."""

    def collate(self, rows: list[Any]) -> MicroBatch:
        batch = super().collate(rows)
        if batch.attention_mask is None:
            return batch
        padding = (batch.attention_mask == 0).sum(dim=1).tolist()

        def rolled(tensor: Tensor) -> Tensor:
            rows = zip(tensor, padding, strict=True)
            return torch.stack([row.roll(shift) for row, shift in rows])

        return MicroBatch(
            input_ids=rolled(batch.input_ids),
            labels=rolled(batch.labels),
            position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids),
            attention_mask=None,
            samples=batch.samples,
        )


@plant(
    row="L20",
    issue="https://github.com/OpenRLHF/OpenRLHF/issues/393",
    kills={"data_loading.inputs_are_the_samples[single]": "special token is added twice"},
)
class StartTokenTwice(Trainer):
    """The tokenizer adds the start token that the template has already written."""

    def sample(self, index: int, samples: Any) -> Any:
        sample = super().sample(index, samples)
        return {
            "input_ids": [1, *sample["input_ids"]],
            "labels": [IGNORED, IGNORED, *sample["labels"][1:]],
        }
