"""Comparisons that several suites make: a ledger with the right weights, an update with the oracle's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.causes import expected_weights, weight_hypotheses
from pytest_ranks.conformance.findings import MATCH, Finding, Hypothesis, Inconclusive, diagnose
from pytest_ranks.conformance.inputs import padding_before_tokens
from pytest_ranks.conformance.positions import nothing_trained
from pytest_ranks.conformance.reading import Reading, drawn, micro_batches, read_step
from pytest_ranks.conformance.update_causes import update_hypotheses
from pytest_ranks.models.corpora import unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from pytest_ranks.conformance.runner import Bench, Run
    from pytest_ranks.models.corpora import Corpus

LEDGER_TOLERANCE = 1e-5
"""On weight x N: float32 noise on the ledger is 1e-7, the smallest error of a wrong formula that was tried 2.5e-2."""

UPDATE_TOLERANCE = 1e-5
"""Relative L2 of a float32 update: 8 eps sqrt(layers + 2), eps = 1.2e-7, is 2e-6; measured noise is 5e-7."""

CORPUS = unique_token_corpus(vocab_size=LEDGER_VOCAB)


def ledger_readings(bench: Bench, *, model: str = "ledger") -> Iterator[Reading]:
    """Yield the ledger of one step on eight uneven samples, for up to three layouts of the same global batch."""
    layouts = bench.layouts(len(CORPUS.samples))
    if not layouts:
        raise Inconclusive(
            f"a global batch of {len(CORPUS.samples)} samples cannot be laid out on this world size"
        )
    for micro_batch, accumulation in dict.fromkeys(
        [layouts[0], layouts[len(layouts) // 2], layouts[-1]]
    ):
        job = bench.job(
            model, CORPUS, micro_batch=micro_batch, gradient_accumulation_steps=accumulation
        )
        yield read_step(bench.train(job), CORPUS)


def layout_of(run: Run) -> str:
    """Return the run's batch layout in words."""
    job = run.job
    return f"micro_batch={job.micro_batch}, gradient_accumulation_steps={job.gradient_accumulation_steps}"


def stepped_at(run: Run) -> str:
    """Return file and line where the optimizer step was taken, if a spy saw it."""
    return next((step.where for seen in run.observed for step in seen.steps if step.where), "")


def judge_weights(
    readings: Sequence[Reading], weighting: str, *, tolerance: float = LEDGER_TOLERANCE
) -> None:
    """Compare the weights of ledgers with those that the declared weighting gives.

    Args:
        readings: the ledger of one global batch in one or several layouts; all of them name the cause.
        weighting: as declared.
        tolerance: on weight x N.

    Raises:
        Finding: with the weights that were read and the formula that they match.
        Inconclusive: when the declared weighting cannot be predicted.
    """
    for reading in readings:
        expected = expected_weights(reading, weighting)
        if expected is None:
            raise Inconclusive(
                f"weighting={weighting!r} depends on the micro-batches, which no spy saw"
            )
        found = reading.scaled()
        pairs = [
            pair
            for pair in found
            if abs(found[pair] - expected[pair]) > tolerance * max(1.0, expected[pair])
        ]
        if not pairs:
            continue
        cause, reference = diagnose(weight_hypotheses(readings))
        declared = (
            ""
            if weighting == "token"
            else f" (split-dependent by declaration: weighting={weighting!r})"
        )
        raise Finding(
            f"every loss-counted token MUST weigh 1/N{declared}",
            f"{weights_in_words(reading)}, on {len(pairs)} of {len(found)} positions, with {layout_of(reading.run)}, "
            f"N = {reading.count}",
            tolerance=f"{tolerance:g} on weight x N (float32 noise is 1e-7)",
            cause=cause,
            reference=reference,
            where=stepped_at(reading.run),
            run=str(reading.run.folder),
        )


