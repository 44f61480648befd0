"""Adapters that do not honour the job: `subject.honours_job` must name what differs."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import MixedPrecisionPolicy

from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer
from pytest_ranks.subjects.reference import ReferenceTrainer, config_of

if TYPE_CHECKING:
    from torch import nn

    from pytest_ranks.conformance import Job
    from pytest_ranks.reference import TrainConfig


class _Changed(ReferenceTrainer):
    """Passes on the job, but for some fields."""

    def changes(self, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def config(self, job: Job) -> TrainConfig:
        return dataclasses.replace(config_of(job), **self.changes(job))


@plant(row="adapter", kills={"subject.honours_job[single]": "warm-up?"})
class WarmUpOn(_Changed):
    """A default of 10 warm-up steps: the first step has a learning rate of zero."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"warmup_steps": 10}


@plant(row="adapter", kills={"subject.honours_job[single]": "the optimizer saw 0.185"})
class DecaysLearningRate(_Changed):
    """A default schedule lets the learning rate fall to zero."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"schedule": "linear"}


@plant(row="adapter", kills={"subject.honours_job[single]": "job.optimizer.lr=0.37"})
class LearningRateDefault(_Changed):
    """The job's learning rate is not passed on."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"lr": 1e-4}


@plant(
    row="adapter",
    kills={
        "subject.honours_job[single]": "switch clipping off",
        "subject.honours_job[fsdp2-2]": "switch clipping off",
    },
)
class ClippingOn(_Changed):
    """A default clips gradients to a norm of 1."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"max_grad_norm": 1.0}


@plant(row="adapter", kills={"subject.honours_job[single]": "switch mixed precision off"})
class Bf16On(_Changed):
    """A default computes in bfloat16."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"precision": "bf16"}


@plant(row="adapter", kills={"subject.honours_job[fsdp2-2]": "wraps nothing"})
class ShardingIgnored(_Changed):
    """FSDP2 is accepted, and DDP is what runs."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"strategy": "ddp" if job.strategy == "fsdp2" else job.strategy}


@plant(row="adapter", kills={"subject.honours_job[single]": "the optimizer saw 0.01"})
class DecayDefault(_Changed):
    """AdamW keeps torch's default weight decay."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"weight_decay": 0.01}


@plant(
    row="O7",
    issue="https://github.com/EleutherAI/gpt-neox/pull/228",
    kills={"subject.honours_job[single]": "job.optimizer.betas=(0.85, 0.97)"},
)
class BetasDropped(_Changed):
    """AdamW keeps its default betas."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"betas": (0.9, 0.999)}


@plant(
    row="O7",
    issue="https://github.com/pytorch/torchtitan/pull/1282",
    kills={"subject.honours_job[single]": "job.optimizer.eps=3e-07"},
)
class EpsDropped(_Changed):
    """AdamW keeps its default eps."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"eps": 1e-8}


@plant(row="adapter", kills={"subject.honours_job[single]": "used 1 samples in all"})
class AccumulationIgnored(_Changed):
    """The job's gradient_accumulation_steps are not passed on."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"gradient_accumulation_steps": 1}


@plant(row="adapter", kills={"subject.honours_job[single]": "took 3 optimizer steps"})
class OneStepTooMany(_Changed):
    """An off-by-one in the number of steps."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {} if job.max_steps is None else {"max_steps": job.max_steps + 1}


@plant(row="adapter", kills={"subject.honours_job[single]": "the optimizer is SGD"})
class AlwaysSgd(_Changed):
    """The job asks for AdamW and gets SGD."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"optimizer": "sgd"}


@plant(
    row="O9",
    issue="https://github.com/huggingface/lerobot/issues/3668",
    kills={"subject.honours_job[single]": "call model.train()"},
)
class EvalMode(Trainer):
    """The model is trained in eval mode, without dropout."""

    def set_train_mode(self) -> None:
        self.model.eval()


@plant(
    row="mini_trainer: param_dtype fp32",
    kills={"subject.honours_job[fsdp2-2]": "job.precision='bf16', but the forward computes in"},
)
class ComputesInFp32(Trainer):
    """FSDP2's policy is left out: bfloat16 was asked for, float32 is computed."""

    def mixed_precision(self) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy()


@plant(row="adapter", kills={"subject.honours_job[single]": "never called the job's model"})
class TrainsAnotherModel(ReferenceTrainer):
    """The adapter trains a model of its own, not the job's."""

    def train(self, job: Job) -> Any:
        from pytest_ranks.conformance import Trained, full_parameters
        from pytest_ranks.models.ledger import LedgerTable

        model: nn.Module = LedgerTable()
        trainer = Trainer(self.config(job), model=model, samples=job.samples)
        history = trainer.train()
        return Trained(parameters=full_parameters(model), history=history)


@plant(row="adapter", kills={"subject.honours_job[single]": "Trained.history has 0 rows"})
class NoHistory(ReferenceTrainer):
    """The adapter returns no history."""

    def train(self, job: Job) -> Any:
        from pytest_ranks.conformance import Trained

        trained = super().train(job)
        return Trained(parameters=trained.parameters)


@plant(
    row="adapter",
    kills={"mixed_precision.recomputation_is_neutral[single]": "recomputes nothing"},
)
class CheckpointingIgnored(_Changed):
    """Activation checkpointing is accepted and not done."""

    def changes(self, job: Job) -> dict[str, Any]:
        return {"activation_checkpointing": False}
