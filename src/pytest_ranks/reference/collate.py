"""Turn samples into tensors: rows of one document each, or rows of several packed documents."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.data import check_sample, count_targets
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.packing import OVERLONG, pack_lpt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pytest_ranks.reference.data import Sample
    from pytest_ranks.reference.packing import Packer

    Row = Sequence[Sample]
    """The documents that share a row, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What goes through the model in one forward.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], unshifted, -100 where nothing is trained.
        position_ids: int64 [B, T], restarting at 0 with each document.
        attention_mask: int64 [B, T], 1 on tokens and 0 on padding; None for packed rows.
        samples: documents in it; 0 for the row that a rank without a sample runs.
        batch_targets: trained tokens of the whole global batch, on all ranks: what the sum of its
            losses is divided by. None where who made it does not know; the trainer counts itself.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    samples: int
    batch_targets: int | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy whose tensors are on the device."""
        mask = self.attention_mask
        return MicroBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
            samples=self.samples,
            batch_targets=self.batch_targets,
        )


def restarting_positions(lengths: Sequence[int], width: int) -> list[int]:
    """Count positions from 0 in each document of a row, and in the padding after them."""
    padding = width - sum(lengths)
    return list(chain.from_iterable(range(length) for length in (*lengths, padding)))


def next_token_labels(row: Row, width: int) -> list[int]:
    """Return a row's labels: the documents' own, without each one's first, then padding.

    A document's first token has no prediction of its own: in a packed row its label would train
    the last token of the document before it. Padding is known by length, never by token id: the
    padding token is often the end-of-text token, which must be learnt.
    """
    labels = list(chain.from_iterable((IGNORED, *sample["labels"][1:]) for sample in row))
    return labels + [IGNORED] * (width - len(labels))


def padding_mask(lengths: Sequence[int], width: int, *, packed: bool) -> Tensor | None:
    """Return the `attention_mask` keyword: 1 on tokens, 0 on padding; None for packed rows.

    transformers keeps the documents of a packed row apart where it sees position_ids restart, but
    only if it is given no mask; with a mask of ones they would attend to each other
    (`find_packed_sequence_indices` in transformers/masking_utils.py).

    Args:
        lengths: tokens in each row.
        width: T, the length that rows are padded to.
        packed: whether rows hold several documents.
    """
    if packed:
        return None
    return torch.tensor([[1] * length + [0] * (width - length) for length in lengths])


class Layout(Protocol):
    """The three decisions of a batch, as methods: the trainer is one, `PlainLayout` another."""

    def positions(self, lengths: Sequence[int], width: int) -> list[int]:
        """Return one row's position_ids."""
        ...

    def labels(self, row: Row, width: int) -> list[int]:
        """Return one row's labels."""
        ...

    def mask(self, lengths: Sequence[int], width: int, *, packed: bool) -> Tensor | None:
        """Return the attention_mask keyword for the whole micro-batch."""
        ...


class PlainLayout:
    """The layout functions of this module, as they are."""

    positions = staticmethod(restarting_positions)
    labels = staticmethod(next_token_labels)
    mask = staticmethod(padding_mask)


def collate(
    rows: Sequence[Row], *, pad_id: int, packed: bool, layout: Layout | None = None
) -> MicroBatch:
    """Build one micro-batch.

    Args:
        rows: the rows, each a list of documents; none at all for a rank that has no sample, which
            then runs a row without targets, because the other ranks' collectives wait for it.
        pad_id: the token that fills short rows; it is never trained and never attended to.
        packed: whether rows hold several documents.
        layout: who makes positions, labels and mask.
    """
    layout = layout or PlainLayout()
    samples = sum(len(row) for row in rows)
    if not rows:
        rows = [[{"input_ids": [pad_id, pad_id], "labels": [IGNORED, IGNORED]}]]
    lengths = [[len(sample["input_ids"]) for sample in row] for row in rows]
    width = max(sum(row) for row in lengths)
    ids = [list(chain.from_iterable(sample["input_ids"] for sample in row)) for row in rows]
    return MicroBatch(
        input_ids=torch.tensor([row + [pad_id] * (width - len(row)) for row in ids]),
        labels=torch.tensor([layout.labels(row, width) for row in rows]),
        position_ids=torch.tensor([layout.positions(row, width) for row in lengths]),
        attention_mask=layout.mask([sum(row) for row in lengths], width, packed=packed),
        samples=samples,
    )


class MaxTokensPerRankCollator:
    """A `collate_fn` for `torch.utils.data.DataLoader`: a global batch in, micro-batches out.

    Every rank loads the same global batch, packs it in the same way and keeps its own part, so all
    ranks get the same number of micro-batches without a word between them. Each micro-batch knows how
    many tokens of the whole global batch are trained.
    """

    def __init__(
        self,
        max_tokens_per_rank: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
        packer: Packer = pack_lpt,
        overlong: str = "error",
    ) -> None:
        """Say how to pack.

        Args:
            max_tokens_per_rank: tokens of one rank in one micro-batch.
            rank: whose part to keep.
            world_size: how many ranks there are.
            pad_id: the token of the row that a rank without a sample runs.
            packer: who makes the plan.
            overlong: a longer sample is an "error", is left out with a warning ("drop"), or gets its
                "own" micro-batch, above the limit.

        Raises:
            BadInputError: there is no such policy.
        """
        if overlong not in OVERLONG:
            raise BadInputError(
                f"overlong={overlong!r}: expected one of {', '.join(map(repr, OVERLONG))}."
                f"{did_you_mean(str(overlong), OVERLONG)}"
            )
        self.max_tokens_per_rank = max_tokens_per_rank
        self.rank = rank
        self.world_size = world_size
        self.pad_id = pad_id
        self.packer = packer
        self.overlong = overlong

    def __call__(self, batch: Sequence[Sample]) -> list[MicroBatch]:
        """Pack a global batch.

        Returns:
            This rank's micro-batches, as many as each rank has; one without targets where all
            samples were left out, so that no rank waits for another.

        Raises:
            BadInputError: a sample is none, or is too long and that is an error.
        """
        for index, sample in enumerate(batch):
            check_sample(sample, where=f"sample {index} of the batch")
        kept = self.keep(batch)
        limit = self.max_tokens_per_rank
        lengths = [len(sample["input_ids"]) for sample in kept]
        if self.overlong == "own":
            lengths = [min(length, limit) for length in lengths]
        plan = self.packer(lengths, limit, self.world_size)
        targets = sum(map(count_targets, kept))
        return [
            replace(self._row([kept[index] for index in indices]), batch_targets=targets)
            for indices in plan.for_rank(self.rank) or [()]
        ]

    def keep(self, batch: Sequence[Sample]) -> Sequence[Sample]:
        """Leave out what is too long, if that is asked for, and say so."""
        if self.overlong != "drop":
            return batch
        kept = [one for one in batch if len(one["input_ids"]) <= self.max_tokens_per_rank]
        if len(kept) < len(batch):
            warnings.warn(
                f"{len(batch) - len(kept)} of {len(batch)} samples of a batch have more than "
                f"{self.max_tokens_per_rank} tokens and are left out.",
                stacklevel=2,
            )
        return kept

    def _row(self, documents: Row) -> MicroBatch:
        return collate([documents] if documents else [], pad_id=self.pad_id, packed=True)
