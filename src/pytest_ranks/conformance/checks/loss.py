"""Is every token that should be trained trained, on the right target, with the right weight?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.findings import Finding, Inconclusive, NotApplicable
from pytest_ranks.conformance.judging import (
    CORPUS,
    LEDGER_TOLERANCE,
    judge_update,
    judge_weights,
    layout_of,
    ledger_readings,
    stepped_at,
    window_weights,
)
from pytest_ranks.conformance.positions import explain_positions
from pytest_ranks.conformance.reading import PRESENT, drawn, micro_batches, require_finite
from pytest_ranks.models.corpora import NULL_ID, counted_targets, unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB, read_ledger

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.conformance.reading import Reading
    from pytest_ranks.conformance.runner import Bench, Run
    from pytest_ranks.models.corpora import Corpus


@check(requires=["label_masks"])
def check_trained_positions(bench: Bench) -> None:
    """Read from the parameters which positions were trained.

    Claim: The set of trained positions MUST be the positions whose next label is not -100: no
    prompt, no padding, no token across documents, and none left out.

    Why it matters: A trainer that masks the end-of-sequence token never learns to stop; one that
    trains on prompts or padding learns something nobody asked for. The loss falls all the same.

    Likely causes: Padding masked by id where pad equals eos; labels rebuilt from ids; a double
    shift; dropped micro-batches.

    Reference: https://github.com/huggingface/transformers/issues/23530
    """
    for reading in ledger_readings(bench):
        trained = reading.trained()
        wanted_tokens = {token for token, _ in reading.wanted}
        trained_tokens = {token for token, _ in trained}
        missing = [pair for pair in reading.wanted if pair[0] not in trained_tokens]
        extra = [pair for pair in trained if pair[0] not in wanted_tokens]
        if missing or extra:
            _raise_positions(reading, missing, extra)


def _raise_positions(
    reading: Reading, missing: list[tuple[int, int]], extra: list[tuple[int, int]]
) -> None:
    all_missing = [pair for pair in reading.wanted if pair not in reading.trained()]
    all_extra = [pair for pair in reading.trained() if pair not in reading.wanted]
    cause, reference = explain_positions(reading, all_missing, all_extra)
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of {len(reading.wanted)} positions were not trained ({reading.describe(missing)})"
        )
    if extra:
        parts.append(
            f"{len(extra)} positions were trained that must not be ({reading.describe(extra)})"
        )
    raise Finding(
        "the trained positions MUST be those whose next label is not -100",
        f"{'; '.join(parts)}, with {layout_of(reading.run)}",
        cause=cause,
        reference=reference,
        where=stepped_at(reading.run),
        run=str(reading.run.folder),
    )


@check()
def check_targets(bench: Bench) -> None:
    """Read from the parameters on which target each position was trained.

    Claim: The target of every trained position MUST be the label of the next token.

    Why it matters: A double shift trains each token on the token after the next. The loss falls;
    the model is useless.

    Likely causes: Labels shifted in the collator and again in the model; targets not shifted;
    boundaries between packed documents.

    Reference: https://github.com/huggingface/transformers/issues/47394
    """
    for reading in ledger_readings(bench):
        if not reading.trained():
            raise Inconclusive("nothing was trained, so there is no target to judge")
        wanted_tokens = {token for token, _ in reading.wanted}
        wrong = [
            pair
            for pair in reading.trained()
            if pair not in reading.wanted and pair[0] in wanted_tokens
        ]
        if wrong:
            missing = [pair for pair in reading.wanted if pair not in reading.trained()]
            cause, reference = explain_positions(reading, missing, wrong)
            raise Finding(
                "the target of a position MUST be the label of the next token",
                f"{len(wrong)} positions were trained on another target ({reading.describe(wrong)}), "
                f"with {layout_of(reading.run)}",
                cause=cause,
                reference=reference,
                where=stepped_at(reading.run),
                run=str(reading.run.folder),
            )


@check()
def check_token_weights(bench: Bench) -> None:
    """Read from the parameters with which weight each token entered the update.

    Claim: Every loss-counted token of a global batch MUST have the same weight, 1/N, however the
    batch is split into micro-batches and ranks.

    Why it matters: With a mean of micro-batch means, tokens of short samples weigh more; results
    then depend on the batch layout, and published comparisons compare layouts.

    Likely causes: The mean of micro-batch means; a count that is not summed over ranks or
    micro-batches; a factor of world_size or gradient_accumulation_steps too many or too few.

    Reference: https://github.com/huggingface/transformers/pull/34191
    """
    judge_weights(list(ledger_readings(bench)), bench.capabilities.weighting)


@check(requires=["any_forward"])
def check_any_forward(bench: Bench) -> None:
    """Read the ledger of a model whose forward takes no keyword beyond ids, mask and labels.

    Claim: The weight of a token MUST NOT depend on whether the model's forward takes `**kwargs`.

    Why it matters: Trainers that pass the token count through the model fall back to a mean of
    means, silently, for a model that cannot take it.

    Likely causes: `num_items_in_batch` handed to the model only where its signature has `**kwargs`.

    Reference: https://github.com/huggingface/trl/issues/2617
    """
    readings = list(ledger_readings(bench, model="ledger_table"))
    judge_weights(readings, bench.capabilities.weighting)


@check()
def check_split_invariance(bench: Bench) -> None:
    """Compare the update of a small Llama with the float64 oracle's, for each layout of one global batch.

    Claim: The update MUST equal the oracle's, however the global batch is split into micro-batches.

    Why it matters: The ledger sees the loss; this sees everything else on the way: attention masks,
    padding, positions, gradients of every tensor.

    Likely causes: As for `loss.token_weights`; padding that is attended to; positions that count
    padding.

    Reference: https://arxiv.org/abs/2604.23747
    """
    initial = bench.materials.initial("llama")
    wanted, _ = oracle.gradient(
        initial, bench.materials.config(), CORPUS.samples, weighting=_sequence_or_token(bench)
    )
    layouts = bench.layouts(len(CORPUS.samples))
    for micro_batch, accumulation in dict.fromkeys([layouts[0], layouts[-1]]):
        job = bench.job(
            "llama", CORPUS, micro_batch=micro_batch, gradient_accumulation_steps=accumulation
        )
        run = bench.train(job)
        require_finite(run)
        update = {
            name: -value for name, value in oracle.difference(run.parameters, initial).items()
        }
        judge_update(bench, run, update, wanted, rule="the update MUST equal the float64 oracle's")


def _sequence_or_token(bench: Bench) -> str:
    weighting = bench.capabilities.weighting
    if weighting == "micro_batch":
        raise NotApplicable("weighting='micro_batch' is split-dependent by declaration")
    return weighting


@check(requires=[SPIED, "ragged"])
def check_padding_is_inert(bench: Bench) -> None:
    """Train twice, with another padding id the second time.

    Claim: The padding id MUST NOT change the update, bit for bit.

    Why it matters: Where it does, padding is attended to or trained on, and results depend on how
    samples are batched.

    Likely causes: No attention mask for padded rows; a mask made by comparing ids with the padding
    id.

    Reference: https://github.com/axolotl-ai-cloud/axolotl/pull/2227
    """
    micro_batch, accumulation = bench.layouts(len(CORPUS.samples))[0]
    if micro_batch < 2:
        raise Inconclusive("one sample a micro-batch needs no padding")
    runs = [
        bench.train(
            bench.job(
                "llama",
                CORPUS,
                micro_batch=micro_batch,
                gradient_accumulation_steps=accumulation,
                **other,
            )
        )
        for other in ({}, {"pad_token_id": NULL_ID})
    ]
    for run in runs:
        require_finite(run)
    _padding_was_changed(runs)
    first, second = (run.parameters for run in runs)
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    if moved:
        worst = max(moved, key=lambda name: float((first[name] - second[name]).abs().max()))
        most = float((first[worst] - second[worst]).abs().max())
        raise Finding(
            "the padding id MUST NOT change the update",
            f"{len(moved)} of {len(first)} tensors differ, most {worst} by {most:.1e}",
            cause="padding is attended to, or is in the loss",
            reference="https://github.com/axolotl-ai-cloud/axolotl/pull/2227",
            where=stepped_at(runs[0]),
            run=str(runs[1].folder),
        )


def _padding_was_changed(runs: list[Run]) -> None:
    """Make sure that the two runs fed the model two padding ids, and trained.

    Raises:
        NotApplicable: no row was padded.
        Inconclusive: the padding id did not reach the model, or nothing was trained.
    """
    fed = [
        [row for seen in run.observed for f in seen.training_forwards() for row in f.input_ids]
        for run in runs
    ]
    places = CORPUS.positions()  # of all ids but each sample's one end of sequence
    if all(sum(token not in places for token in row) <= 1 for row in fed[0]):
        raise NotApplicable("no row was padded")
    if sorted(fed[0]) == sorted(fed[1]):
        raise Inconclusive("job.pad_token_id is not the id that rows were padded with")
    if not any(step.grad_norm for seen in runs[0].observed for step in seen.steps):
        raise Inconclusive("every gradient was zero, so no update can differ")


@check(requires=[SPIED], worlds=(1, 2))
def check_partial_window(bench: Bench) -> None:
    """Train an epoch whose last global batch is not full.

    Claim: A short last window MUST be divided by its own token count, and its samples MUST weigh
    like any others.

    Why it matters: Divided by the full number of micro-batches, the last samples of every epoch
    count less.

    Likely causes: The loss is divided by gradient_accumulation_steps whatever the window holds; a
    step on every micro-batch after the end of the loader.

    Reference: https://github.com/Lightning-AI/pytorch-lightning/issues/19987
    """
    if bench.capabilities.tail in ("drop", "carry"):
        raise NotApplicable(
            f"tail={bench.capabilities.tail!r}: a declared policy under which no short window is trained"
        )
    world = bench.setting.world_size
    accumulation = 2 if bench.capabilities.gradient_accumulation else 1
    full = 2 * accumulation * world
    # One process: three samples are left, in two micro-batches. Ranks: one is left, so that a rank has none.
    left = full // 2 + 1 if world == 1 else 1
    lengths = [5, 9, 3, 12, 7, 4, 15, 6, 8, 5, 11][: full + left]
    corpus = unique_token_corpus(
        lengths, [0, 2, 0, 3, 1, 0, 5, 0, 2, 1, 4][: len(lengths)], vocab_size=LEDGER_VOCAB
    )
    job = bench.job(
        "ledger",
        corpus,
        micro_batch=2,
        gradient_accumulation_steps=accumulation,
        max_steps=None,
        epochs=1,
    )
    run = bench.train(job)
    require_finite(run)
    batches = micro_batches(run, corpus)
    steps = {step: drawn(batches, step=step) for step in sorted({batch.step for batch in batches})}
    if len(steps) != 2:
        raise Finding(
            "an epoch MUST take one step for each global batch, and one for what is left",
            f"{len(corpus.samples)} samples in global batches of {full} took {len(steps)} steps, expected 2",
            cause="the optimizer steps on every micro-batch"
            if len(steps) > 2
            else "the samples left over are never trained",
            reference="https://github.com/huggingface/accelerate/issues/1847",
            where=stepped_at(run),
            run=str(run.folder),
        )
    _judge_last_window(run, corpus, steps, bench.capabilities.weighting)


def _judge_last_window(
    run: Run, corpus: Corpus, steps: dict[int, list[int]], weighting: str
) -> None:
    if weighting == "micro_batch":
        raise NotApplicable("weighting='micro_batch' is split-dependent by declaration")
    ledger = read_ledger(run.parameters, lr=run.job.optimizer.lr)
    _nothing_else_was_trained(run, corpus, ledger)
    what = "weight x N" if weighting == "token" else f"weight over that of weighting={weighting!r}"
    everywhere = [sample for samples in steps.values() for sample in samples]
    for step, samples in steps.items():
        # A sample that an earlier step trained too is no clean reading: its logits were not zero any more.
        once = [
            sample
            for sample in set(samples)
            if everywhere.count(sample) == samples.count(sample) == 1
        ]
        scaled = window_weights(run, corpus, ledger, step=step, of=once, weighting=weighting)
        off = [value for value in scaled if abs(value - 1) > LEDGER_TOLERANCE]
        if off:
            share = len(samples) / run.job.global_batch
            cause = (
                "the loss is divided as if the window were full"
                if step == max(steps) and abs(off[0] - share) < 0.2 and max(off) - min(off) < 1e-4
                else "the short window is not divided by its own token count"
            )
            raise Finding(
                "each window MUST be divided by its own token count",
                f"{what} runs from {min(scaled):.4f} to {max(scaled):.4f} in step {step + 1} "
                f"({len(samples)} samples in place of {run.job.global_batch})",
                tolerance=f"{LEDGER_TOLERANCE:g} on {what}",
                cause=cause,
                reference="https://github.com/Lightning-AI/pytorch-lightning/issues/19987",
                where=stepped_at(run),
                run=str(run.folder),
            )


def _nothing_else_was_trained(run: Run, corpus: Corpus, ledger: Tensor) -> None:
    wanted = corpus.targets()
    size = sum(counted_targets(sample) for sample in corpus.samples)
    trained = ((ledger * size).abs() > PRESENT).nonzero().tolist()
    extra = [(token, target) for token, target in trained if (token, target) not in wanted]
    if extra:
        idle = [
            seen.rank
            for seen in run.observed
            for forward in seen.training_forwards()
            if not any(token in corpus.positions() for row in forward.input_ids for token in row)
        ]
        raise Finding(
            "a short window MUST train its own samples and nothing else",
            f"{len(extra)} targets were trained that no sample has: "
            + ", ".join(f"id {token} -> id {target}" for token, target in extra[:4]),
            cause=f"rank {idle[0]} had no sample left and trained on a dummy in its place"
            if idle
            else "padding or a dummy sample is in the loss",
            reference="https://github.com/axolotl-ai-cloud/axolotl/pull/461",
            where=stepped_at(run),
            run=str(run.folder),
        )
