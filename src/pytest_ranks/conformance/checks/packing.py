"""Do documents that share a row stay themselves: all there, apart, counted from zero, trained alike?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.findings import Finding, NotApplicable
from pytest_ranks.conformance.judging import (
    LEDGER_TOLERANCE,
    UPDATE_TOLERANCE,
    judge_update,
    judge_weights,
    stepped_at,
)
from pytest_ranks.conformance.packed import (
    CAPACITY,
    LONG,
    OVERLONG,
    PACKED,
    leak_cause,
    lost_cause,
    packed_job,
    packed_run,
    rows_with_positions,
)
from pytest_ranks.conformance.positions import explain_positions
from pytest_ranks.conformance.reading import (
    counts_by_sample,
    micro_batches,
    read_step,
    require_finite,
)
from pytest_ranks.conformance.replay import flip_test
from pytest_ranks.models.corpora import EOS_ID, Corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import Reading
    from pytest_ranks.conformance.runner import Bench


@check(requires=[SPIED, "packing"])
def check_conserves_tokens(bench: Bench) -> None:
    """Count every (sample, offset) in the rows that went through the model.

    Claim: Each token of each sample MUST be in exactly one row, in order and whole.

    Why it matters: A packer that loses the tail, or truncates to fit, trains on less than it was
    given.

    Likely causes: The last, incomplete bin dropped; samples filtered for one list and taken from
    another; truncation.

    Reference: https://github.com/huggingface/trl/issues/483
    """
    run = packed_run(bench, "ledger")
    places = PACKED.positions()
    fed = Counter(
        token
        for seen in run.observed
        for forward in seen.training_forwards()
        for row in forward.input_ids
        for token in row
        if token in places
    )
    missing = [token for token in places if not fed[token]]
    twice = [token for token, times in fed.items() if times > 1]
    if missing or twice:
        lost = sorted({places[token].sample for token in missing})
        whole = all(
            len(PACKED.samples[s]["input_ids"]) - 1 == sum(places[t].sample == s for t in missing)
            for s in lost
        )
        parts = []
        if missing:
            kind = "samples" if whole else "parts of samples"
            parts.append(f"{len(missing)} tokens never went through the model ({kind} {lost})")
        if twice:
            parts.append(
                f"{len(twice)} tokens did more than once (samples {sorted({places[t].sample for t in twice})})"
            )
        raise Finding(
            "each token of each sample MUST be in exactly one row",
            "; ".join(parts),
            cause=lost_cause(lost, whole=whole, twice=bool(twice)),
            reference="https://github.com/huggingface/trl/issues/483",
            where=stepped_at(run),
            run=str(run.folder),
        )


@check(requires=[SPIED, "packing"])
def check_capacity_is_respected(bench: Bench) -> None:
    """Measure the rows that went through the model.

    Claim: No row (no forward, for packing by step) MUST hold more tokens than the job allows.

    Why it matters: The limit is what fits into memory: a row above it is an out-of-memory error
    hours into a run.

    Likely causes: A limit checked on item counts, on averages, or before the last item is added.

    Reference: https://github.com/verl-project/verl/pull/7553
    """
    run = packed_run(bench, "ledger")
    by_step = bench.capabilities.packing == "step"
    for batch in micro_batches(run, PACKED):
        inside = [
            sum(len(PACKED.samples[sample]["input_ids"]) for sample in row) for row in batch.rows
        ]
        largest = sum(inside) if by_step else max(inside, default=0)
        if largest > CAPACITY:
            raise Finding(
                f"no {'forward' if by_step else 'row'} MUST hold more than {CAPACITY} tokens",
                f"rank {batch.rank} micro-batch {batch.index} holds {largest}: samples {batch.samples}",
                cause="the packer's capacity check lets one sample too many in",
                reference="https://github.com/verl-project/verl/pull/7553",
                run=str(run.folder),
            )


@check(requires=[SPIED, "packing"])
def check_documents_are_isolated(bench: Bench) -> None:
    """Replay the trainer's own packed batches, and change one document in each.

    Claim: Changing one document MUST leave the hidden states of all others exactly as they were.

    Why it matters: Documents that attend to each other learn from what will not be there at
    inference.

    Likely causes: An attention mask of ones given along with position ids; a causal mask without
    document borders; a kernel path that takes more than one row for no packing at all.

    Reference: https://github.com/huggingface/trl/issues/1230
    """
    run = packed_run(bench, "llama")
    for seen in run.observed:
        for index, forward in enumerate(seen.training_forwards()):
            leak = flip_test(run.job, forward, PACKED)
            if leak is not None:
                raise Finding(
                    "changing one document MUST leave all others' hidden states exactly as they were",
                    f"rank {seen.rank} micro-batch {index}: changing sample {leak.flipped} moved sample {leak.moved} "
                    f"by {leak.size:.1e}",
                    cause=leak_cause(forward),
                    reference="https://github.com/OpenRLHF/OpenRLHF/issues/587",
                    run=str(run.folder),
                )


@check(requires=[SPIED, "packing"])
def check_positions_restart(bench: Bench) -> None:
    """Look at the position ids that the model was given.

    Claim: The position of every document's first token MUST be 0, and rise by 1 from there.

    Why it matters: With rotary positions the loss hardly changes when later documents start at 500;
    a model with learned positions, or one used beyond its length, does.

    Likely causes: Positions counted over the row; position ids left to the model, which counts over
    the row.

    Reference: https://github.com/hiyouga/LlamaFactory/pull/7318
    """
    run = packed_run(bench, "ledger")
    places = PACKED.positions()
    for seen in run.observed:
        for index, forward in enumerate(seen.training_forwards()):
            for row, positions in rows_with_positions(forward):
                wrong = [
                    (token, position)
                    for token, position in zip(row, positions, strict=True)
                    if token in places and places[token].offset != position
                ]
                if wrong:
                    token, position = wrong[0]
                    place = places[token]
                    raise Finding(
                        "positions MUST restart at 0 in every document",
                        f"rank {seen.rank} micro-batch {index}: sample {place.sample} offset {place.offset} "
                        f"has position {position}; {len(wrong)} positions are wrong",
                        cause="positions are counted over the whole row",
                        reference="https://github.com/hiyouga/LlamaFactory/pull/7318",
                        run=str(run.folder),
                    )


@check(requires=[SPIED, "packing", "label_masks"])
def check_targets_are_those_without_packing(bench: Bench) -> None:
    """Read the ledger of a packed step.

    Claim: Packing MUST NOT change which targets are trained, nor their weights.

    Why it matters: The end of one document trained on the start of the next teaches nonsense at
    every border; prompt masks shifted by packing train on prompts.

    Likely causes: The first label of each document not masked; ranges of responses added up
    wrongly.

    Reference: https://github.com/OpenRLHF/OpenRLHF/pull/781
    """
    reading = read_step(packed_run(bench, "ledger"), PACKED)
    trained = reading.trained()
    missing = [pair for pair in reading.wanted if pair not in trained]
    extra = [pair for pair in trained if pair not in reading.wanted]
    if missing or extra:
        cause, reference = explain_positions(reading, missing, extra)
        raise Finding(
            "packing MUST NOT change which targets are trained",
            f"{len(missing)} missing ({reading.describe(missing)}), {len(extra)} extra ({reading.describe(extra)})",
            cause=cause,
            reference=reference,
            where=stepped_at(reading.run),
            run=str(reading.run.folder),
        )
    judge_weights([reading], bench.capabilities.weighting)


@check(requires=[SPIED, "packing"])
def check_update_is_that_without_packing(bench: Bench) -> None:
    """Compare the update of a packed step of a small Llama with the oracle's, which packs nothing.

    Claim: The packed update MUST equal the update of the same samples one by one.

    Why it matters: It is the sum of all that can go wrong with packing: masks, positions, labels,
    counts.

    Likely causes: As for the other claims of this suite.

    Reference: https://github.com/axolotl-ai-cloud/axolotl/pull/3304
    """
    if bench.capabilities.weighting == "micro_batch":
        raise NotApplicable("weighting='micro_batch' is split-dependent by declaration")
    run = packed_run(bench, "llama")
    require_finite(run)
    initial = bench.materials.initial("llama")
    wanted, _ = oracle.gradient(
        initial, bench.materials.config(), PACKED.samples, weighting=bench.capabilities.weighting
    )
    update = {name: -value for name, value in oracle.difference(run.parameters, initial).items()}
    rule = "the packed update MUST equal the update without packing"
    if oracle.relative_error(update, wanted) <= UPDATE_TOLERANCE:
        return
    forwards = [forward for seen in run.observed for forward in seen.training_forwards()]
    leaking = next((f for f in forwards if flip_test(run.job, f, PACKED) is not None), None)
    if leaking is not None:
        raise Finding(
            rule,
            f"relative error {oracle.relative_error(update, wanted):.1e}",
            tolerance=f"{UPDATE_TOLERANCE:g} relative L2 (measured float32 noise is 5e-7)",
            cause=f"packed documents see each other: {leak_cause(leaking)}",
            reference="https://github.com/axolotl-ai-cloud/axolotl/pull/3304",
            where=stepped_at(run),
            run=str(run.folder),
        )
    judge_update(bench, run, update, wanted, rule=rule, corpus=PACKED)


@check(requires=[SPIED, "packing"], worlds=(1, 2))
def check_plan_is_deterministic(bench: Bench) -> None:
    """Train the packed job twice in one process, and compare the rows.

    Claim: The same samples and seed MUST be packed the same way each time, and no sample on two
    ranks.

    Why it matters: Each rank plans for itself: plans that differ lose samples or train them twice,
    and hang.

    Likely causes: An unseeded shuffle in the packer; state kept between calls; ties broken by hash
    or by CPU.

    Reference: https://github.com/axolotl-ai-cloud/axolotl/issues/3848
    """
    job = packed_job(bench, "ledger")
    first, second = bench.train_in_turn([job, job])
    for run in (first, second):
        counts = Counter(sample for batch in micro_batches(run, PACKED) for sample in batch.samples)
        repeated = sorted(sample for sample, times in counts.items() if times > 1)
        if repeated:
            raise Finding(
                "no sample MUST be packed twice",
                f"samples {repeated} went through the model more than once in a step",
                cause="ranks made different plans"
                if bench.setting.world_size > 1
                else "a sample is in two bins",
                run=str(run.folder),
            )
    plans = [
        [(b.rank, b.index, b.rows) for b in micro_batches(run, PACKED)] for run in (first, second)
    ]
    if plans[0] != plans[1]:
        differing = next(pair for pair in zip(*plans, strict=False) if pair[0] != pair[1])
        raise Finding(
            "the same samples and seed MUST be packed the same way each time",
            f"first {differing[0]}, then {differing[1]} (rank, micro-batch, rows)",
            cause="the packer keeps state or draws random numbers that are not seeded",
            run=str(first.folder),
        )


@check(requires=[SPIED, "packing"], worlds=(1,))
def check_overlong_samples_are_not_lost_silently(bench: Bench) -> None:
    """Give one sample that is longer than a row may be.

    Claim: A sample above the capacity MUST be refused with an error that names it, or dropped with
    a report in the history; it MUST NOT be truncated or put into a row above the limit.

    Why it matters: Truncated samples teach answers that stop in the middle; silent drops lost 99.8
    % of the tokens of one user.

    Likely causes: Truncation as a default; a filter whose count nobody reads.

    Reference: https://github.com/huggingface/trl/issues/4554
    """
    by_rows = bench.capabilities.packing == "rows"
    limit = CAPACITY if by_rows else None, None if by_rows else CAPACITY
    fitting = Corpus(
        samples=OVERLONG.samples[:LONG] + OVERLONG.samples[LONG + 1 :], vocab_size=LEDGER_VOCAB
    )
    jobs = [
        bench.job(
            "ledger", corpus, micro_batch=4, pack_length=limit[0], max_tokens_per_rank=limit[1]
        )
        for corpus in (fitting, OVERLONG)
    ]
    bench.train(jobs[0])  # without the long sample there must be nothing to refuse
    try:
        run = bench.train(jobs[1])
    except Finding as refusal:
        if "Timeout" in refusal.found or "no result in" in refusal.found:
            raise
        return  # refused: the best answer
    fed = {
        token
        for seen in run.observed
        for f in seen.training_forwards()
        for row in f.input_ids
        for token in row
    }
    own = [token for token in OVERLONG.samples[LONG]["input_ids"] if token != EOS_ID]
    inside = sum(token in fed for token in own)
    reported = any(row.get("dropped") for row in run.history)
    if inside or not reported:
        what = (
            f"{inside} of its {len(own)} tokens were trained"
            if inside
            else "it was dropped, and no history row has `dropped`"
        )
        raise Finding(
            "a sample above the capacity MUST be refused, or dropped with a report",
            f"sample 1 has 50 tokens, rows have {CAPACITY}: {what}",
            cause="truncation"
            if 0 < inside < len(own)
            else ("a row above the limit" if inside else "a silent filter"),
            reference="https://github.com/huggingface/trl/issues/4554",
            run=str(run.folder),
        )
    _judge_kept(read_step(run, OVERLONG), bench.capabilities.weighting)


def _judge_kept(reading: Reading, weighting: str) -> None:
    """Compare the weights of the samples beside a dropped one with those that they have without it."""
    weights = reading.scaled()
    kept = {pair: weight for pair, weight in weights.items() if reading.sample_of(pair) != LONG}
    counts = counts_by_sample(reading.corpus)
    share = 1 - counts[LONG] / sum(counts)
    low = min(kept.values()) * share
    if weighting != "token" or all(abs(w * share - 1) <= LEDGER_TOLERANCE for w in kept.values()):
        return
    raise Finding(
        "the samples that are kept MUST weigh as if the dropped one had never been there",
        f"they weigh {low:.4f} x 1/N with N = {sum(counts) - counts[LONG]}, the kept samples' targets",
        tolerance=f"{LEDGER_TOLERANCE:g} on weight x N",
        cause="the denominator counts the tokens of dropped samples"
        if abs(low / share - 1) < LEDGER_TOLERANCE
        else "the denominator is not the number of kept targets",
        reference="https://github.com/Red-Hat-AI-Innovation-Team/mini_trainer",
        where=stepped_at(reading.run),
        run=str(reading.run.folder),
    )
