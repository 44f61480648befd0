"""What the ids that went through the model say about the way from the samples to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_ranks.conformance.runner import Run
    from pytest_ranks.models.corpora import Corpus


def without_padding(row: list[int], pad: int, *, like: list[int]) -> list[int]:
    """Return a row without its padding, which is on one side; the end of sequence may be the padding id too."""
    length = len(row)
    while length and row[length - 1] == pad:
        length -= 1
    if length < len(row):  # padded on the right, or ending in the end of sequence
        return row[: length + (like[-1] == pad)]
    return row


def changed_cause(found: list[int], wanted: list[int]) -> str:
    """Return the likely cause of a sample that reached the model with other ids."""
    more = len(found) - len(wanted)
    if more > 0 and found[more:] == wanted:
        return f"{more} ids are put before the sample: a special token is added twice"
    if more > 0 and found[: len(wanted)] == wanted:
        return f"{more} ids are put after the sample: a special token is added twice"
    if more < 0 and set(found) <= set(wanted):
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
