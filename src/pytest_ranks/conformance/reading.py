"""From a run to numbers: which samples each forward and step held, and with which weight each token was trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pytest_ranks.conformance.findings import Finding, Inconclusive
from pytest_ranks.models.corpora import EOS_ID, Corpus, counted_targets
from pytest_ranks.models.ledger import read_ledger

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.conformance.runner import Run
    from pytest_ranks.observe.records import Forward

PRESENT = 1e-3
"""A weight x N below it is no training: noise is 1e-7, the smallest weight of a wrong formula seen was 0.38."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one training forward.

    Attributes:
        rank: where it ran.
        step: the optimizer step that it belongs to, from 0.
        index: its place among the rank's forwards of that step.
        rows: for each row of the batch the samples in it, in order; a sample appears once a draw.
        tokens: ids in the batch, padding included.
    """

    rank: int
    step: int
    index: int
    rows: tuple[tuple[int, ...], ...]
    tokens: int

    @property
    def samples(self) -> tuple[int, ...]:
        """All samples in it, with multiplicity."""
        return tuple(sample for row in self.rows for sample in row)


def samples_in_row(corpus: Corpus, row: list[int]) -> tuple[int, ...]:
    """Return the samples that a row of ids holds: one for each run of a sample's tokens."""
    places = corpus.positions()
    found: list[int] = []
    offset = -1
    for token in row:
        place = places.get(token)
        if place is None:
            continue
        if not found or found[-1] != place.sample or place.offset <= offset:
            found.append(place.sample)
        offset = place.offset
    return tuple(found)


def micro_batches(run: Run, corpus: Corpus, *, step: int | None = None) -> list[MicroBatch]:
    """Return every training forward of a run with the samples in it, ordered by rank and time."""
    batches = []
    for seen in run.observed:
        counts: Counter[int] = Counter()
        for forward in seen.training_forwards(step):
            batches.append(_micro_batch(seen.rank, forward, counts[forward.step], corpus))
            counts[forward.step] += 1
    return batches


def _micro_batch(rank: int, forward: Forward, index: int, corpus: Corpus) -> MicroBatch:
    return MicroBatch(
        rank=rank,
        step=forward.step,
        index=index,
        rows=tuple(samples_in_row(corpus, row) for row in forward.input_ids),
        tokens=sum(len(row) for row in forward.input_ids),
    )


def drawn(batches: list[MicroBatch], *, step: int | None = None) -> list[int]:
    """Return the samples that were drawn, with multiplicity, over all ranks."""
    return [
        sample
        for batch in batches
        if step is None or batch.step == step
        for sample in batch.samples
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The ledger of one optimizer step on a unique-token corpus.

    Attributes:
        run: the run it was read from.
        corpus: what was to be trained.
        weights: float64 [V, V], row = input token, column = target.
        wanted: (input token, target) -> how often it must be trained.
        batches: the step's forwards; empty when no spy could see them.
    """

    run: Run
    corpus: Corpus
    weights: Tensor
    wanted: dict[tuple[int, int], int]
    batches: list[MicroBatch]

    @property
    def count(self) -> int:
        """N: the number of targets that must be trained."""
        return sum(self.wanted.values())

    def trained(self) -> dict[tuple[int, int], float]:
        """Return weight x N of every pair that was trained."""
        scaled = self.weights * self.count
        pairs = (scaled.abs() > PRESENT).nonzero().tolist()
        return {(token, target): float(scaled[token, target]) for token, target in pairs}

    def scaled(self) -> dict[tuple[int, int], float]:
        """Return weight x N of every pair that must be trained."""
        return {pair: float(self.weights[pair] * self.count) for pair in self.wanted}

    def sample_of(self, pair: tuple[int, int]) -> int | None:
        """Return the sample that a pair's input token belongs to; None for the shared EOS."""
        place = self.corpus.positions().get(pair[0])
        return None if place is None else place.sample

    def is_next(self, pair: tuple[int, int]) -> bool:
        """Tell whether the target is the token that follows in a row: of the same document, or a next one's first."""
        place, to = (self.corpus.positions().get(token) for token in pair)
        if to is None:
            return pair[1] == EOS_ID
        if place is None:
            return pair[0] == EOS_ID and to.offset == 0
        return to.sample == place.sample and to.offset == place.offset + 1

    def describe(self, pairs: list[tuple[int, int]], *, most: int = 4) -> str:
        """Return pairs in words: sample, offset and target."""
        places = self.corpus.positions()
        words = []
        for token, target in pairs[:most]:
            place = places.get(token)
            at = (
                f"sample {place.sample} offset {place.offset}"
                if place
                else ("EOS" if token == EOS_ID else f"id {token}")
            )
            to = places.get(target)
            goal = (
                f"sample {to.sample} offset {to.offset}"
                if to
                else ("EOS" if target == EOS_ID else f"id {target}")
            )
            words.append(f"{at} -> {goal}")
        more = f" and {len(pairs) - most} more" if len(pairs) > most else ""
        return "; ".join(words) + more


def read_step(
    run: Run, corpus: Corpus, *, before: dict[str, Tensor] | None = None, step: int = 0
) -> Reading:
    """Read what one SGD step trained.

    Args:
        run: a run of a ledger model, of one step or (with `before`) of several.
        corpus: its samples.
        before: the parameters before the step, when that was not the first.
        step: which optimizer step, for the forwards that belong to it.

    Raises:
        Finding: when parameters are NaN, infinite or missing.
        Inconclusive: when nothing was trained at all by a run that took no step.
    """
    require_finite(run)
    batches = micro_batches(run, corpus, step=step)
    return Reading(
        run=run,
        corpus=corpus,
        weights=read_ledger(run.parameters, before=before, lr=run.job.optimizer.lr),
        wanted=corpus.targets(),
        batches=batches,
    )


def require_finite(run: Run) -> None:
    """Refuse a run whose parameters are not there or not finite.

    Raises:
        Finding: naming them.
        Inconclusive: when the spies saw no optimizer step.
    """
    if "lm_head.weight" not in run.parameters:
        raise Finding(
            "Trained MUST hold the full parameters by their names in job.model_dir",
            f"no 'lm_head.weight' among {sorted(run.parameters)[:4]}",
            cause="use full_parameters(model), which sees through wrappers",
            run=str(run.folder),
        )
    broken = [name for name, value in run.parameters.items() if not torch.isfinite(value).all()]
    if broken:
        raise Finding(
            "parameters MUST be finite after training",
            f"NaN or infinity in {broken[0]} and {len(broken) - 1} more",
            cause="a micro-batch without any target divides by its own count, 0",
            run=str(run.folder),
        )
    if run.observed and not any(seen.steps for seen in run.observed):
        raise Inconclusive("no torch optimizer took a step that the spies could see")


def counts_by_sample(corpus: Corpus) -> list[int]:
    """Return how many targets of each sample enter the loss."""
    return [counted_targets(sample) for sample in corpus.samples]
