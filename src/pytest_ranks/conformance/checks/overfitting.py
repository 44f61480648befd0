"""Can the trainer learn one sample, and a small batch, by heart, so that the model then says them?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.conformance.check import check
from pytest_ranks.conformance.findings import Finding, Inconclusive
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.conformance.judging import stepped_at
from pytest_ranks.conformance.reading import require_finite
from pytest_ranks.models.corpora import Corpus, unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from pytest_ranks.conformance.runner import Bench, Run
    from pytest_ranks.models.corpora import Sample

FINAL_LOSS = 0.1
"""Nats a token: at 0.1 the right token has a probability of 0.9, so that greedy decoding says it."""

STEPS = 40


def _optimizer(bench: Bench) -> Optimizer:
    if "adamw" in bench.capabilities.optimizers:
        return Optimizer(name="adamw", lr=1e-2)
    return Optimizer(name="sgd", lr=0.5)


def _overfit(bench: Bench, corpus: Corpus) -> Run:
    """Train on one global batch again and again."""
    share = len(corpus.samples) // bench.setting.world_size
    run = bench.train(
        bench.job("llama", corpus, micro_batch=share, max_steps=STEPS, optimizer=_optimizer(bench))
    )
    require_finite(run)
    return run


def _judge(bench: Bench, run: Run, samples: tuple[Sample, ...]) -> None:
    losses = [float(row["loss"]) for row in run.history]
    if len(losses) < 2:
        raise Inconclusive("Trained.history has fewer than two rows")
    first, last = losses[0], losses[-1]
    if not (last < FINAL_LOSS and last < 0.5 * first):
        raise Finding(
            f"after {STEPS} steps the loss MUST be below {FINAL_LOSS} and have fallen by more than half",
            f"it went from {first:.3f} to {last:.3f} (lowest {min(losses):.3f})",
            tolerance=f"{FINAL_LOSS} nats a token",
            cause=_cause(run, first, last),
            reference="https://github.com/pytorch/pytorch/issues/149205",
            where=stepped_at(run),
            run=str(run.folder),
        )
    model = _load(bench, run)
    for index, sample in enumerate(samples):
        said = _greedy(model, sample)
        wanted = sample["input_ids"]
        if said != wanted:
            place = next(
                i for i, pair in enumerate(zip(said, wanted, strict=True)) if pair[0] != pair[1]
            )
            raise Finding(
                "greedy decoding MUST reproduce what was learned by heart",
                f"sample {index} differs from offset {place} on: said {said[place : place + 4]}, "
                f"trained {wanted[place : place + 4]} (reported loss {last:.3f})",
                cause=_wrong_words(model, samples, said[place], wanted[place + 1 :]),
                reference="https://github.com/huggingface/transformers/issues/47394",
                where=stepped_at(run),
                run=str(run.folder),
            )


def _cause(run: Run, first: float, last: float) -> str:
    wanted = run.job.optimizer.lr
    for seen in run.observed:
        for index, step in enumerate(seen.steps):
            rates = [float(str(group.numbers.get("lr", wanted))) for group in step.groups]
            if any(abs(rate - wanted) > 1e-6 * wanted for rate in rates):
                return (
                    f"the learning rate is {rates[0]:g} at step {index + 1}, the job's is {wanted:g} throughout: "
                    "the schedule is moved on too often, or ends too early"
                )
    if abs(last - first) < 1e-3:
        return "the optimizer does not update the model that is trained"
    return "targets are inconsistent, gradients are wrong, or the optimizer's state is lost between steps"


def _wrong_words(model: Any, samples: tuple[Sample, ...], said: int, later: list[int]) -> str:
    """Return why a model whose loss is low says something else."""
    if later[:1] == [said]:
        return "targets are shifted twice: the model says the token after the next"
    if any(_greedy(model, sample) == sample["input_ids"] for sample in samples):
        return "some samples of the batch are not in the loss, while others are"
    return "the loss that is reported is not that of the model that is saved"


def _load(bench: Bench, run: Run) -> Any:
    model = bench.job("llama", Corpus(samples=(), vocab_size=LEDGER_VOCAB)).build_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(run.parameters[name])
    return model.eval()


def _greedy(model: Any, sample: Sample) -> list[int]:
    """Say the sample from its first trained token on, one token at a time."""
    ids = sample["input_ids"]
    start = next((place for place, label in enumerate(sample["labels"]) if label != -100), len(ids))
    said = ids[: max(start, 1)]
    with torch.no_grad():
        while len(said) < len(ids):
            logits = model(input_ids=torch.tensor([said]), use_cache=False).logits
            said = [*said, int(logits[0, -1].argmax())]
    return said


@check(worlds=(1, 2))
def check_single_sample(bench: Bench) -> None:
    """Train on copies of one sample (one a rank).

    Claim: The loss MUST fall below 0.1 and by more than half, and greedy decoding MUST then
    reproduce the sample.

    Why it matters: The oldest test of all: a trainer that cannot learn one sample by heart learns
    nothing else.

    Likely causes: An optimizer on parameters from before sharding; shifted targets; a scheduler
    that ends too early.

    Reference: https://github.com/pytorch/pytorch/issues/149205
    """
    one = unique_token_corpus([24], [4], vocab_size=LEDGER_VOCAB).samples
    corpus = Corpus(samples=one * bench.setting.world_size, vocab_size=LEDGER_VOCAB)
    _judge(bench, _overfit(bench, corpus), one)


@check(worlds=(1, 2))
def check_small_batch(bench: Bench) -> None:
    """Train on four different samples.

    Claim: The loss of a small batch MUST fall below 0.1 and by more than half, and greedy decoding
    MUST reproduce each sample.

    Why it matters: Samples that take turns, or overwrite each other, show only with more than one.

    Likely causes: Gradients of some samples lost; labels of one sample used for another.

    Reference: https://github.com/pytorch/pytorch/issues/149205
    """
    corpus = unique_token_corpus([9, 14, 6, 18], [1, 3, 2, 4], vocab_size=LEDGER_VOCAB)
    _judge(bench, _overfit(bench, corpus), corpus.samples)
