"""The table of hypotheses: each known wrong formula with its exact prediction of every token's weight.

A weight is given times N, the number of loss-counted tokens of the global batch, so that the right
answer is 1. Letters: n_rm counted tokens of micro-batch m on rank r, n_r of rank r, A micro-batches
a rank, R ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_ranks.conformance.findings import Hypothesis
from pytest_ranks.conformance.reading import Reading, counts_by_sample
from pytest_ranks.models.corpora import IGNORE

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import MicroBatch

Pair = tuple[int, int]
Formula = Callable[["MicroBatch", int], float]

L1 = "https://github.com/huggingface/transformers/pull/34191"
L2 = "https://github.com/huggingface/transformers/issues/35663"
L3 = "https://github.com/huggingface/transformers/issues/40052"
L8 = "https://github.com/verl-project/verl/pull/3332"
S1 = "https://github.com/meta-pytorch/torchtune/pull/2172"
S2 = "https://github.com/PrimeIntellect-ai/prime-rl/pull/2562"
PICOTRON = "https://github.com/huggingface/picotron/pull/5"
S3 = "https://github.com/huggingface/transformers/issues/39648"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a known wrong formula gives.

    Attributes:
        formula: its name, the same in every layout.
        cause: what the finding says.
        reference: a public issue of the same bug, or empty.
        weights: weight x N of each pair.
    """

    formula: str
    cause: str
    reference: str
    weights: dict[Pair, float]


def weight_hypotheses(readings: Sequence[Reading]) -> list[Hypothesis]:
    """Return every known formula with how far it is, at worst, from the weights that were read.

    One layout does not tell formulas apart that differ in gradient accumulation, so a formula must explain all of them. One
    that has no say in a layout (a division by 1) predicts the right weights there.

    Args:
        readings: the ledger of the same global batch in one or several layouts.
    """
    tables = [{entry.formula: entry for entry in predictions(reading)} for reading in readings]
    names = dict.fromkeys(name for table in tables for name in table)
    hypotheses = []
    for name in names:
        known = [table[name] for table in tables if name in table]
        error = max(
            _missed(reading, table[name].weights if name in table else None)
            for reading, table in zip(readings, tables, strict=True)
        )
        last = known[-1]  # the layout with most accumulation: its numbers say most
        hypotheses.append(Hypothesis(cause=last.cause, error=error, reference=last.reference))
    return hypotheses


def _missed(reading: Reading, predicted: dict[Pair, float] | None) -> float:
    found = reading.scaled()
    right = {pair: float(times) for pair, times in reading.wanted.items()}
    weights = right if predicted is None else predicted
    size = sum(value * value for value in found.values()) ** 0.5 or 1.0
    return float(sum((found[p] - weights.get(p, 0.0)) ** 2 for p in found) ** 0.5 / size)


def expected_weights(reading: Reading, weighting: str) -> dict[Pair, float] | None:
    """Return weight x N of each pair under a declared weighting; None when it depends on forwards nobody saw."""
    if weighting == "token":
        return {pair: float(times) for pair, times in reading.wanted.items()}
    counts = counts_by_sample(reading.corpus)
    if weighting == "sequence":
        trained = sum(count > 0 for count in counts)
        return {
            pair: reading.count / (counts[_sample(reading, pair)] * trained)
            for pair in reading.wanted
        }
    if not reading.batches:
        return None
    return _by_batch(reading, _mean_of_means(reading, counts))


def _sample(reading: Reading, pair: Pair) -> int:
    sample = reading.sample_of(pair)
    if sample is None:
        raise KeyError(pair)
    return sample


def _mean_of_means(reading: Reading, counts: list[int]) -> Formula:
    total = reading.count
    forwards = Counter(batch.rank for batch in reading.batches)
    ranks = len(forwards)

    def formula(batch: MicroBatch, _: int) -> float:
        inside = sum(counts[sample] for sample in batch.samples)
        return total / (inside * forwards[batch.rank] * ranks) if inside else 0.0

    return formula


def _by_batch(reading: Reading, formula: Formula) -> dict[Pair, float]:
    """Apply a formula of (micro-batch, sample) to every wanted pair, adding up over draws."""
    weight: Counter[int] = Counter()
    for batch in reading.batches:
        for sample in batch.samples:
            weight[sample] += formula(batch, sample)  # type: ignore[assignment]
    return {pair: float(weight[_sample(reading, pair)]) for pair in reading.wanted}


def predictions(reading: Reading) -> list[Prediction]:
    """Return every known formula; where two predict the same, the more specific one comes first."""
    return [*_uniform(reading), *_per_batch(reading)]


