"""Is it the trainer that is judged, or its adapter? These run first and gate the rest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_ranks.conformance.check import SPIED, check
from pytest_ranks.conformance.findings import AdapterError, Inconclusive, NotRun
from pytest_ranks.conformance.job import Optimizer
from pytest_ranks.conformance.reading import micro_batches
from pytest_ranks.models.corpora import unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from pytest_ranks.conformance.runner import Bench, Run
    from pytest_ranks.models.corpora import Corpus
    from pytest_ranks.observe.records import Step

ODD_LR = 0.37
"""A learning rate that no default is equal to."""

ADAMW = Optimizer(name="adamw", lr=3.3e-3, betas=(0.85, 0.97), eps=3e-7, weight_decay=0.07)
"""Numbers that no default is equal to."""

SAME_NORM = 1e-4
"""Relative: clipping to a limit leaves norms 1e-6 apart; those of different samples are 1e-2 and more apart."""

GRADIENT_NUMEL = 1000
"""A reduction of fewer elements is a count or a loss; the smallest bucket of the tiny Llama's gradients has more."""


@check(requires=[SPIED], worlds=(1, 2, 4))
def check_honours_job(bench: Bench) -> None:
    """Compare what the spies saw with what the job says.

    Claim: The subject MUST train with the job's optimizer, learning rate, batch size, precision and
    steps, in train mode.

    Why it matters: A warm-up, a clipping default or a mixed-precision default in the adapter looks
    like a loss bug; every other check is only fair to the trainer when the adapter passes on what
    the job says.

    Likely causes: Defaults of the trainer's own configuration (warm-up, max_grad_norm 1.0, weight
    decay, bf16) that the adapter does not switch off.

    Reference:
    https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
    """
    size = bench.setting.world_size * 2
    corpus = unique_token_corpus([6, 9] * size, [0, 4] * size, vocab_size=LEDGER_VOCAB)
    job = bench.job("llama", corpus, micro_batch=2, max_steps=2, optimizer=Optimizer(lr=ODD_LR))
    run = bench.train(job)
    _model_was_seen(run)
    _strategy_took_effect(run)
    _steps_are_the_jobs(run, corpus)
    _numbers_are_the_jobs(run, {"lr": ODD_LR, "weight_decay": 0.0, "momentum": 0})
    _precision_is_the_jobs(run)
    _not_clipped(run)
    _second_run(bench, corpus)


def _second_run(bench: Bench, corpus: Corpus) -> None:
    """Train one step with all that the first run left at its simplest: accumulation, AdamW, bf16, as declared."""
    accumulation = 2 if bench.capabilities.gradient_accumulation else 1
    optimizer = ADAMW if "adamw" in bench.capabilities.optimizers else Optimizer(lr=ODD_LR)
    job = bench.job(
        "llama",
        corpus,
        micro_batch=2 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optimizer=optimizer,
        precision="bf16" if "bf16" in bench.capabilities.precision else "fp32",
    )
    run = bench.train(job)
    _rows_are_the_jobs(run, corpus)
    wanted: dict[str, object] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer is ADAMW:
        wanted |= {"betas": ADAMW.betas, "eps": ADAMW.eps}
    _numbers_are_the_jobs(run, wanted)
    _precision_is_the_jobs(run)


def _model_was_seen(run: Run) -> None:
    for seen in run.observed:
        forwards = seen.training_forwards()
        if not forwards:
            raise AdapterError(
                f"rank {seen.rank} never called the job's model in training: "
                "train what job.build_model() or from_pretrained(job.model_dir) gives"
            )
        if not all(forward.training for forward in forwards):
            raise AdapterError(
                f"rank {seen.rank} trained with the model in eval mode: call model.train()"
            )
        if not seen.steps:
            raise Inconclusive(
                f"rank {seen.rank}: no torch optimizer took a step that the spies could see"
            )


def _strategy_took_effect(run: Run) -> None:
    job = run.job
    for seen in run.observed:
        # An optimizer on the parameters from before sharding has no gradients: a bug, and judged elsewhere.
        trained = [step for step in seen.steps if step.parameters]
        if job.strategy == "fsdp2" and not all(step.sharded for step in trained):
            raise NotRun(
                "job.strategy='fsdp2', but no parameter is sharded at the optimizer step: "
                "the subject accepts the strategy and wraps nothing"
            )
        # Parameters that were broadcast show a wrapper; that it then reduces nothing is a bug, and judged elsewhere.
        large = [c for c in seen.collectives if c.numel >= GRADIENT_NUMEL]
        if job.strategy == "ddp" and job.world_size > 1 and not large:
            raise NotRun("job.strategy='ddp', but neither parameters nor gradients went over ranks")


