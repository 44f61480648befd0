"""Factors that scale every token of a global batch alike: world sizes, accumulation, denominators, loss scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.models.corpora import IGNORE

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import Reading

L2 = "https://github.com/huggingface/transformers/issues/35663"
L3 = "https://github.com/huggingface/transformers/issues/40052"
L8 = "https://github.com/verl-project/verl/pull/3332"
S1 = "https://github.com/meta-pytorch/torchtune/pull/2172"
S3 = "https://github.com/huggingface/transformers/issues/39648"

Factor = tuple[str, str, str, float, bool]
"""The formula's name, its cause, a public issue, the factor on every token, and whether it has a say here."""


def wrong_factors(reading: Reading) -> list[Factor]:
    """Return every known factor; where two are equal, the more specific one comes first."""
    return [*_ranks_and_steps(reading), *_counts(reading), *_powers()]


def _ranks_and_steps(reading: Reading) -> list[Factor]:
    """Return factors of ranks and micro-batches too many or too few."""
    job = reading.run.job
    ranks, steps = job.world_size, job.gradient_accumulation_steps
    return [
        (
            "sum / R",
            f"gradients are averaged over the {ranks} ranks and the loss is not multiplied by world_size: "
            f"every weight is 1/{ranks} of the oracle's",
            S1,
            1 / ranks,
            ranks > 1,
        ),
        (
            "x R",
            f"the loss is multiplied by world_size ({ranks}) once too often, or the token count is averaged over ranks",
            S3,
            float(ranks),
            ranks > 1,
        ),
        (
            "/ A",
            f"the loss is divided by gradient_accumulation_steps ({steps}) once too often",
            L3,
            1 / steps,
            steps > 1,
        ),
        (
            "x A",
            f"loss and gradients are multiplied by gradient_accumulation_steps ({steps})",
            L2,
            float(steps),
            steps > 1,
        ),
    ]


def _counts(reading: Reading) -> list[Factor]:
    """Return denominators that count something else than the targets, or nothing."""
    ranks, total = reading.run.job.world_size, reading.count
    samples = reading.corpus.samples
    unshifted = sum(label != IGNORE for sample in samples for label in sample["labels"])
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    fed = sum(batch.tokens for batch in reading.batches)
    whole = f"the denominator counts all {tokens} tokens, prompts included, in place of {total}"
    mean = f"the loss is a sum, averaged over the {ranks} ranks"
    return [
        (
            "unshifted count",
            f"the denominator counts {unshifted - total} first tokens that the causal shift drops: "
            f"{unshifted} in place of {total}",
            "",
            total / unshifted,
            unshifted != total,
        ),
        ("count of all tokens", whole, "", total / tokens, True),
        (
            "count of all positions",
            f"the denominator counts all {fed} positions fed, padding included",
            "",
            total / fed if fed else 0.0,
            fed > 0,
        ),
        (
            "sum",
            "the loss is a sum: it is not divided by the number of tokens",
            L8,
            float(total),
            True,
        ),
        ("sum, mean over ranks", mean, L8, total / ranks, ranks > 1),
    ]


def _powers() -> list[Factor]:
    """Return the loss scales of float16, and no training at all."""
    return [
        *(
            (
                f"loss scale {word} 2^{power}",
                f"gradients are {word} the loss scale of {2**power} that mixed precision in float16 uses",
                "https://github.com/deepspeedai/DeepSpeed/pull/7839",
                2.0 ** (power * sign),
                True,
            )
            for power in range(10, 17)
            for sign, word in ((-1, "divided by"), (1, "still multiplied by"))
        ),
        ("nothing", "nothing was trained: every weight is 0", "", 0.0, True),
    ]
