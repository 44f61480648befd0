"""Do ranks and micro-batches add up to one gradient, and does every rank apply it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.causes import expected_weights, weight_hypotheses
from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.clipping import CLIP_TOLERANCE, clipping_cause
from pytest_ranks.conformance.findings import Finding, Inconclusive, NotApplicable, diagnose
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.conformance.judging import (
    CORPUS,
    LEDGER_TOLERANCE,
    explain_update,
    judge_update,
    layout_of,
    ledger_readings,
    stepped_at,
    weights_in_words,
    window_weights,
)
from pytest_ranks.conformance.reading import PRESENT, drawn, micro_batches, require_finite
from pytest_ranks.models.corpora import unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB, read_ledger

if TYPE_CHECKING:
    from pytest_ranks.conformance.runner import Bench, Run

TENSOR_TOLERANCE = 1e-4
"""Per tensor, relative: small tensors carry ten times the rounding noise of the whole update."""

CLIP_SHARE = 20
"""The limit is the norm over this: below the norms of tensors and shards, so that clipping them apart shows."""

BF16_NOISE = 0.02
"""Relative error of a gradient that was computed in bf16; measured 7e-3."""


@check(worlds=(2, 4))
def check_world_invariance(bench: Bench) -> None:
    """Read the ledger of one global batch, spread over ranks.

    Claim: update(world N) MUST equal update(world 1): the weights add up to 1 over all tokens,
    whatever the number of ranks.

    Why it matters: An update that is 1/N of what it should be trains like a learning rate that is
    1/N: it looks fine, and the result depends on how many GPUs were free.

    Likely causes: A token-sum loss whose gradients are averaged by DDP or FSDP without the factor
    world_size; gradients that are never reduced; a count of one rank's tokens.

    Reference: https://github.com/meta-pytorch/torchtune/pull/2172
    """
    readings = list(ledger_readings(bench))
    for reading in readings:
        expected = expected_weights(reading, bench.capabilities.weighting)
        if expected is None:
            raise Inconclusive(
                f"weighting={bench.capabilities.weighting!r} depends on micro-batches that no spy saw"
            )
        found, wanted = sum(reading.scaled().values()), sum(expected.values())
        if abs(found / wanted - 1) > LEDGER_TOLERANCE * 10:
            cause, reference = diagnose(weight_hypotheses(readings))
            world = bench.setting.world_size
            raise Finding(
                f"update(world {world}) MUST equal update(world 1)",
                f"the weights add up to {found / wanted:.4f} of the oracle's; {weights_in_words(reading)}, "
                f"with {layout_of(reading.run)}",
                tolerance=f"{LEDGER_TOLERANCE * 10:g} (sum of {len(expected)} weights)",
                cause=cause,
                reference=reference,
                where=stepped_at(reading.run),
                run=str(reading.run.folder),
            )


@check()
def check_every_tensor(bench: Bench) -> None:
    """Compare each tensor's update with the oracle's, not only all of them together.

    Claim: The update of every single parameter tensor MUST equal the oracle's.

    Why it matters: A norm or an expert whose gradient is scaled wrongly vanishes in a global norm.

    Likely causes: Parameters left out of the reduction; a factor applied to some tensors only.

    Reference: https://github.com/NVIDIA/Megatron-LM/pull/5956
    """
    run = _one_step(bench)
    wanted, _ = _oracle(bench)
    update = _update(bench, run)
    errors = oracle.tensor_errors(update, wanted)
    wrong = [name for name, error in errors.items() if error > TENSOR_TOLERANCE]
    if wrong:
        worst = max(wrong, key=lambda name: errors[name])
        factor, rest = oracle.best_factor({worst: update[worst]}, {worst: wanted[worst]})
        cause, reference = explain_update(bench, run, update)
        still = [name for name in wrong if not update[name].any()]
        if len(wrong) < len(errors):
            cause = f"only {len(wrong)} of {len(errors)} tensors are wrong: {', '.join(wrong[:3])}"
            reference = "https://github.com/NVIDIA/Megatron-LM/pull/5956"
            if still == wrong:
                cause += "; they are never updated: not in the optimizer, or without a gradient"
            elif rest < TENSOR_TOLERANCE:
                cause += f", by a factor of {factor:.4f}"
        raise Finding(
            "the update of every tensor MUST equal the oracle's",
            f"{len(wrong)} of {len(errors)} tensors are off, most {worst} by {errors[worst]:.1e}: "
            f"{factor:.4f} x the oracle's + {rest:.1e}",
            tolerance=f"{TENSOR_TOLERANCE:g} relative L2 a tensor",
            cause=cause,
            reference=reference,
            where=stepped_at(run),
            run=str(run.folder),
        )


def _one_step(bench: Bench, **fields: object) -> Run:
    micro_batch, accumulation = bench.layouts(len(CORPUS.samples))[-1]
    job = bench.job(
        "llama", CORPUS, micro_batch=micro_batch, gradient_accumulation_steps=accumulation, **fields
    )
    run = bench.train(job)
    require_finite(run)
    return run


def _oracle(bench: Bench) -> tuple[oracle.Weights, float]:
    weighting = bench.capabilities.weighting
    if weighting == "micro_batch":
        raise NotApplicable("weighting='micro_batch' is split-dependent by declaration")
    initial = bench.materials.initial("llama")
    return oracle.gradient(initial, bench.materials.config(), CORPUS.samples, weighting=weighting)


def _update(bench: Bench, run: Run) -> oracle.Weights:
    initial = bench.materials.initial("llama")
    return {name: -value for name, value in oracle.difference(run.parameters, initial).items()}


@check(worlds=(2, 4))
def check_strategies_agree(bench: Bench) -> None:
    """Compare this strategy's update with the single process's.

    Claim: Every strategy MUST give the update of a single process.

    Why it matters: Whoever moves from one GPU to several expects the same training.

    Likely causes: Different loss scaling per strategy; parameters or buffers that a wrapper leaves
    out.

    Reference: https://github.com/deepspeedai/DeepSpeed/issues/1488
    """
    alone = bench.alone()
    if alone is None:
        raise NotApplicable(
            "the subject declares no single process to compare with: see gradient_sync.every_tensor"
        )
    wanted = _update(alone, _one_step(alone))
    if not any(value.any() for value in wanted.values()):
        raise Inconclusive(
            "the single process trained nothing: see gradient_sync.every_tensor[single]"
        )
    run = _one_step(bench)
    judge_update(
        bench,
        run,
        _update(bench, run),
        wanted,
        rule=f"{bench.setting} MUST give the update of a single process",
    )


@check(requires=[SPIED], worlds=(2, 4), strategies=("ddp",))
def check_replicas_stay_equal(bench: Bench) -> None:
    """Compare a digest of the replicated parameters and gradients of all ranks after two steps.

    Claim: Replicated parameters MUST be bit-identical on all ranks after every step.

    Why it matters: Replicas that drift apart train as many models as there are ranks, and one of
    them is saved.

    Likely causes: Gradients that are not reduced, or not for all parameters; a different clipping
    factor on each rank.

    Reference: https://github.com/pytorch/pytorch/issues/128949
    """
    micro_batch, accumulation = bench.layouts(8)[-1]
    world = bench.setting.world_size
    corpus = unique_token_corpus(
        [5, 12, 3, 9, 7, 4, 15, 6] * 2, [0, 3, 1, 0] * 4, vocab_size=LEDGER_VOCAB
    )
    job = bench.job(
        "llama",
        corpus,
        micro_batch=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        optimizer=Optimizer(lr=0.1),
        max_grad_norm=0.5 if bench.capabilities.clip else None,
    )
    run = bench.train(job)
    hashes = [[step.weight_hash for step in seen.steps] for seen in run.observed]
    if not all(entry and all(entry) for entry in hashes):
        raise Inconclusive("no step of a torch optimizer on replicated parameters was seen")
    steps = min(len(entry) for entry in hashes)
    if len({entry[-1] for entry in hashes} | {entry[0] for entry in hashes}) == 1:
        raise Inconclusive("no parameter moved between the steps, so replicas cannot drift apart")
    for step in range(steps):
        values = [entry[step] for entry in hashes]
        if len(set(values)) > 1:
            odd = next(rank for rank, value in enumerate(values) if value != values[0])
            gradients = {seen.steps[step].grad_hash for seen in run.observed}
            cause = (
                "ranks apply different gradients: they are not reduced, or clipped by each rank's own norm"
                if len(gradients) > 1
                else "ranks began with different parameters, or keep different optimizer states"
            )
            raise Finding(
                "replicated parameters MUST be bit-identical on all ranks",
                f"rank {odd} differs from rank 0 after step {step + 1} of {steps}, world size {world}",
                cause=cause,
                reference="https://github.com/pytorch/pytorch/issues/128949",
                where=stepped_at(run),
                run=str(run.folder),
            )


@check(requires=["clip"])
def check_clipping_law(bench: Bench) -> None:
    """Clip far below the gradient's norm, and measure the update.

    Claim: With max_grad_norm = c below the gradient's norm, the update's norm MUST be lr x c, in
    the gradient's direction.

    Why it matters: Clipped by each shard's own norm, clipping grows weaker with every GPU; clipped
    before the reduction, it changes the direction.

    Likely causes: The norm of the local shard in place of the global one; clipping before backward,
    before the reduction, per micro-batch, or not at all.

    Reference: https://github.com/pytorch/torchtitan/issues/766
    """
    wanted, _ = _oracle(bench)
    size = oracle.norm(wanted)
    limit = round(size / CLIP_SHARE, 3)
    run = _one_step(bench, max_grad_norm=limit)
    update = _update(bench, run)
    length = oracle.norm(update)
    _, rest = oracle.best_factor(update, wanted)
    rule = f"with max_grad_norm={limit} the update's norm MUST be lr x {limit}, in the gradient's direction"
    if abs(length / limit - 1) > CLIP_TOLERANCE or rest > CLIP_TOLERANCE:
        raise Finding(
            rule,
            f"its norm is {length:.5f} (unclipped: {size:.5f}), {rest:.1e} of it in other directions",
            tolerance=f"{CLIP_TOLERANCE:g} relative",
            cause=clipping_cause(bench.setting.world_size, update, wanted, limit),
            reference="https://github.com/pytorch/torchtitan/issues/766",
            where=stepped_at(run),
            run=str(run.folder),
        )
    if "bf16" in bench.capabilities.precision:
        run = _one_step(bench, max_grad_norm=limit, precision="bf16")
        length = oracle.norm(_update(bench, run))  # of bf16's direction, but the length is exact
        if abs(length / limit - 1) > CLIP_TOLERANCE:
            unclipped = abs(length / size - 1) < BF16_NOISE
            raise Finding(
                rule,
                f"with precision='bf16' its norm is {length:.5f} (unclipped: about {size:.5f})",
                tolerance=f"{CLIP_TOLERANCE:g} relative",
                cause="gradients are not clipped in bf16"
                if unclipped
                else f"in bf16 the norm that clipping divides by is {limit / length:.3f} of the true one",
                reference="https://github.com/deepspeedai/DeepSpeed/pull/3790",
                where=stepped_at(run),
                run=str(run.folder),
            )


@check(requires=[SPIED], worlds=(1, 2))
def check_gradients_are_cleared(bench: Bench) -> None:
    """Train two steps on different samples, and look for the first step's samples in the second update.

    Claim: A step MUST apply the gradients of its own global batch only.

    Why it matters: Without zero_grad every step repeats all earlier ones.

    Likely causes: zero_grad missing, or called on another optimizer or before accumulation ends.

    Reference: https://github.com/meta-pytorch/torchforge/pull/71
    """
    world = bench.setting.world_size
    micro_batch, accumulation = (1, 2) if bench.capabilities.gradient_accumulation else (2, 1)
    size = 2 * world
    corpus = unique_token_corpus([6, 11] * size, [0, 3] * size, vocab_size=LEDGER_VOCAB)
    job = bench.job(
        "ledger",
        corpus,
        micro_batch=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    run = bench.train(job)
    require_finite(run)
    batches = micro_batches(run, corpus)
    ledger = read_ledger(run.parameters, lr=run.job.optimizer.lr)
    first = drawn(batches, step=0)
    if len({batch.step for batch in batches}) != 2:
        steps = len({batch.step for batch in batches})
        raise Finding(
            "the optimizer MUST step once a global batch",
            f"max_steps=2 with {layout_of(run)} trained forwards before {steps} different steps",
            cause="the optimizer steps on every micro-batch"
            if accumulation > 1
            else "the steps are not the job's",
            reference="https://github.com/huggingface/accelerate/pull/2790",
            where=stepped_at(run),
            run=str(run.folder),
        )
    if set(first) & set(drawn(batches, step=1)):
        raise Inconclusive("both steps drew the same sample, so their updates cannot be told apart")
    weighting = bench.capabilities.weighting
    weights, later = (
        window_weights(run, corpus, ledger, step=step, of=samples, weighting=weighting)
        for step, samples in enumerate([first, drawn(batches, step=1)])
    )
    for step, trained in enumerate([weights, later], start=1):
        if max(map(abs, trained)) < PRESENT:
            raise Inconclusive(f"step {step} trained nothing, so nothing of step 1 can come back")
    if max(weights) > 1.5 * max(later):  # a wrong scale is the same in both: judged elsewhere
        raise Finding(
            "a step MUST apply the gradients of its own global batch only",
            f"samples of step 1 weigh {max(weights):.3f} x what they must, those of step 2 {max(later):.3f} x",
            cause="gradients are not cleared between steps: step 2 applied step 1's again",
            reference="https://github.com/meta-pytorch/torchforge/pull/71",
            where=stepped_at(run),
            run=str(run.folder),
        )


@check(requires=[SPIED])
def check_one_step_a_window(bench: Bench) -> None:
    """Count optimizer steps and the forwards between them.

    Claim: The optimizer MUST step once for each global batch, on every rank, after all its
    micro-batches.

    Why it matters: A step on every micro-batch trains with a smaller batch and another learning
    rate than was asked for.

    Likely causes: The synchronisation flag read wrongly; the "end of the dataloader" taken for the
    end of a window.

    Reference: https://github.com/huggingface/accelerate/pull/2790
    """
    micro_batch, accumulation = bench.layouts(len(CORPUS.samples))[-1]
    job = bench.job(
        "ledger", CORPUS, micro_batch=micro_batch, gradient_accumulation_steps=accumulation
    )
    run = bench.train(job)
    for seen in run.observed:
        forwards = len(seen.training_forwards(0))
        if len(seen.steps) != 1 or forwards != accumulation:
            raise Finding(
                "the optimizer MUST step once for each global batch",
                f"rank {seen.rank} took {len(seen.steps)} steps, the first after {forwards} forwards; "
                f"expected 1 step after {accumulation}",
                cause="the optimizer steps on every micro-batch"
                if len(seen.steps) > 1
                else "forwards of the window are missing",
                reference="https://github.com/huggingface/accelerate/pull/2790",
                where=stepped_at(run),
                run=str(run.folder),
            )
