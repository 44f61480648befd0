"""With compute in bf16: are weights, reductions, accumulation and optimizer state still float32?

Comparing gradients cannot tell (a bf16 reduction costs 7.0e-3 of relative error, a right run
6.7e-3). Counting can: the share of values that bf16 represents exactly is 1 after a reduction in
bf16, and 0.45 (2 ranks) or 0.25 (4 ranks) after one in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.findings import AdapterError, Finding, Inconclusive
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.conformance.judging import CORPUS, stepped_at
from pytest_ranks.conformance.reading import require_finite

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_ranks.conformance.runner import Bench, Run

CENSUS_LIMIT = 0.95
"""Above this share of bf16-exact values they were bf16 at some point; right runs read 0.25 to 0.6, wrong ones 1.0."""


def _bf16_run(bench: Bench, *, accumulate: bool = False, **fields: object) -> Run:
    layouts = bench.layouts(len(CORPUS.samples))
    micro_batch, accumulation = layouts[-1] if accumulate else layouts[0]
    run = bench.train(
        bench.job(
            "llama",
            CORPUS,
            micro_batch=micro_batch,
            gradient_accumulation_steps=accumulation,
            precision="bf16",
            **fields,
        )
    )
    require_finite(run)
    return run


@check(requires=[SPIED, "precision:bf16"], worlds=(2, 4))
def check_gradients_are_reduced_in_fp32(bench: Bench) -> None:
    """Count the gradient entries at the optimizer step that bf16 can hold exactly.

    Claim: Gradients MUST be added up over ranks in float32.

    Why it matters: A sum in bf16 has 8 bits: with many ranks small gradients vanish, and training
    grows unstable at scale.

    Likely causes: MixedPrecisionPolicy(reduce_dtype=bf16), or reduce_dtype=None, which means
    param_dtype; a bf16 compression hook.

    Reference: https://github.com/pytorch/pytorch/issues/106395
    """
    run = _bf16_run(bench)
    shares = [step.grad_census for seen in run.observed for step in seen.steps]
    _judge_census(
        run,
        shares,
        what="gradient entries at the optimizer step",
        rule="gradients MUST be reduced over ranks in float32",
        cause="the reduction ran in bf16: reduce_dtype=torch.bfloat16, or None (then it is param_dtype)"
        if bench.setting.strategy == "fsdp2"
        else "the reduction ran in bf16: a compression hook, or gradients in bf16",
        reference="https://github.com/pytorch/pytorch/issues/106395",
    )


def _judge_census(
    run: Run, shares: list[float | None], *, what: str, rule: str, cause: str, reference: str
) -> None:
    known = [share for share in shares if share is not None]
    if not known:
        raise Inconclusive(f"no {what} were seen")
    if max(known) > CENSUS_LIMIT:
        raise Finding(
            rule,
            f"{max(known):.4f} of the {what} are exact bf16 values",
            tolerance=f"below {CENSUS_LIMIT:g} (float32 reads 0.25 to 0.6, bf16 1.0)",
            cause=cause,
            reference=reference,
            where=stepped_at(run),
            run=str(run.folder),
        )


@check(requires=[SPIED, "precision:bf16", "gradient_accumulation"], worlds=(1,))
def check_accumulates_in_fp32(bench: Bench) -> None:
    """Count the bf16-exact gradient entries after several micro-batches on one rank.

    Claim: Gradients MUST be added up over micro-batches in float32, so that their error does not
    grow with accumulation.

    Why it matters: Each addition in bf16 rounds away what is 256 times smaller than the sum.

    Likely causes: bf16 parameters, whose .grad is bf16; a manual accumulation buffer in the compute
    dtype.

    Reference: https://github.com/meta-pytorch/torchtune/issues/2254
    """
    run = _bf16_run(bench, accumulate=True)
    if any(len(seen.training_forwards(0)) < 2 for seen in run.observed):
        raise Inconclusive("one forward a step leaves nothing to add up")
    shares = [step.grad_census for seen in run.observed for step in seen.steps]
    _judge_census(
        run,
        shares,
        what="accumulated gradient entries",
        rule="gradients MUST be accumulated in float32",
        cause="gradients were added up in bf16: parameters are bf16"
        if any(s.weight_dtypes != ["float32"] for seen in run.observed for s in seen.steps)
        else "gradients were added up in bf16: the accumulation buffer is, though parameters are float32",
        reference="https://github.com/meta-pytorch/torchtune/issues/2254",
    )


@check(requires=[SPIED, "precision:bf16"])
def check_master_weights_are_fp32(bench: Bench) -> None:
    """Look at the parameters that the optimizer updates.

    Claim: The optimizer MUST update float32 weights.

    Why it matters: A bf16 weight of 1.0 does not move by less than 0.004: small updates are lost
    for ever.

    Likely causes: The model loaded in bf16; an upcast that does nothing under FSDP2.

    Reference: https://github.com/huggingface/accelerate/issues/3979
    """
    run = _bf16_run(bench, max_steps=2)
    for seen in run.observed:
        for step in seen.steps:
            if step.weight_dtypes != ["float32"]:
                raise Finding(
                    "the optimizer MUST update float32 weights",
                    f"rank {seen.rank}: they are {', '.join(step.weight_dtypes)}",
                    cause="the model was loaded or cast to bf16 before the optimizer was built",
                    reference="https://github.com/huggingface/accelerate/issues/3979",
                    where=stepped_at(run),
                    run=str(run.folder),
                )
    _judge_census(
        run,
        [
            *(step.weight_census for seen in run.observed for step in seen.steps),
            # Those of the first step are the model's own, which may have been saved in bf16.
            *(step.weight_census_before for seen in run.observed for step in seen.steps[1:]),
        ],
        what="weights after a step",
        rule="the optimizer MUST update float32 weights",
        cause="weights are rounded to bf16 after each step",
        reference="https://github.com/huggingface/accelerate/issues/3979",
    )


@check(requires=[SPIED, "precision:bf16", "optimizers:adamw"], worlds=(1, 2))
def check_optimizer_state_is_fp32(bench: Bench) -> None:
    """Look at AdamW's moments.

    Claim: The optimizer's moments MUST be float32.

    Why it matters: A second moment in bf16 stops changing after a few hundred steps; late loss was
    three times as high.

    Likely causes: The optimizer built on bf16 parameters.

    Reference: https://github.com/areal-project/AReaL/issues/1292
    """
    run = _bf16_run(bench, optimizer=Optimizer(name="adamw", lr=1e-3), max_steps=2)
    for seen in run.observed:
        for step in seen.steps:
            if not step.state_dtypes:
                raise Inconclusive("the optimizer keeps no moments that the spies could see")
            if step.state_dtypes != ["float32"]:
                raise Finding(
                    "the optimizer's moments MUST be float32",
                    f"rank {seen.rank}: they are {', '.join(step.state_dtypes)}",
                    cause="the optimizer was built on bf16 parameters"
                    if step.weight_dtypes != ["float32"]
                    else "moments are cast, or kept, in bf16 though parameters are float32",
                    reference="https://github.com/areal-project/AReaL/issues/1292",
                    where=stepped_at(run),
                    run=str(run.folder),
                )


@check(requires=[SPIED, "precision:bf16"], worlds=(1, 2))
def check_buffers_stay_fp32(bench: Bench) -> None:
    """Look at the model's buffers during the forward.

    Claim: Floating buffers, such as rotary frequencies, MUST stay float32.

    Why it matters: In bf16 neighbouring positions beyond 256 are the same position.

    Likely causes: model.to(bfloat16); a mixed-precision policy with buffer_dtype=bf16.

    Reference: https://github.com/instructlab/training/issues/477
    """
    run = _bf16_run(bench)
    for seen in run.observed:
        for forward in seen.training_forwards():
            wrong = {name: dtype for name, dtype in forward.buffers.items() if dtype != "float32"}
            if not forward.buffers:
                raise Inconclusive("the model has no floating buffers")
            if wrong:
                name, dtype = next(iter(wrong.items()))
                raise Finding(
                    "floating buffers MUST stay float32",
                    f"rank {seen.rank}: {name} is {dtype}, and {len(wrong) - 1} more",
                    cause="the whole model is cast, buffers included",
                    reference="https://github.com/instructlab/training/issues/477",
                    run=str(run.folder),
                )


@check(requires=["precision:bf16", "optimizers:adamw"], worlds=(1, 2))
def check_small_updates_survive(bench: Bench) -> None:
    """Take three AdamW steps at learning rate 1e-5, and count the entries that moved.

    Claim: Most weights MUST move, however small the step.

    Why it matters: With bf16 weights 86 % of the entries never move at this rate: fine-tuning
    trains the rest.

    Likely causes: bf16 master weights.

    Reference: https://github.com/pytorch/ao/pull/1124
    """
    size = 3 * len(CORPUS.samples)
    from pytest_ranks.models.corpora import unique_token_corpus
    from pytest_ranks.models.ledger import LEDGER_VOCAB

    corpus = unique_token_corpus(
        [5, 9, 12, 7] * (size // 4), [0, 2, 3, 1] * (size // 4), vocab_size=LEDGER_VOCAB
    )
    micro_batch, _ = bench.layouts(len(CORPUS.samples))[0]
    run = bench.train(
        bench.job(
            "llama",
            corpus,
            micro_batch=micro_batch,
            max_steps=3,
            precision="bf16",
            optimizer=Optimizer(name="adamw", lr=1e-5),
        )
    )
    require_finite(run)
    initial = bench.materials.initial("llama")
    names = [
        name for name in initial if name.endswith("_proj.weight")
    ]  # every entry of these has a gradient
    moved = sum(_moved(run.parameters[name], initial[name]) for name in names)
    total = sum(initial[name].numel() for name in names)
    if moved / total < 0.5:
        raise Finding(
            "most weights MUST move in three steps at learning rate 1e-5",
            f"{moved / total:.2f} of {total} entries moved",
            tolerance="above 0.5 (float32 weights read 0.9, bf16 weights 0.1)",
            cause="weights are bf16: an update below half their last bit is lost",
            reference="https://github.com/pytorch/ao/pull/1124",
            where=stepped_at(run),
            run=str(run.folder),
        )


def _moved(after: Tensor, before: Tensor) -> int:
    """Count the entries that moved; rounding a weight to bf16 is no move."""
    rounded = before.to(torch.bfloat16).float()
    return int(((after.float() != before) & (after.float() != rounded)).sum())


@check(requires=[SPIED, "activation_checkpointing"], worlds=(1, 2))
def check_recomputation_is_neutral(bench: Bench) -> None:
    """Train one step with dropout 0.5, with and without activation checkpointing.

    Claim: Activation checkpointing MUST NOT change the update.

    Why it matters: Recomputed with another dropout mask, the gradient belongs to a network that
    never ran.

    Likely causes: preserve_rng_state=False; a random state restored on another device.

    Reference: https://github.com/allenai/OLMo-core/pull/828
    """
    micro_batch, _ = bench.layouts(len(CORPUS.samples))[0]
    runs = [
        bench.train(
            bench.job(
                "llama",
                CORPUS,
                micro_batch=micro_batch,
                dropout=0.5,
                activation_checkpointing=recompute,
            )
        )
        for recompute in (False, True)
    ]
    plain = bench.train(bench.job("llama", CORPUS, micro_batch=micro_batch))
    for run in (*runs, plain):
        require_finite(run)
    if all(
        torch.equal(runs[0].parameters[name], plain.parameters[name]) for name in plain.parameters
    ):
        raise Inconclusive("dropout 0.5 changed nothing: the model was not run with dropout")
    _recomputed(runs)
    errors = {
        name: float((runs[0].parameters[name] - runs[1].parameters[name]).abs().max())
        for name in runs[0].parameters
    }
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > 1e-6:
        raise Finding(
            "activation checkpointing MUST NOT change the update",
            f"{worst} differs by up to {errors[worst]:.1e}",
            tolerance="1e-6",
            cause="dropout draws another mask when activations are recomputed (preserve_rng_state=False)",
            reference="https://github.com/allenai/OLMo-core/pull/828",
            where=stepped_at(runs[1]),
            run=str(runs[1].folder),
        )


def _recomputed(runs: list[Run]) -> None:
    """Make sure that layers ran again in the second run.

    Raises:
        AdapterError: they did not.
    """
    for plain, again in zip(runs[0].observed, runs[1].observed, strict=True):
        if again.layer_calls <= plain.layer_calls:
            raise AdapterError(
                "job.activation_checkpointing=True, but no layer ran a second time in the backward pass: "
                "the subject accepts the setting and recomputes nothing"
            )
