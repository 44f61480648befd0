"""Why positions were trained that must not be, or were not though they must: what each known bug does to the set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.models.corpora import EOS_ID, IGNORE

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import Reading
    from pytest_ranks.conformance.runner import Run

Pair = tuple[int, int]


def explain_positions(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str]:
    """Return the likely cause of pairs that were not trained though they must be, or were though they must not."""
    tests = (
        *(_nothing, _shifted, _unshifted, _boundaries, _padding, _end_token),
        *(_prompts, _misplaced_prompts, _whole_samples),
    )
    for test in tests:
        cause = test(reading, missing, extra)
        if cause:
            return cause
    return "none of the known causes matches", ""


def _nothing(reading: Reading, missing: list[Pair], extra: list[Pair]) -> tuple[str, str] | None:
    if extra or len(missing) != len(reading.wanted):
        return None
    return nothing_trained(reading.run)


def nothing_trained(run: Run) -> tuple[str, str]:
    """Return the likely cause of a run that left every parameter as it was."""
    steps = [step for seen in run.observed for step in seen.steps]
    if steps and not any(step.parameters for step in steps):
        return (
            "no parameter of the optimizer has a gradient: backward is never called, or the optimizer was built on "
            "other parameters, such as those from before sharding",
            "https://github.com/pytorch/pytorch/issues/149205",
        )
    if steps and not any(step.grad_norm for step in steps):
        return (
            "every gradient is zero: every label is masked (-100)",
            "https://github.com/huggingface/trl/pull/4201",
        )
    return "gradients are there, but the parameters that are returned did not move", ""


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


def _misplaced_prompts(
    reading: Reading, missing: list[Pair], extra: list[Pair]
) -> tuple[str, str] | None:
    packed = reading.run.job.max_tokens_per_rank or reading.run.job.pack_length
    if not (packed and missing and extra):
        return None
    if all(reading.is_next(pair) for pair in extra):
        return (
            "prompts are masked in the wrong places of packed rows: their ranges do not start where their documents do",
            "https://github.com/OpenRLHF/OpenRLHF/pull/781",
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