def _uniform(reading: Reading) -> list[Prediction]:
    """Return the formulas that scale every token alike."""
    job, total = reading.run.job, reading.count
    ranks, steps = job.world_size, job.gradient_accumulation_steps
    samples = reading.corpus.samples
    unshifted = sum(label != IGNORE for sample in samples for label in sample["labels"])
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    fed = sum(batch.tokens for batch in reading.batches)
    table = [
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
        (
            "unshifted count",
            f"the denominator counts {unshifted - total} first tokens that the causal shift drops: "
            f"{unshifted} in place of {total}",
            "",
            total / unshifted,
            unshifted != total,
        ),
        (
            "count of all tokens",
            f"the denominator counts all {tokens} tokens, prompts included, in place of {total}",
            "",
            total / tokens,
            True,
        ),
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
        (
            "sum, mean over ranks",
            f"the loss is a sum, averaged over the {ranks} ranks",
            L8,
            total / ranks,
            ranks > 1,
        ),
        *(
            (
                f"loss scale {power}",
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
    pairs = reading.wanted
    return [
        Prediction(formula=name, cause=cause, reference=link, weights=dict.fromkeys(pairs, factor))
        for name, cause, link, factor, applies in table
        if applies
    ]


def _per_batch(reading: Reading) -> list[Prediction]:
    """Return the formulas whose weights depend on which rank and micro-batch a token was in."""
    batches = reading.batches
    if not batches:
        return []
    counts, total = counts_by_sample(reading.corpus), reading.count
    ranks = len({batch.rank for batch in batches})
    forwards = Counter(batch.rank for batch in batches)
    last = max(forwards.values()) - 1
    per_rank: Counter[int] = Counter()
    for batch in batches:
        per_rank[batch.rank] += sum(counts[sample] for sample in batch.samples)
    trained = sum(count > 0 for count in counts)
    mean_of_means = _mean_of_means(reading, counts)

    def inside(batch: MicroBatch) -> int:
        return max(sum(counts[sample] for sample in batch.samples), 1)

    several = len(batches) > 1
    table: list[tuple[str, str, str, Formula, bool]] = [
        (
            "mean of means",
            "the loss is the mean of micro-batch means: each micro-batch is divided by its own token count, "
            "then averaged over micro-batches and ranks",
            L1,
            mean_of_means,
            several,
        ),
        (
            "sum of means",
            "each micro-batch's mean is added up over gradient accumulation without dividing",
            L2,
            lambda batch, _: total / (inside(batch) * ranks),
            several,
        ),
        (
            "own count",
            "each micro-batch is divided by its own token count in place of the global batch's",
            L1,
            lambda batch, _: total / inside(batch),
            several,
        ),
        (
            "mean / N",
            "each micro-batch's loss is a mean already, and is divided by the global token count once more",
            "",
            lambda batch, _: 1 / inside(batch),
            True,
        ),
        (
            "mean of means / A",
            "the mean of micro-batch means is divided by gradient_accumulation_steps once more",
            L3,
            lambda batch, sample: mean_of_means(batch, sample) / forwards[batch.rank],
            several,
        ),
        (
            "rank's count",
            "each rank divides by its own token count: the count is not summed over ranks",
            S2,
            lambda batch, _: total / (max(per_rank[batch.rank], 1) * ranks),
            ranks > 1,
        ),
        (
            "rank's count, sum over ranks",
            "each rank divides by its own token count, and gradients are added over ranks",
            S2,
            lambda batch, _: total / max(per_rank[batch.rank], 1),
            ranks > 1,
        ),
        (
            "sequences",
            "each sample weighs the same, whatever its length (mean over sequences)",
            "",
            lambda _, sample: total / (max(counts[sample], 1) * trained),
            True,
        ),
        (
            "last only",
            "only the last micro-batch of each rank was trained: the gradients of the others are lost",
            "",
            lambda batch, _: float(batch.index == forwards[batch.rank] - 1),
            last > 0,
        ),
        (
            "first only",
            "only the first micro-batch of each rank was trained",
            "",
            lambda batch, _: float(batch.index == 0),
            last > 0,
        ),
        *(
            (
                f"rank {rank} x {factor}",
                f"only rank {rank}'s gradients were applied: gradients are not reduced over ranks",
                PICOTRON,
                _only_rank(rank, factor),
                ranks > 1,
            )
            for rank in range(ranks)
            for factor in (1.0, float(ranks))
        ),
        (
            "last reduced",
            "gradients before the last micro-batch are not reduced: each rank keeps its own",
            PICOTRON,
            lambda batch, _: 1.0 if batch.index == last else float(ranks * (batch.rank == 0)),
            ranks > 1 and last > 0,
        ),
        (
            "first reduced",
            "gradients after the first micro-batch are not reduced: each rank keeps its own",
            PICOTRON,
            lambda batch, _: 1.0 if batch.index == 0 else float(ranks * (batch.rank == 0)),
            ranks > 1 and last > 0,
        ),
    ]
    return [
        Prediction(formula=name, cause=cause, reference=link, weights=_by_batch(reading, formula))
        for name, cause, link, formula, applies in table
        if applies
    ]


def _only_rank(rank: int, factor: float) -> Formula:
    return lambda batch, _: factor if batch.rank == rank else 0.0
