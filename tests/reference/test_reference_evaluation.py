"""Evaluation in detail: before the first step, on samples that are held out."""

from __future__ import annotations

import json

import pytest
import torch

from bodies.loop import (
    SAMPLES,
    TARGETS,
    Counted,
    make,
    mean_loss,
)
from pytest_ranks import BadInputError
from pytest_ranks.reference import (
    Trainer,
)
from pytest_ranks.reference.holdout import split
from pytest_ranks.reference.sampling import epoch_order


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit-for-bit comparisons need sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=320, attention_dropout=0.2)


def test_evaluation_before_the_first_step_is_of_the_model_as_it_came(model, tmp_path):
    fields = {"eval_at_start": True, "eval_samples": SAMPLES[:7], "out_dir": tmp_path}
    history = make(model, max_steps=2, checkpoint_every=1, **fields).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval_loss"] == pytest.approx(mean_loss(model, SAMPLES[:7])[0].item(), rel=1e-6)
    assert lines[1:] == history
    make(model, max_steps=3, resume_from=tmp_path, **fields).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


def test_parts_that_train_or_tell_nothing_are_refused(model):
    """One sample of four has a label: whichever part it is in, the other one has none."""
    masked = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}
    for samples in ([SAMPLES[0], *[masked] * 3], [masked] * 4):
        with pytest.raises(
            BadInputError,
            match=r"validation_split=0\.5 leaves 2 samples to (train|evaluate) on, none of which "
            "has a label other than -100 behind its first; use another share or seed",
        ):
            make(model, samples, validation_split=0.5)


def test_evaluation_of_no_token_is_refused_and_never_the_best(model):
    masked = {"input_ids": [1, 2, 3], "labels": [1, -100, -100]}
    trainer = make(model, eval_samples=[masked] * 3, eval_every=1)
    with pytest.raises(BadInputError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "none of the 3 samples to evaluate on has a label other than -100 behind its first; "
        "give some that have."
    )
    assert trainer.progress.best_loss is None


def test_parts_are_not_counted_before_that_is_asked(model):
    """Blocks of text read all their documents to count."""

    class Uncounted(list):
        @property
        def lengths(self):
            return [len(sample["input_ids"]) for sample in self]

        @property
        def counted(self):
            raise AssertionError("counted")

    trainer = make(model, Uncounted(SAMPLES), max_tokens_per_rank=40, validation_split=0.2)
    assert len(trainer.lengths) == 9


def test_parts_know_what_the_whole_knows(model):
    trainer = make(model, Counted(SAMPLES), max_tokens=9, validation_split=0.01)
    assert trainer.samples.counted == [TARGETS[index] for index in trainer.samples.indices]
    assert len(trainer.eval_samples) == 1
    assert trainer.total_steps() >= 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"validation_split": 0.99},
            "validation_split=0.99 of 11 samples leaves none to train on; give more samples or a smaller share.",
        ),
        (
            {"validation_split": 0.5, "eval_samples": SAMPLES},
            "validation_split=0.5 and samples to evaluate on were both given; give one of them.",
        ),
        (
            {"eval_at_start": True},
            "eval_at_start=True needs samples to evaluate on; "
            "give eval_samples (--eval-data), or validation_split.",
        ),
        (
            {"checkpoint_best": True, "out_dir": "x"},
            "checkpoint_best=True needs samples to evaluate on; "
            "give eval_samples (--eval-data), or validation_split.",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, fields, text):
    with pytest.raises(BadInputError) as caught:
        make(model, **fields)
    assert str(caught.value) == text


def test_held_out_samples_are_never_trained(model):
    drawn = {"train": [], "eval": []}

    class Spy(Trainer):
        def sample(self, index, samples):
            which = "train" if samples is self.samples else "eval"
            drawn[which].append(samples.indices[index])
            return super().sample(index, samples)

    samples = [dict(sample) for sample in SAMPLES]
    trainer = make(model, samples, trainer=Spy, epochs=1, validation_split=0.3, seed=5)
    history = trainer.train()
    assert len(drawn["eval"]) == 3
    assert sorted(drawn["train"] + drawn["eval"]) == list(range(11))
    held = [SAMPLES[index] for index in drawn["eval"]]
    assert history[-1]["eval_loss"] == pytest.approx(
        mean_loss(trainer.model, held)[0].item(), rel=1e-6
    )
    again = make(model, samples, epochs=1, validation_split=0.3, seed=5)
    assert again.eval_samples.indices == drawn["eval"]
    other = make(model, samples, epochs=1, validation_split=0.3, seed=6)
    assert other.eval_samples.indices != drawn["eval"]
    assert again.samples.name(0) == f"sample {again.samples.indices[0]}"


def test_a_run_that_ends_within_an_epoch_is_evaluated_at_its_end(model):
    history = make(model, max_steps=4, eval_samples=SAMPLES[:2]).train()  # three steps an epoch
    assert ["eval_loss" in record for record in history] == [False, False, True, True]


@pytest.mark.parametrize("seed", range(3))
def test_who_is_held_out_is_drawn_apart_from_the_order_of_training(seed):
    """Else the first to be trained would always be of one kind."""
    samples = [{"input_ids": [1, 2], "labels": [1, 2]}] * 40
    _, held = split(samples, 0.25, seed=seed)
    order = epoch_order(40, seed=seed, epoch=0)
    assert len(held) == 10
    assert held.indices not in (sorted(order[:10]), sorted(order[-10:]))
