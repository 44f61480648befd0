from __future__ import annotations

import dataclasses
import json

import pytest

from pytest_ranks.conformance.job import Job, Optimizer
from pytest_ranks.errors import BadInputError
from pytest_ranks.models.corpora import IGNORE, unique_token_corpus
from pytest_ranks.models.ledger import id_tokenizer

CORPUS = unique_token_corpus([4, 5], [0, 2], vocab_size=32)
JOB = Job(samples=CORPUS.samples)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_global_batch_is_the_product():
    assert Job(micro_batch=2, gradient_accumulation_steps=3, world_size=4).global_batch == 24


def test_tokens_are_written_as_they_are(tmp_path):
    assert lines(JOB.write_data(tmp_path / "data.jsonl")) == list(CORPUS.samples)


@pytest.mark.parametrize("data_format", ["prompt_completion", "messages"])
def test_texts_read_back_to_the_same_ids(tmp_path, data_format):
    tokenizer = id_tokenizer(32)
    for row, sample in zip(
        lines(JOB.write_data(tmp_path / "d", format=data_format)), CORPUS.samples, strict=True
    ):
        if data_format == "messages":
            prompt, answer = (message["content"] for message in row["messages"])
        else:
            prompt, answer = row["prompt"], row["completion"]
        assert tokenizer(f"{prompt} {answer}").input_ids == sample["input_ids"]
        assert len(tokenizer(prompt).input_ids) == sample["labels"].count(IGNORE)


def test_a_format_that_cannot_say_the_masks_is_refused(tmp_path):
    with pytest.raises(
        BadInputError,
        match="sample 1: its labels are masked in places that format 'text' cannot say",
    ):
        JOB.write_data(tmp_path / "d", format="text")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="format: found 'csv', expected one of tokens, text"):
        JOB.write_data(tmp_path / "d", format="csv")


def test_equal_jobs_have_one_key_wherever_they_write():
    assert JOB.key() == dataclasses.replace(JOB, out_dir="/elsewhere").key()
    for other in ({"seed": 12}, {"optimizer": Optimizer(lr=0.5)}, {"samples": CORPUS.samples[:1]}):
        assert dataclasses.replace(JOB, **other).key() != JOB.key()
