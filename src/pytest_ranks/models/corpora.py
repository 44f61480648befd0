"""Tagged corpora: every sample can be recognised from any of its tokens, wherever a trainer puts it.

The shapes are chosen against vacuous passes: token counts differ a lot between samples (so that a
mean of means differs from a token mean), one sample has no targets, one keeps its first token
unmasked (a causal shift drops that label, a careless count does not), every sample ends in the
end-of-sequence token, and the padding id is that same id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

IGNORE = -100
"""The label that transformers and torch's cross entropy leave out of the loss."""

NULL_ID = 0
"""A token id that no corpus uses, as input or as target: the zero of a ledger's scale."""

EOS_ID = 1
"""End of sequence, and on purpose also the padding id."""

FIRST_ID = 2

UNEVEN_LENGTHS = (5, 23, 9, 3, 17, 6, 31, 12)
"""Lengths in tokens with the final EOS; their sum and none of their subsets is a round number of rows."""

UNEVEN_PROMPTS = (0, 15, 2, 3, 4, 5, 9, 1)
"""Tokens at the start of each sample that are not trained on: 0 leaves the first token unmasked,
3 of 3 leaves no target."""

Sample = dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a token id of a unique-token corpus stands.

    Attributes:
        sample: the sample's index.
        offset: the token's place in it, from 0.
    """

    sample: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Samples whose input tokens (EOS apart) are unique over the whole corpus.

    Attributes:
        samples: `input_ids` and unshifted `labels`, -100 where not trained.
        vocab_size: ids are below it; `NULL_ID` is never used.
    """

    samples: tuple[Sample, ...]
    vocab_size: int

    def positions(self) -> dict[int, Position]:
        """Return the place of every token id that occurs exactly once."""
        return {
            token: Position(sample=index, offset=offset)
            for index, sample in enumerate(self.samples)
            for offset, token in enumerate(sample["input_ids"])
            if token != EOS_ID
        }

    def targets(self, drawn: Iterable[int] | None = None) -> dict[tuple[int, int], int]:
        """Return how often each (input token, target token) pair must be trained.

        Args:
            drawn: sample indices with multiplicity; None means every sample once.
        """
        wanted: dict[tuple[int, int], int] = {}
        for index in range(len(self.samples)) if drawn is None else drawn:
            sample = self.samples[index]
            for token, target in zip(sample["input_ids"], sample["labels"][1:], strict=False):
                if target != IGNORE:
                    wanted[token, target] = wanted.get((token, target), 0) + 1
        return wanted


def unique_token_corpus(
    lengths: Sequence[int] = UNEVEN_LENGTHS,
    prompts: Sequence[int] = UNEVEN_PROMPTS,
    *,
    vocab_size: int,
) -> Corpus:
    """Make a corpus in which an input token names its sample and its position.

    Args:
        lengths: tokens of each sample with its final EOS; at least 2.
        prompts: tokens at the start of each sample whose label is -100.
        vocab_size: ids stay below it.

    Raises:
        BadInputError: when the vocabulary is too small, or the two sequences differ in length.
    """
    if len(lengths) != len(prompts):
        raise BadInputError(
            f"found {len(lengths)} lengths and {len(prompts)} prompts, expected as many of each"
        )
    needed = FIRST_ID + sum(length - 1 for length in lengths)
    if needed > vocab_size:
        raise BadInputError(
            f"a unique-token corpus of {sum(lengths)} tokens needs {needed} ids, found vocab_size={vocab_size}: "
            "make the samples shorter or the vocabulary larger"
        )
    samples, next_id = [], FIRST_ID
    for length, prompt in zip(lengths, prompts, strict=True):
        ids = [*range(next_id, next_id + length - 1), EOS_ID]
        next_id += length - 1
        samples.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    return Corpus(samples=tuple(samples), vocab_size=vocab_size)


def uniform_corpus(count: int, *, length: int = 4, vocab_size: int) -> Corpus:
    """Make `count` samples of one length, for claims about which samples are drawn and when."""
    return unique_token_corpus([length] * count, [0] * count, vocab_size=vocab_size)


def counted_targets(sample: Mapping[str, Sequence[int]]) -> int:
    """Return how many tokens of a sample enter the loss: the labels but the first that are not -100."""
    return sum(label != IGNORE for label in sample["labels"][1:])
