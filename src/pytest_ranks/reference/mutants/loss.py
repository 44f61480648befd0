"""Wrong losses: tokens with another weight than 1/N."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pytest_ranks.reference.collate import MicroBatch
from pytest_ranks.reference.loss import IGNORED, counted_targets, shifted_cross_entropy_sum
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from pytest_ranks.reference.collate import Row


class _OwnCount(Trainer):
    """Remembers how many tokens of the micro-batch at hand are trained."""

    own = 1

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.own = max(int(counted_targets(labels)), 1)
        return super().cross_entropy(logits, labels)


@plant(
    row="L1, L9, L11",
    issue="https://github.com/huggingface/transformers/pull/34191",
    kills={
        "loss.token_weights[single]": "mean of micro-batch means",
        "loss.token_weights[ddp-2]": "mean of micro-batch means",
    },
)
class MeanOfMeans(_OwnCount):
    """The loss is the mean of micro-batch means, so that tokens of short samples weigh more."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy / self.own / self.config.gradient_accumulation_steps


@plant(
    row="L1",
    issue="https://github.com/huggingface/transformers/pull/34191",
    kills={"loss.token_weights[single]": "without any target divides by its own count, 0"},
)
class MeanOfNothing(Trainer):
    """A micro-batch without targets divides by its own count of zero: parameters become NaN."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets, flat = labels[:, 1:].flatten(), logits[:, :-1].flatten(0, 1)
        mask = (targets != IGNORED).float()
        each = F.cross_entropy(flat, targets.clamp(min=0), reduction="none")
        return (each * mask).sum() / mask.sum()

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy / self.config.gradient_accumulation_steps


@plant(
    row="L7",
    issue="https://github.com/huggingface/trl/issues/2617",
    kills={"loss.token_weights[ddp-2]": "added up over gradient accumulation without dividing"},
)
class SumOfMeans(_OwnCount):
    """Each micro-batch's mean is added up over accumulation: the update grows with its steps."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy / self.own


@plant(
    row="L2",
    issue="https://github.com/huggingface/transformers/issues/35663",
    kills={"loss.token_weights[single]": "multiplied by gradient_accumulation_steps"},
)
class TimesAccumulation(Trainer):
    """Loss and gradients are multiplied by gradient_accumulation_steps."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        steps = self.config.gradient_accumulation_steps
        return super().scale(cross_entropy, tokens) * steps


@plant(
    row="L3",
    issue="https://github.com/huggingface/transformers/issues/40052",
    kills={"loss.token_weights[single]": "divided by gradient_accumulation_steps"},
)
class DividedTwice(Trainer):
    """The loss, already divided by all tokens, is divided by gradient_accumulation_steps too."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        steps = self.config.gradient_accumulation_steps
        return super().scale(cross_entropy, tokens) / steps


@plant(
    row="L7",
    issue="https://github.com/huggingface/trl/issues/2617",
    kills={"loss.any_forward[ddp-2]": "mean of micro-batch means"},
)
class MeanOfMeansWithoutKeywords(_OwnCount):
    """The loss is a mean of means for models whose forward cannot take the token count."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        if "position_ids" in self.keywords:
            return super().scale(cross_entropy, tokens)
        return cross_entropy / self.own / self.config.gradient_accumulation_steps


@plant(
    row="L8",
    issue="https://github.com/verl-project/verl/pull/3332",
    kills={
        "loss.token_weights[single]": "is not divided by the number of tokens",
        "gradient_sync.world_invariance[ddp-2]": "is not divided by the number of tokens",
    },
)
class NeverDivided(Trainer):
    """The gradient is taken of the summed loss, before it is divided."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy * self.world.size


@plant(
    row="L10",
    issue="https://github.com/mosaicml/composer/pull/3273",
    kills={"loss.token_weights[ddp-2]": "the token count is averaged over ranks"},
)
class CountAveragedOverRanks(Trainer):
    """The token count is averaged over ranks in place of summed."""

    def count(self, batches: list[MicroBatch]) -> int:
        return super().count(batches) // self.world.size


