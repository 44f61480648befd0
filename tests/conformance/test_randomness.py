from __future__ import annotations

import pytest
import torch

from pytest_ranks.conformance.findings import NotApplicable
from pytest_ranks.conformance.randomness import repeated_numbers
from pytest_ranks.models.corpora import uniform_corpus
from pytest_ranks.observe.draws import Augmented, Draw, read_draws

SAMPLES = uniform_corpus(3, vocab_size=32).samples


def draw(value, *, rank=0, index=0):
    return Draw(rank=rank, index=index, value=value)


def test_a_reading_draws_one_number_and_hands_the_sample_on(tmp_path):
    samples = Augmented(SAMPLES, tmp_path / "draws", rank=1)
    torch.manual_seed(5)
    assert samples[2] == SAMPLES[2]
    assert samples[-1] == SAMPLES[2]
    assert samples[0:2] == list(SAMPLES[0:2])
    torch.manual_seed(5)
    numbers = [float(torch.rand(())) for _ in range(4)]
    assert read_draws(tmp_path / "draws") == [
        draw(value, rank=1, index=index) for value, index in zip(numbers, [2, 2, 0, 1], strict=True)
    ]


def test_iterating_draws_once_a_sample(tmp_path):
    samples = Augmented(SAMPLES, tmp_path / "draws", rank=0)
    assert list(samples) == list(SAMPLES)
    assert len(samples) == 3
    assert [entry.index for entry in read_draws(tmp_path / "draws")] == [0, 1, 2]


def test_without_a_file_nothing_was_drawn(tmp_path):
    assert read_draws(tmp_path / "none") == []


def test_different_numbers_are_no_finding():
    draws = [draw(0.1), draw(0.2, rank=1), draw(0.3), draw(0.4, rank=1)]
    assert repeated_numbers(draws, count=2, epochs=2) == ("", "")


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ([(0, 0.1), (1, 0.1), (0, 0.2), (1, 0.2)], "ranks 0, 1 are seeded alike"),
        ([(0, 0.1), (1, 0.2), (0, 0.1), (1, 0.2)], "the generator is seeded anew in every epoch"),
        (
            [(0, 0.1), (1, 0.1), (0, 0.3), (0, 0.3)],
            "ranks are seeded alike, and anew in every epoch",
        ),
    ],
)
def test_the_cause_is_read_from_who_used_a_number_twice(values, cause):
    draws = [draw(value, rank=rank) for rank, value in values]
    found, likely = repeated_numbers(draws, count=2, epochs=2)
    assert "numbers were used more than once, such as 0.1" in found
    assert likely == cause


def test_a_subject_that_copies_the_samples_first_cannot_be_judged():
    with pytest.raises(NotApplicable, match="read 2 samples 2 times in 2 epochs: it copies them"):
        repeated_numbers([draw(0.1), draw(0.2)], count=2, epochs=2)
