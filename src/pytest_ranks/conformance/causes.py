"""The table of hypotheses: each known wrong formula with its exact prediction of every token's weight.

A weight is given times N, the number of loss-counted tokens of the global batch, so that the right answer is 1. Letters:
n_rm counted tokens of micro-batch m on rank r, n_r of rank r, A micro-batches a rank, R ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_ranks.conformance.findings import Hypothesis
from pytest_ranks.conformance.reading import PRESENT, Reading, counts_by_sample
from pytest_ranks.models.corpora import EOS_ID, IGNORE

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
S3 = "https://github.com/huggingface/transformers/issues/39648"


def weight_hypotheses(reading: Reading) -> list[Hypothesis]:
    """Return every known formula with how far its prediction is from the weights that were read."""
    found = reading.scaled()
    size = sum(value * value for value in found.values()) ** 0.5 or 1.0
    hypotheses = []
    for cause, reference, predicted in predictions(reading):
        missed = sum((found[pair] - predicted.get(pair, 0.0)) ** 2 for pair in found) ** 0.5
        hypotheses.append(Hypothesis(cause=cause, error=missed / size, reference=reference))
    return hypotheses


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


def predictions(reading: Reading) -> list[tuple[str, str, dict[Pair, float]]]:
    """Return every known formula: its cause, a public issue, and weight x N of each pair."""
    return [*_uniform(reading), *_per_batch(reading)]


def _uniform(reading: Reading) -> list[tuple[str, str, dict[Pair, float]]]:
    """Return the formulas that scale every token alike."""
    job, total = reading.run.job, reading.count
    ranks, steps = job.world_size, job.gradient_accumulation_steps
    samples = reading.corpus.samples
    unshifted = sum(label != IGNORE for sample in samples for label in sample["labels"])
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    fed = sum(batch.tokens for batch in reading.batches)
    table = [
        (
            f"gradients are averaged over the {ranks} ranks and the loss is not multiplied by world_size: "
            f"every weight is 1/{ranks} of the oracle's",
            S1,
            1 / ranks,
            ranks > 1,
        ),
        (
            f"the loss is multiplied by world_size ({ranks}) once too often",
            S3,
            float(ranks),
            ranks > 1,
        ),
        (
            f"the loss is divided by gradient_accumulation_steps ({steps}) once too often",
            L3,
            1 / steps,
            steps > 1,
        ),
        (
            f"loss and gradients are multiplied by gradient_accumulation_steps ({steps})",
            L2,
            float(steps),
            steps > 1,
        ),
        (
            f"the denominator counts {unshifted - total} first tokens that the causal shift drops: "
            f"{unshifted} in place of {total}",
            "",
            total / unshifted,
            unshifted != total,
        ),
        (
            f"the denominator counts all {tokens} tokens, prompts included, in place of {total}",
            "",
            total / tokens,
            True,
        ),
        (
            f"the denominator counts all {fed} positions fed, padding included",
            "",
            total / fed if fed else 0.0,
            fed > 0,
        ),
        ("the loss is a sum: it is not divided by the number of tokens", L8, float(total), True),
        (f"the loss is a sum, averaged over the {ranks} ranks", L8, total / ranks, ranks > 1),
        ("nothing was trained: every weight is 0", "", 0.0, True),
    ]
    pairs = reading.wanted
    return [
        (cause, link, dict.fromkeys(pairs, factor))
        for cause, link, factor, applies in table
        if applies
    ]


def _per_batch(reading: Reading) -> list[tuple[str, str, dict[Pair, float]]]:
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

    table: list[tuple[str, str, Formula, bool]] = [
        (
            "the loss is the mean of micro-batch means: each micro-batch is divided by its own token count, "
            "then averaged over micro-batches and ranks",
            L1,
            mean_of_means,
            len(batches) > 1,
        ),
        (
            "each micro-batch's mean is added up over gradient accumulation without dividing",
            L2,
            lambda batch, _: total / (inside(batch) * ranks),
            last > 0,
        ),
        (
            "the mean of micro-batch means is divided by gradient_accumulation_steps once more",
            L3,
            lambda batch, sample: mean_of_means(batch, sample) / forwards[batch.rank],
            last > 0,
        ),
        (
            "each rank divides by its own token count: the count is not summed over ranks",
            S2,
            lambda batch, _: total / (max(per_rank[batch.rank], 1) * ranks),
            ranks > 1,
        ),
        (
            "each rank divides by its own token count, and gradients are added over ranks",
            S2,
            lambda batch, _: total / max(per_rank[batch.rank], 1),
            ranks > 1,
        ),
        (
            "each sample weighs the same, whatever its length (mean over sequences)",
            "",
            lambda _, sample: total / (max(counts[sample], 1) * trained),
            True,
        ),
        (
            "only the last micro-batch of each rank was trained: the gradients of the others are lost",
            "",
            lambda batch, _: float(batch.index == forwards[batch.rank] - 1),
            last > 0,
        ),
        (
            "only the first micro-batch of each rank was trained",
            "",
            lambda batch, _: float(batch.index == 0),
            last > 0,
        ),
        *(
            (
                f"only rank {rank}'s gradients were applied: gradients are not reduced over ranks",
                "https://github.com/huggingface/picotron/pull/5",
                _only_rank(rank, factor),
                ranks > 1,
            )
            for rank in range(ranks)
            for factor in (1.0, float(ranks))
        ),
        (
            "gradients before the last micro-batch are not reduced: each rank keeps its own",
            "https://github.com/huggingface/picotron/pull/5",
            lambda batch, _: (
                1.0 if batch.index == last else (float(ranks) if batch.rank == 0 else 0.0)
            ),
            ranks > 1 and last > 0,
        ),
    ]
    return [
        (cause, link, _by_batch(reading, formula))
        for cause, link, formula, applies in table
        if applies
    ]


def _only_rank(rank: int, factor: float) -> Formula:
    return lambda batch, _: factor if batch.rank == rank else 0.0


def explain_positions(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str]:
    """Return the likely cause of pairs that were not trained though they must be, or were though they must not."""
    for test in (_shifted, _unshifted, _boundaries, _padding, _end_token, _prompts, _whole_samples):
        cause = test(reading, missing, extra)
        if cause:
            return cause
    return "none of the known causes matches", ""


def _shifted(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    places = reading.corpus.positions()
    by_place = {(place.sample, place.offset): token for token, place in places.items()}
    jumps = 0
    for token, target in extra:
        place = places.get(token)
        sample = reading.corpus.samples[place.sample]["input_ids"] if place else []
        jumps += (
            place is not None
            and place.offset + 2 < len(sample)
            and sample[place.offset + 2] == target
        )
    if extra and missing and jumps >= 0.8 * len(extra) and by_place:
        return (
            "targets are shifted twice: each token is trained on the token after the next",
            "https://github.com/huggingface/transformers/issues/47394",
        )
    return None


def _unshifted(_: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    if extra and missing and sum(token == target for token, target in extra) >= 0.8 * len(extra):
        return "targets are not shifted: each token is trained to predict itself", ""
    return None


def _boundaries(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    places = reading.corpus.positions()
    starts = {token for token, place in places.items() if place.offset == 0}
    if (
        extra
        and not missing
        and all(token == EOS_ID and target in starts for token, target in extra)
    ):
        return (
            "boundary targets: the last token of a document is trained on the first token of the next one in its row",
            "https://github.com/OpenRLHF/OpenRLHF/pull/781",
        )
    return None


def _padding(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    pad = reading.run.job.pad_token_id
    if extra and not missing and all(target == pad for _, target in extra):
        return (
            "padding positions are in the loss",
            "https://github.com/axolotl-ai-cloud/axolotl/pull/2227",
        )
    return None


def _end_token(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    ends = [pair for pair in reading.wanted if pair[1] == EOS_ID]
    if missing and not extra and sorted(missing) == sorted(ends):
        return (
            "the end-of-sequence token is masked because it is also the padding id: mask padding by length, not by id",
            "https://github.com/huggingface/transformers/issues/23530",
        )
    return None


def _prompts(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    places = reading.corpus.positions()

    def in_prompt(pair: Pair) -> bool:
        place = places.get(pair[0])
        if place is None:
            return False
        labels = reading.corpus.samples[place.sample]["labels"]
        return place.offset + 1 < len(labels) and labels[place.offset + 1] == IGNORE

    if extra and not missing and all(in_prompt(pair) for pair in extra):
        return (
            "prompt tokens are in the loss: labels of -100 are replaced by the ids",
            "https://github.com/MervinPraison/PraisonAI/pull/4358",
        )
    return None


def _whole_samples(
    reading: Reading, missing: list[Pair], extra: list[Pair]
) -> tuple[str, str] | None:
    if extra or not missing:
        return None
    lost = {reading.sample_of(pair) for pair in missing}
    whole = [pair for pair in reading.wanted if reading.sample_of(pair) in lost]
    if len(whole) != len(missing):
        return None
    last = [
        batch for batch in reading.batches if batch.index == max(b.index for b in reading.batches)
    ]
    kept = {sample for batch in last for sample in batch.samples}
    names = ", ".join(
        str(sample) for sample in sorted(sample for sample in lost if sample is not None)
    )
    fed = {sample for batch in reading.batches for sample in batch.samples}
    if lost <= fed and kept and not (lost & kept):
        return (
            f"missing micro-batches: samples {names} went through the model, but only the last micro-batch was trained",
            "",
        )
    if lost <= fed:
        return (
            f"samples {names} went through the model, but their gradients are missing from the update",
            "",
        )
    return f"samples {names} never went through the model: they were dropped", ""


def present(value: float) -> bool:
    """Tell whether a weight x N is training at all."""
    return abs(value) > PRESENT
