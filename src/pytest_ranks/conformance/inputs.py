"""What the ids that went through the model say about the way from the samples to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.models.corpora import EOS_ID

if TYPE_CHECKING:
    from pytest_ranks.conformance.runner import Run
    from pytest_ranks.models.corpora import Corpus
    from pytest_ranks.observe.records import Forward


def fed_rows(forward: Forward, pad: int) -> list[list[int]]:
    """Return the rows of a forward without the padding on their left, as far as the model was told of it."""
    mask = forward.attention_mask
    if not forward.masked:
        return forward.input_ids  # padding on the left would be attended to: it is no padding then
    if mask is None or isinstance(mask[0][0], list) or len(mask[0]) != len(forward.input_ids[0]):
        return [row[_first_other(row, pad) :] for row in forward.input_ids]
    return [
        [token for token, kept in zip(row, keeps, strict=True) if kept]
        for row, keeps in zip(forward.input_ids, mask, strict=True)
    ]


def _first_other(row: list[int], pad: int) -> int:
    return next((place for place, token in enumerate(row) if token != pad), len(row))


def without_padding(row: list[int], pad: int, *, like: list[int]) -> list[int]:
    """Return a row without the padding on its right; the end of sequence may be the padding id too."""
    length = len(row)
    while length and row[length - 1] == pad:
        length -= 1
    if length < len(row):  # padded on the right, or ending in the end of sequence
        return row[: length + (like[-1] == pad)]
    return row


def accepted_inputs(wanted: list[int], *, adds_eos: bool) -> list[list[int]]:
    """Return the ids that may stand for a sample: where targets are shifted before the model, its last is no input."""
    accepted = [wanted, wanted[:-1]]
    return [*accepted, [*wanted, EOS_ID]] if adds_eos else accepted


def changed_cause(found: list[int], wanted: list[int]) -> str:
    """Return the likely cause of a sample that reached the model with other ids."""
    for whole in (wanted, wanted[:-1]):
        more = len(found) - len(whole)
        if more > 0 and found[more:] == whole:
            return f"{more} ids are put before the sample: a special token is added twice"
        if more > 0 and found[: len(whole)] == whole:
            return f"{more} ids are put after the sample: a special token is added twice"
    if found and len(found) < len(wanted) and set(found) <= set(wanted):
        side = "left" if found[-1] == wanted[-1] else "right"
        return f"the sample is truncated on the {side} to {len(found)} ids"
    return "the sample's ids are changed on the way to the model"


def padding_before_tokens(run: Run, corpus: Corpus) -> str:
    """Return what is wrong when tokens can attend to padding on their left; empty when they cannot."""
    places = corpus.positions()
    for seen in run.observed:
        for forward in seen.training_forwards():
            before = [
                row
                for row in forward.input_ids
                if row[0] not in places and set(row) & places.keys()
            ]
            if before and not forward.masked:
                return (
                    f"padding is attended to: {len(before)} rows of a forward on rank {seen.rank} begin with padding, "
                    "and the model is given no attention mask"
                )
    return ""
