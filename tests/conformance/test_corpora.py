from __future__ import annotations

import pytest

from pytest_ranks.errors import BadInputError
from pytest_ranks.models.corpora import (
    EOS_ID,
    IGNORE,
    NULL_ID,
    counted_targets,
    uniform_corpus,
    unique_token_corpus,
)


def test_every_token_names_its_sample_and_offset():
    corpus = unique_token_corpus(vocab_size=256)
    places = corpus.positions()
    for index, sample in enumerate(corpus.samples):
        for offset, token in enumerate(sample["input_ids"][:-1]):
            assert (places[token].sample, places[token].offset) == (index, offset)
    assert NULL_ID not in places
    assert EOS_ID not in places


def test_the_shapes_guard_against_vacuous_passes():
    samples = unique_token_corpus(vocab_size=256).samples
    counts = [counted_targets(sample) for sample in samples]
    assert min(counts) == 0, "a sample without targets"
    assert max(counts) > 4 * min(count for count in counts if count), "uneven token counts"
    assert any(sample["labels"][0] != IGNORE for sample in samples), (
        "a first token that is not masked"
    )
    assert all(sample["input_ids"][-1] == EOS_ID for sample in samples)


def test_targets_leave_out_the_first_label_and_count_draws():
    corpus = unique_token_corpus([3, 4], [0, 2], vocab_size=16)
    first, second = corpus.samples
    assert first == {"input_ids": [2, 3, EOS_ID], "labels": [2, 3, EOS_ID]}
    assert second == {"input_ids": [4, 5, 6, EOS_ID], "labels": [IGNORE, IGNORE, 6, EOS_ID]}
    assert corpus.targets() == {(2, 3): 1, (3, EOS_ID): 1, (5, 6): 1, (6, EOS_ID): 1}
    assert corpus.targets([1, 1]) == {(5, 6): 2, (6, EOS_ID): 2}


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(BadInputError, match=r"needs 9 ids, found vocab_size=8"):
        uniform_corpus(7, length=2, vocab_size=8)


def test_lengths_and_prompts_go_together():
    with pytest.raises(BadInputError, match="found 2 lengths and 1 prompts"):
        unique_token_corpus([3, 4], [0], vocab_size=16)
