"""The loss: a sum over tokens, so that one division by one global count makes it a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a position that is not trained: `ignore_index` of `torch.nn.CrossEntropyLoss`."""


def shifted_cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross entropy of each next token.

    The sum is taken in float32 whatever the model computes in. A mean would weigh the tokens of a
    short micro-batch more than those of a long one
    (https://github.com/huggingface/transformers/pull/34191).

    Args:
        logits: [B, T, V], any float dtype; position t predicts token t + 1.
        labels: int64 [B, T], unshifted, `IGNORED` where nothing is trained.

    Returns:
        float32 scalar; 0 with a zero gradient where every label is ignored.
    """
    predictions = logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")


def counted_targets(labels: Tensor) -> Tensor:
    """Count the tokens that are trained; a row's first label has no prediction to train.

    Args:
        labels: int64 [B, T], unshifted.

    Returns:
        int64 scalar.
    """
    return torch.count_nonzero(labels[:, 1:] != IGNORED)