def window_weights(
    run: Run, corpus: Corpus, ledger: Tensor, *, step: int, of: Iterable[int], weighting: str
) -> list[float]:
    """Return what each target of some samples weighs after a step that trained them, over what it must weigh.

    Args:
        run: a run of the ledger.
        corpus: its samples.
        ledger: the weights, where no other step trained these samples.
        step: the step, whose samples share the weight.
        of: samples of that step.
        weighting: as declared.

    Raises:
        Inconclusive: when the declared weighting cannot be predicted.
    """
    batches = micro_batches(run, corpus, step=step)
    reading = Reading(
        run=run,
        corpus=corpus,
        weights=ledger,
        wanted=corpus.targets(drawn(batches)),
        batches=batches,
    )
    expected = expected_weights(reading, weighting)
    if expected is None:
        raise Inconclusive(
            f"weighting={weighting!r} depends on the micro-batches, which no spy saw"
        )
    found = reading.scaled()
    return [found[pair] / expected[pair] for pair in corpus.targets(of)]


def weights_in_words(reading: Reading) -> str:
    """Return the weights times N as a text: one number when they are equal, else by rank and micro-batch."""
    found = reading.scaled()
    low, high = min(found.values()), max(found.values())
    if high - low <= 1e-4 * max(abs(high), 1e-12):
        return f"weight x N is {high:.4f}"
    by_sample = {reading.sample_of(pair): value for pair, value in found.items()}
    parts = []
    for batch in reading.batches[:4]:
        values = [by_sample[sample] for sample in batch.samples if sample in by_sample]
        if values:
            each = (
                f"{min(values):.4f}"
                if max(values) - min(values) < 1e-4
                else f"{min(values):.4f}..{max(values):.4f}"
            )
            parts.append(f"rank {batch.rank} micro-batch {batch.index}: {each}")
    return (
        f"weight x N runs from {low:.4f} to {high:.4f} ({'; '.join(parts)})"
        if parts
        else f"weight x N runs from {low:.4f} to {high:.4f}"
    )


def judge_update(
    bench: Bench,
    run: Run,
    update: oracle.Weights,
    wanted: oracle.Weights,
    *,
    rule: str,
    corpus: Corpus = CORPUS,
    tolerance: float = UPDATE_TOLERANCE,
) -> None:
    """Compare an update with the one that it should be.

    Raises:
        Finding: with the factor between them, and the tensor that is furthest off.
    """
    error = oracle.relative_error(update, wanted)
    if error <= tolerance:
        return
    factor, rest = oracle.best_factor(update, wanted)
    name, off = oracle.worst_tensor(update, wanted)
    cause, reference = explain_update(bench, run, update, corpus=corpus)
    raise Finding(
        rule,
        f"relative error {error:.1e}; update = {factor:.4f} x the oracle's + {rest:.1e}; "
        f"furthest off: {name} by {off:.1e}; with {layout_of(run)}",
        tolerance=f"{tolerance:g} relative L2 (measured float32 noise is 5e-7)",
        cause=cause,
        reference=reference,
        where=stepped_at(run),
        run=str(run.folder),
    )


def explain_update(
    bench: Bench, run: Run, update: oracle.Weights, *, corpus: Corpus = CORPUS
) -> tuple[str, str]:
    """Return the formula that predicts a wrong update on `CORPUS`, and its public issue."""
    if not any(value.any() for value in update.values()):
        return nothing_trained(run)
    attended = padding_before_tokens(run, corpus)
    if attended:
        return attended, "https://github.com/axolotl-ai-cloud/axolotl/pull/2227"
    hypotheses = update_hypotheses(run, corpus, bench.materials, update)
    if min(entry.error for entry in hypotheses) > MATCH:
        wanted, _ = oracle.gradient(
            bench.materials.initial("llama"), bench.materials.config(), corpus.samples
        )
        factor, rest = oracle.best_factor(update, wanted)
        hypotheses.append(
            Hypothesis(
                cause=f"every tensor's update is {factor:.4f} x what it should be", error=rest
            )
        )
    return diagnose(hypotheses)