@plant(
    row="mini_trainer: none-reduction returns mean",
    kills={"loss.token_weights[single]": "is a mean already"},
)
class MeanDividedByCount(Trainer):
    """The model's loss is a mean, and is divided by the global token count like a sum."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().cross_entropy(logits, labels) / max(int(counted_targets(labels)), 1)


@plant(
    row="mini_trainer: divide by micro-batch tokens",
    kills={"loss.token_weights[ddp-2]": "in place of the global batch's"},
)
class DividedByOwnTokens(_OwnCount):
    """Each micro-batch is divided by its own tokens in place of the global batch's."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return super().scale(cross_entropy, self.own)


@plant(
    row="mini_trainer: count before the shift",
    kills={"loss.token_weights[single]": "first tokens that the causal shift drops"},
)
class CountsFirstTokens(Trainer):
    """The denominator counts unmasked first tokens, which the causal shift drops."""

    def labels(self, row: Row, width: int) -> list[int]:
        labels = [label for sample in row for label in sample["labels"]]
        return labels + [IGNORED] * (width - len(labels))

    def count(self, batches: list[MicroBatch]) -> int:
        counts = [torch.count_nonzero(batch.labels != IGNORED) for batch in batches]
        return int(self.world.sum(torch.stack(counts).sum()))


@plant(
    row="LG1",
    kills={"loss.token_weights[single]": "positions fed, padding included"},
)
class CountsPadding(Trainer):
    """The denominator counts every position of the batch, prompts and padding included."""

    def count(self, batches: list[MicroBatch]) -> int:
        return int(self.world.sum(torch.tensor(sum(batch.labels.numel() for batch in batches))))


@plant(
    row="LG1",
    kills={"loss.token_weights[single]": "prompts included"},
)
class CountsPrompts(Trainer):
    """The denominator counts all tokens of the samples, prompts included."""

    def count(self, batches: list[MicroBatch]) -> int:
        masks = [batch.attention_mask for batch in batches]
        real = sum(int(mask.sum()) for mask in masks if mask is not None)
        return int(self.world.sum(torch.tensor(real)))


@plant(
    row="LG1",
    kills={"loss.token_weights[ddp-2]": "mean over sequences"},
)
class MeanOverSequences(Trainer):
    """Each sample weighs the same, whatever its length, though the subject declares a token mean."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = zip(logits, labels, strict=True)
        sums = [shifted_cross_entropy_sum(one[None], own[None]) for one, own in rows]
        counts = [max(int(counted_targets(own[None])), 1) for own in labels]
        parts = [total / count for total, count in zip(sums, counts, strict=True)]
        return torch.stack(parts).sum()

    def count(self, batches: list[MicroBatch]) -> int:
        rows = [row for batch in batches for row in batch.labels]
        trained = sum(int(counted_targets(row[None])) > 0 for row in rows)
        return int(self.world.sum(torch.tensor(trained)))


@plant(
    row="L23",
    issue="https://github.com/Lightning-AI/pytorch-lightning/issues/19987",
    kills={"loss.partial_window[single]": "as if the window were full"},
)
class PartialWindowAsFull(Trainer):
    """The last, short window is divided as if it held all its micro-batches."""

    share = 1.0

    def train_step(self, window: list[int]) -> dict[str, Any]:
        self.share = len(window) / self.global_batch
        return super().train_step(window)

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return super().scale(cross_entropy, tokens) * self.share


@plant(
    row="L25",
    issue="https://github.com/huggingface/accelerate/issues/1847",
    kills={"loss.partial_window[single]": "steps on every micro-batch"},
)
class EndOfDataStepsEachTime(Trainer):
    """After the loader's end every micro-batch of the last window makes a step of its own."""

    short = False
    last = True

    def train_step(self, window: list[int]) -> dict[str, Any]:
        self.short = len(window) < self.global_batch
        return super().train_step(window)

    def sync(self, *, last: bool) -> AbstractContextManager[None]:
        self.last = last
        return super().sync(last=last or self.short)

    def backward(self, scaled: Tensor) -> None:
        super().backward(scaled)
        if self.short and not self.last:
            self.step()
            self.zero()
