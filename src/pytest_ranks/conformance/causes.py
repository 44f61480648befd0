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

from pytest_ranks.conformance.factors import L2, L3, wrong_factors
from pytest_ranks.conformance.findings import Hypothesis
from pytest_ranks.conformance.reading import Reading, counts_by_sample

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import MicroBatch

Pair = tuple[int, int]
Formula = Callable[["MicroBatch", int], float]

L1 = "https://github.com/huggingface/transformers/pull/34191"
S2 = "https://github.com/PrimeIntellect-ai/prime-rl/pull/2562"
PICOTRON = "https://github.com/huggingface/picotron/pull/5"


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

    One layout does not tell formulas apart that differ in gradient accumulation: a formula must explain all of them.
    One that has no say in a layout (a division by 1) predicts the right weights there.

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
        draws = {_sample(reading, pair): times for pair, times in reading.wanted.items()}
        trained = sum(
            draws.values()
        )  # of those that were drawn: a window may hold some samples only
        return {
            pair: times * reading.count / (counts[_sample(reading, pair)] * trained)
            for pair, times in reading.wanted.items()
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
    return [
        Prediction(
            formula=name,
            cause=cause,
            reference=link,
            weights=dict.fromkeys(reading.wanted, factor),
        )
        for name, cause, link, factor, applies in wrong_factors(reading)
        if applies
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Which tokens were where: the letters of the formulas."""

    total: int
    counts: list[int]
    ranks: int
    forwards: Counter[int]
    last: int
    several: bool
    per_rank: Counter[int]

    def inside(self, batch: MicroBatch) -> int:
        """Return the tokens of a micro-batch, at least 1."""
        return max(sum(self.counts[sample] for sample in batch.samples), 1)


def _per_batch(reading: Reading) -> list[Prediction]:
    """Return the formulas whose weights depend on which rank and micro-batch a token was in."""
    batches = reading.batches
    if not batches:
        return []
    counts = counts_by_sample(reading.corpus)
    forwards = Counter(batch.rank for batch in batches)
    per_rank: Counter[int] = Counter()
    for batch in batches:
        per_rank[batch.rank] += sum(counts[sample] for sample in batch.samples)
    at = _Layout(
        total=reading.count,
        counts=counts,
        ranks=len(forwards),
        forwards=forwards,
        last=max(forwards.values()) - 1,
        several=len(batches) > 1,
        per_rank=per_rank,
    )
    table = [*_means(reading, at), *_own_counts(at), *_lost_gradients(at)]
    return [
        Prediction(formula=name, cause=cause, reference=link, weights=_by_batch(reading, formula))
        for name, cause, link, formula, applies in table
        if applies
    ]


Row = tuple[str, str, str, Formula, bool]
"""The formula's name, its cause, a public issue, the formula, and whether it has a say in the layout."""


def _means(reading: Reading, at: _Layout) -> list[Row]:
    """Return means of micro-batches in place of the global batch's."""
    total, ranks = at.total, at.ranks
    mean_of_means = _mean_of_means(reading, at.counts)
    return [
        (
            "mean of means",
            "the loss is the mean of micro-batch means: each micro-batch is divided by its own token count, "
            "then averaged over micro-batches and ranks",
            L1,
            mean_of_means,
            at.several,
        ),
        (
            "sum of means",
            "each micro-batch's mean is added up over gradient accumulation without dividing",
            L2,
            lambda batch, _: total / (at.inside(batch) * ranks),
            at.several,
        ),
        (
            "own count",
            "each micro-batch is divided by its own token count in place of the global batch's",
            L1,
            lambda batch, _: total / at.inside(batch),
            at.several,
        ),
        (
            "mean / N",
            "each micro-batch's loss is a mean already, and is divided by the global token count once more",
            "",
            lambda batch, _: 1 / at.inside(batch),
            True,
        ),
        (
            "mean of means / A",
            "the mean of micro-batch means is divided by gradient_accumulation_steps once more",
            L3,
            lambda batch, sample: mean_of_means(batch, sample) / at.forwards[batch.rank],
            at.several,
        ),
    ]


def _own_counts(at: _Layout) -> list[Row]:
    """Return denominators of one rank or one sample."""
    total, ranks = at.total, at.ranks
    trained = sum(count > 0 for count in at.counts)
    return [
        (
            "rank's count",
            "each rank divides by its own token count: the count is not summed over ranks",
            S2,
            lambda batch, _: total / (max(at.per_rank[batch.rank], 1) * ranks),
            ranks > 1,
        ),
        (
            "rank's count, sum over ranks",
            "each rank divides by its own token count, and gradients are added over ranks",
            S2,
            lambda batch, _: total / max(at.per_rank[batch.rank], 1),
            ranks > 1,
        ),
        (
            "sequences",
            "each sample weighs the same, whatever its length (mean over sequences)",
            "",
            lambda _, sample: total / (max(at.counts[sample], 1) * trained),
            True,
        ),
    ]


def _lost_gradients(at: _Layout) -> list[Row]:
    """Return what is left when gradients of some micro-batches or ranks are lost."""
    ranks = at.ranks
    return [
        (
            "last only",
            "only the last micro-batch of each rank was trained: the gradients of the others are lost",
            "",
            lambda batch, _: float(batch.index == at.forwards[batch.rank] - 1),
            at.last > 0,
        ),
        (
            "first only",
            "only the first micro-batch of each rank was trained",
            "",
            lambda batch, _: float(batch.index == 0),
            at.last > 0,
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
            lambda batch, _: 1.0 if batch.index == at.last else float(ranks * (batch.rank == 0)),
            ranks > 1 and at.last > 0,
        ),
        (
            "first reduced",
            "gradients after the first micro-batch are not reduced: each rank keeps its own",
            PICOTRON,
            lambda batch, _: 1.0 if batch.index == 0 else float(ranks * (batch.rank == 0)),
            ranks > 1 and at.last > 0,
        ),
    ]


def _only_rank(rank: int, factor: float) -> Formula:
    return lambda batch, _: factor if batch.rank == rank else 0.0
