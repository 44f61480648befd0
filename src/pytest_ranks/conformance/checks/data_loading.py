"""Is every sample drawn as often, by whom and in the order that was said?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NoReturn

from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.findings import Finding, Inconclusive
from pytest_ranks.conformance.inputs import (
    accepted_inputs,
    changed_cause,
    fed_rows,
    without_padding,
)
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.conformance.judging import CORPUS, stepped_at
from pytest_ranks.conformance.randomness import repeated_numbers
from pytest_ranks.conformance.reading import drawn, micro_batches, read_step
from pytest_ranks.conformance.tails import draw_cause, tail_violations
from pytest_ranks.models.corpora import NULL_ID, Corpus, uniform_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from pytest_ranks.conformance.reading import MicroBatch
    from pytest_ranks.conformance.runner import Bench, Run

SMALL = Optimizer(lr=1e-3)
"""These claims are about samples, not updates: any learning rate that keeps parameters finite will do."""

SHUFFLED = 24
"""Samples in the claims about order: two random orders of so many agree by chance once in 24! = 6e23."""


def _epochs(
    bench: Bench,
    count: int,
    *,
    epochs: int,
    shuffle: bool = False,
    seed: int = 11,
    augmented: bool = False,
) -> tuple[Run, list[MicroBatch], Corpus]:
    """Train epochs of a uniform corpus with the smallest windows that exercise accumulation."""
    corpus = uniform_corpus(count, vocab_size=LEDGER_VOCAB)
    accumulation = 2 if bench.capabilities.gradient_accumulation else 1
    job = bench.job(
        "ledger",
        corpus,
        micro_batch=2 if count > 2 else 1,
        gradient_accumulation_steps=accumulation,
        max_steps=None,
        epochs=epochs,
        shuffle=shuffle,
        seed=seed,
        augmented=augmented,
        optimizer=SMALL,
    )
    run = bench.train(job)
    batches = micro_batches(run, corpus)
    if not batches:
        raise Inconclusive("no training forward of the job's model was seen")
    return run, batches, corpus


@check(requires=[SPIED])
def check_each_sample_once_an_epoch(bench: Bench) -> None:
    """Count how often each sample went through the model in one epoch, for sizes around the global batch.

    Claim: In an epoch each sample MUST be drawn once, except as the declared tail policy says.

    Why it matters: Samples that every rank sees, or that some never see, bias what is learned;
    evaluation counts them twice.

    Likely causes: No shard per rank; a wrap-around that is not declared; a filter that drops
    samples unseen.

    Reference: https://github.com/pytorch/pytorch/issues/25162
    """
    tail = bench.capabilities.tail
    world = bench.setting.world_size
    window = 2 * (2 if bench.capabilities.gradient_accumulation else 1) * world
    full = max(8, window)  # less than a global batch is no epoch for a trainer that drops the rest
    for count in (8, 9, 7, 1) if tail in ("partial", "pad") else (full, full + 1):
        run, batches, corpus = _epochs(bench, count, epochs=1)
        counts = Counter(drawn(batches))
        wrong = tail_violations(counts, count, run, tail)
        if wrong:
            raise Finding(
                f"in an epoch each sample MUST be drawn once (tail={tail!r})",
                f"{count} samples on {world} ranks: {wrong}",
                cause=draw_cause(run, corpus, counts),
                reference="https://github.com/huggingface/transformers/pull/11254",
                where=stepped_at(run),
                run=str(run.folder),
            )


@check(requires=[SPIED], worlds=(2, 4))
def check_ranks_see_different_samples(bench: Bench) -> None:
    """Compare which samples each rank drew in an epoch without a tail.

    Claim: The ranks' samples MUST be disjoint, and their union the dataset.

    Why it matters: Ranks that iterate over the same samples do the same work many times.

    Likely causes: The sampler does not know rank and world size; every rank shuffles for itself
    with another seed.

    Reference: https://github.com/huggingface/datasets/issues/5360
    """
    count = 16
    run, batches, _ = _epochs(bench, count, epochs=1, shuffle=True)
    ranks = {batch.rank for batch in batches}
    by_rank = {
        rank: {s for batch in batches if batch.rank == rank for s in batch.samples}
        for rank in sorted(ranks)
    }
    for rank, samples in by_rank.items():
        for other, theirs in by_rank.items():
            if rank < other and samples & theirs:
                raise Finding(
                    "the samples of different ranks MUST be disjoint",
                    f"ranks {rank} and {other} both drew samples {sorted(samples & theirs)[:6]} of {count}",
                    cause=(
                        "every rank iterates over the same stream"
                        if samples == theirs
                        else "ranks shuffle differently, so that their shards overlap"
                    ),
                    reference="https://github.com/huggingface/datasets/issues/5360",
                    where=stepped_at(run),
                    run=str(run.folder),
                )
    lost = sorted(set(range(count)).difference(*by_rank.values()))
    if lost:
        raise Finding(
            "the samples of all ranks together MUST be the dataset",
            f"no rank drew samples {lost[:6]} of {count}",
            cause="shards leave samples out",
            reference="https://github.com/huggingface/datasets/issues/5360",
            where=stepped_at(run),
            run=str(run.folder),
        )


@check(requires=[SPIED], worlds=(1, 2))
def check_order_changes_every_epoch(bench: Bench) -> None:
    """Compare the orders of two shuffled epochs.

    Claim: With shuffle on, the order of an epoch MUST depend on the epoch.

    Why it matters: The same order each epoch repeats the same global batches, and the same
    neighbours in packed rows.

    Likely causes: set_epoch is not called; the generator is seeded anew each epoch.

    Reference: https://github.com/pytorch/pytorch/issues/31771
    """
    run, batches, _ = _epochs(bench, SHUFFLED, epochs=2, shuffle=True)
    first, second = _halves(batches)
    if set(Counter(drawn(batches)).values()) != {2} or len(set(drawn(batches))) != SHUFFLED:
        raise Inconclusive(f"epochs=2 of {SHUFFLED} samples did not draw each of them twice")
    if first == second:
        raise Finding(
            "with shuffle on, the order MUST depend on the epoch",
            f"both epochs drew {first[:8]}...",
            cause="the sampler is not told the epoch (set_epoch)",
            reference="https://github.com/huggingface/transformers/issues/4398",
            where=stepped_at(run),
            run=str(run.folder),
        )


def _halves(batches: list[MicroBatch]) -> tuple[list[int], list[int]]:
    """Return rank 0's draws of the first and the second epoch."""
    mine = _own_draws(batches)
    return mine[: len(mine) // 2], mine[len(mine) // 2 :]


@check(requires=[SPIED], worlds=(1, 2))
def check_order_depends_on_the_seed(bench: Bench) -> None:
    """Compare shuffled epochs of two seeds, and of the same seed twice.

    Claim: With shuffle on, the order MUST depend on the seed, and on nothing else that is random.

    Why it matters: Runs that differ in the seed only are how noise is measured; runs with the same
    seed are how bugs are found.

    Likely causes: A constant seed in the sampler; a generator that is not seeded; without shuffle,
    a shuffle all the same.

    Reference: https://github.com/pytorch/pytorch/issues/31771
    """
    orders = {}
    for seed in (11, 12):
        run, batches, corpus = _epochs(bench, SHUFFLED, epochs=1, shuffle=True, seed=seed)
        orders[seed] = _own_draws(batches)
    plain = sorted(orders[11])
    if orders[11] == plain:
        _raise_order(
            run, f"samples were drawn as they lie in the file: {plain[:8]}...", "shuffle is ignored"
        )
    if orders[11] == orders[12]:
        said = f"seeds 11 and 12 both drew {orders[11][:8]}..."
        _raise_order(run, said, "the sampler does not use the job's seed")
    again = [
        _own_draws(micro_batches(each, corpus)) for each in bench.train_in_turn([run.job, run.job])
    ]
    if again != [orders[12], orders[12]]:
        said = f"seed 12 drew {orders[12][:8]}..., and run again {again[0][:8]}... and {again[1][:8]}..."
        _raise_order(
            run,
            said,
            "the order is drawn from a generator that is not seeded, or that keeps its state",
        )
    unshuffled = [_own_draws(_epochs(bench, SHUFFLED, epochs=1, seed=seed)[1]) for seed in (11, 12)]
    if unshuffled[0] != unshuffled[1]:
        said = f"without shuffle, seeds 11 and 12 drew {unshuffled[0][:8]}... and {unshuffled[1][:8]}..."
        _raise_order(run, said, "samples are shuffled though shuffle is off")


def _own_draws(batches: list[MicroBatch]) -> list[int]:
    """Return what rank 0 drew, in order."""
    return [sample for batch in batches if batch.rank == 0 for sample in batch.samples]


def _raise_order(run: Run, found: str, cause: str) -> NoReturn:
    raise Finding(
        "with shuffle on, the order MUST depend on the seed and on nothing else",
        found,
        cause=cause,
        reference="https://github.com/pytorch/pytorch/issues/31771",
        where=stepped_at(run),
        run=str(run.folder),
    )


@check(requires=[SPIED], worlds=(1, 2), strategies=("single", "ddp"))
def check_random_numbers_differ(bench: Bench) -> None:
    """Train two epochs on samples that use torch's random numbers when they are read, as augmentation does.

    Claim: Random numbers MUST differ between ranks and between epochs.

    Why it matters: With the same numbers each epoch, augmentation shows the same dataset again; with
    the same on all ranks, dropout and augmentation are as varied as on one.

    Likely causes: Every rank seeded alike; a generator seeded anew at the start of each epoch, or in
    each loader process.

    Reference: https://github.com/Lightning-AI/pytorch-lightning/issues/20412
    """
    count = 8 * bench.setting.world_size
    run, _, _ = _epochs(bench, count, epochs=2, augmented=True)
    found, cause = repeated_numbers(run.draws, count=count, epochs=2)
    if found:
        raise Finding(
            "random numbers MUST differ between ranks and between epochs",
            found,
            cause=cause,
            reference="https://github.com/Lightning-AI/pytorch-lightning/issues/20412",
            run=str(run.folder),
        )


@check(requires=[SPIED], worlds=(2, 4))
def check_equal_steps_on_all_ranks(bench: Bench) -> None:
    """Train an epoch that does not divide by the ranks, and count each rank's steps.

    Claim: All ranks MUST take the same number of steps and forwards.

    Why it matters: A rank with one batch more waits for ever in a collective.

    Likely causes: Shards of different lengths; an empty micro-batch that is skipped on one rank.

    Reference: https://github.com/axolotl-ai-cloud/axolotl/pull/461
    """
    world = bench.setting.world_size
    count = (5 if bench.capabilities.tail == "drop" else 4) * world + 1
    rule = "all ranks MUST take the same number of steps and forwards"
    try:
        run, batches, _ = _epochs(bench, count, epochs=1)
    except Finding as finding:
        raise Finding(
            rule,
            f"{count} samples on {world} ranks: {finding.found}",
            cause="ranks run different numbers of micro-batches, and wait for each other in different collectives "
            "(if not, see the traceback)",
            reference="https://github.com/axolotl-ai-cloud/axolotl/pull/461",
            run=finding.run,
        ) from None
    steps = [len(seen.steps) for seen in run.observed]
    forwards = [sum(batch.rank == seen.rank for batch in batches) for seen in run.observed]
    if len(set(steps)) > 1 or len(set(forwards)) > 1:
        raise Finding(
            rule,
            f"steps by rank: {steps}, forwards by rank: {forwards}, for {count} samples",
            cause="shards of different lengths: ranks run different numbers of micro-batches",
            reference="https://github.com/huggingface/datasets/issues/6437",
            where=stepped_at(run),
            run=str(run.folder),
        )


@check(requires=[SPIED], worlds=(1, 2))
def check_inputs_are_the_samples(bench: Bench) -> None:
    """Compare the ids that went through the model with the samples'.

    Claim: The model MUST be given each sample's ids whole, in order, and nothing else but padding.

    Why it matters: A second start token moves every position; a prompt that is cut on the left is another prompt. The
    targets are the same, so the loss does not show it.

    Likely causes: `add_special_tokens` on text to which a template has added them; a length limit of the tokenizer.

    Reference: https://github.com/OpenRLHF/OpenRLHF/issues/393
    """
    run = _one_step(bench)
    pad = run.job.pad_token_id
    rows = [r for seen in run.observed for f in seen.training_forwards() for r in fed_rows(f, pad)]
    places = CORPUS.positions()
    for row in rows:
        owners = {places[token].sample for token in row if token in places}
        if len(owners) != 1:
            continue  # a row of padding, or of packed documents, which `packing` judges
        wanted = CORPUS.samples[owners.pop()]["input_ids"]
        found = without_padding(row, pad, like=wanted)
        if found not in accepted_inputs(wanted, adds_eos=bench.capabilities.adds_eos):
            raise Finding(
                "the model MUST be given each sample's ids whole, in order, and nothing else but padding",
                f"a sample of {len(wanted)} ids, {wanted[:4]}..., was given as {len(found)} ids: {found[:6]}...",
                cause=changed_cause(found, wanted),
                reference="https://github.com/OpenRLHF/OpenRLHF/issues/393",
                where=stepped_at(run),
                run=str(run.folder),
            )


def _one_step(bench: Bench) -> Run:
    micro_batch, accumulation = bench.layouts(len(CORPUS.samples))[0]
    run = bench.train(
        bench.job(
            "ledger", CORPUS, micro_batch=micro_batch, gradient_accumulation_steps=accumulation
        )
    )
    if not any(seen.training_forwards() for seen in run.observed):
        raise Inconclusive("no training forward of the job's model was seen")
    return run


@check(worlds=(1,))
def check_no_stale_cache(bench: Bench) -> None:
    """Train on one dataset, then on another of the same size in the same process, and read the second one's ledger.

    Claim: A run MUST train on its own samples, whatever was trained before.

    Why it matters: A tokenised dataset cached under a key that leaves something out is used for the
    next one.

    Likely causes: A cache key without the content, the tokenizer or the template; module-level
    state.

    Reference: https://github.com/huggingface/trl/issues/1252
    """
    first = uniform_corpus(8, vocab_size=LEDGER_VOCAB)
    shifted = tuple(
        {
            name: [token + 100 if token > 1 else token for token in sample[name]]
            for name in ("input_ids", "labels")
        }
        for sample in first.samples
    )
    second = Corpus(samples=shifted, vocab_size=LEDGER_VOCAB)
    _, run = bench.train_in_turn(
        [bench.job("ledger", corpus, micro_batch=8) for corpus in (first, second)]
    )
    reading = read_step(run, second)
    if not reading.trained():
        raise Inconclusive("the second run trained nothing")
    stale = [pair for pair in reading.trained() if pair in first.targets() and pair[0] != NULL_ID]
    if stale:
        raise Finding(
            "a run MUST train on its own samples",
            f"{len(stale)} targets of the dataset before were trained, {len(reading.wanted)} of its own were to be",
            cause="a cache of prepared samples whose key leaves out their content",
            reference="https://github.com/huggingface/trl/issues/1252",
            where=stepped_at(run),
            run=str(run.folder),
        )
