"""A trainer's own batch, replayed: change one packed document and see whether another one notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.conformance.findings import Inconclusive
from pytest_ranks.models.corpora import EOS_ID, NULL_ID

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.conformance.job import Job
    from pytest_ranks.models.corpora import Corpus
    from pytest_ranks.observe.records import Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One document that saw another.

    Attributes:
        flipped: the sample that was changed.
        moved: a sample whose hidden states moved.
        size: the largest change of an entry.
    """

    flipped: int
    moved: int
    size: float


def flip_test(job: Job, forward: Forward, corpus: Corpus) -> Leak | None:
    """Replay a batch in eval mode, change one document of each row after the other, and look at the rest.

    The comparison is exact: tokens that may not be attended to have weight 0, whatever they are.

    Args:
        job: whose model to replay through.
        forward: the recorded call.
        corpus: for telling documents apart.

    Returns:
        The first leak, or None when there is none (or no row holds two documents).

    Raises:
        Inconclusive: the forward's mask is no tensor of 2 or 4 dimensions.
    """
    places = corpus.positions()
    rows = [
        [places[token].sample if token in places else None for token in row]
        for row in forward.input_ids
    ]
    owners = [_with_ends(row, forward.input_ids[index]) for index, row in enumerate(rows)]
    if all(len(_documents(row)) < 2 for row in owners):
        return None
    if forward.masked and forward.attention_mask is None:
        raise Inconclusive(
            "the model was given an attention mask that cannot be replayed: see the update without packing"
        )
    model = job.build_model().eval()
    before = _hidden(model, forward, forward.input_ids)
    most = max(len(_documents(row)) for row in owners)
    for place in range(most - 1):  # under a causal mask nothing comes after the last one
        changed = [(_documents(row) + [None] * most)[place] for row in owners]
        flipped = [
            [
                NULL_ID if owner is not None and owner == changed[index] else token
                for token, owner in zip(row, owners[index], strict=True)
            ]
            for index, row in enumerate(forward.input_ids)
        ]
        after = _hidden(model, forward, flipped)
        for index, row in enumerate(owners):
            moved = (before[index] - after[index]).abs().amax(dim=-1)
            for offset, owner in enumerate(row):
                if owner not in (None, changed[index]) and float(moved[offset]) != 0.0:
                    size = float(moved.max())
                    return Leak(flipped=changed[index] or 0, moved=owner or 0, size=size)
    return None


def _documents(owners: list[int | None]) -> list[int | None]:
    """Return the documents of a row, in order."""
    return list(dict.fromkeys(owner for owner in owners if owner is not None))


def _with_ends(owners: list[int | None], ids: list[int]) -> list[int | None]:
    """Give each document the end-of-sequence token right after it; later ones are padding."""
    filled = list(owners)
    for offset, token in enumerate(ids):
        if token == EOS_ID and offset and owners[offset - 1] is not None:
            filled[offset] = owners[offset - 1]
    return filled


def _hidden(model: Any, forward: Forward, ids: list[list[int]]) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids), "use_cache": False}
    if forward.position_ids is not None:
        inputs["position_ids"] = torch.tensor(forward.position_ids)
    if forward.attention_mask is not None:
        inputs["attention_mask"] = torch.tensor(forward.attention_mask)
    with torch.no_grad():
        hidden: Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return hidden