def _steps_are_the_jobs(run: Run, corpus: Corpus) -> None:
    job = run.job
    for seen in run.observed:
        if len(seen.steps) != job.max_steps:
            raise AdapterError(
                f"job.max_steps={job.max_steps}, but rank {seen.rank} took {len(seen.steps)} optimizer steps"
            )
    _rows_are_the_jobs(run, corpus)
    if len(run.history) < (job.max_steps or 0):
        raise AdapterError(
            f"Trained.history has {len(run.history)} rows, expected one for each of {job.max_steps} steps"
        )


def _rows_are_the_jobs(run: Run, corpus: Corpus) -> None:
    """Compare samples over the whole run: a step on every micro-batch is the trainer's bug, and judged elsewhere."""
    job = run.job
    rows = sum(len(batch.samples) for batch in micro_batches(run, corpus))
    if rows != job.global_batch * (job.max_steps or 0):
        raise AdapterError(
            f"the job's global batch is {job.global_batch} samples (micro_batch={job.micro_batch}, "
            f"gradient_accumulation_steps={job.gradient_accumulation_steps}, world_size={job.world_size}), "
            f"but max_steps={job.max_steps} used {rows} samples in all"
        )


def _not_clipped(run: Run) -> None:
    """Refuse steps on different samples whose gradients have one and the same norm: only clipping does that."""
    norms = [
        sum(seen.steps[step].grad_norm ** 2 / _copies(run) for seen in run.observed) ** 0.5
        for step in range(min(len(seen.steps) for seen in run.observed))
    ]
    if len(norms) > 1 and norms[0] > 0 and max(norms) - min(norms) < SAME_NORM * max(norms):
        raise AdapterError(
            f"job.max_grad_norm=None, but the gradients of {len(norms)} different steps all have the norm "
            f"{norms[0]:.4f}: switch clipping off"
        )


def _copies(run: Run) -> int:
    """Return on how many ranks each gradient entry is."""
    sharded = all(step.sharded for seen in run.observed for step in seen.steps)
    return 1 if sharded else len(run.observed)


def _numbers_are_the_jobs(run: Run, wanted: dict[str, object]) -> None:
    for seen in run.observed:
        for index, step in enumerate(seen.steps):
            _compare_groups(step, index, wanted)
        limits = [limit for limit in seen.clips if math.isfinite(limit) and limit > 0]
        if run.job.max_grad_norm is None and any(limit < 1e3 for limit in limits):
            raise AdapterError(
                f"job.max_grad_norm=None, but gradients were clipped to {limits[0]:g}: switch clipping off"
            )


def _compare_groups(step: Step, index: int, wanted: dict[str, object]) -> None:
    for group in step.groups:
        if ("betas" in wanted) != ("betas" in group.numbers):
            name = "adamw" if "betas" in wanted else "sgd"
            raise AdapterError(
                f"job.optimizer.name={name!r}, but the optimizer is {step.optimizer}"
            )
        for name, value in wanted.items():
            found = group.numbers.get(name, value)
            if name == "weight_decay" and found == 0.0:
                continue  # leaving norms and biases out of decay is right
            if not _same(found, value):
                hint = ": warm-up?" if name == "lr" and index == 0 else ""
                raise AdapterError(
                    f"job.optimizer.{name}={value!r}, the optimizer saw {found!r} at step {index + 1}{hint}"
                )


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-12)
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return found == wanted


def _precision_is_the_jobs(run: Run) -> None:
    for seen in run.observed:
        for forward in seen.training_forwards():
            computes = forward.autocast or forward.weight_dtype
            if run.job.precision == "fp32" and computes != "float32":
                raise AdapterError(
                    f"job.precision='fp32', but the forward computes in {computes}: switch mixed precision off"
                )
            if run.job.precision == "bf16" and computes != "bfloat16":
                raise AdapterError(f"job.precision='bf16', but the forward computes in {computes}")
