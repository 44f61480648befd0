"""The reference trainer as a subject: the suites' default, and the model answer to every check."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_ranks.conformance import Capabilities, Job, Trained, full_parameters

if TYPE_CHECKING:
    from pytest_ranks.reference import TrainConfig, Trainer


def config_of(job: Job) -> TrainConfig:
    """Return the trainer's configuration that says what a job says."""
    from pytest_ranks.reference import TrainConfig

    return TrainConfig(
        micro_batch=job.micro_batch,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        max_tokens_per_rank=job.max_tokens_per_rank,
        pack_length=job.pack_length,
        max_steps=job.max_steps,
        epochs=job.epochs,
        shuffle=job.shuffle,
        seed=job.seed,
        optimizer=job.optimizer.name,
        lr=job.optimizer.lr,
        betas=job.optimizer.betas,
        eps=job.optimizer.eps,
        weight_decay=job.optimizer.weight_decay,
        schedule=job.schedule,
        warmup_steps=job.warmup_steps,
        max_grad_norm=job.max_grad_norm,
        precision=job.precision,
        strategy=job.strategy,
        activation_checkpointing=job.activation_checkpointing,
        device=job.device,
    )


class ReferenceTrainer:
    """`pytest_ranks.reference`, packing the global batch of each step."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        world_sizes={1, 2, 4},
        strategies={"single", "ddp", "fsdp2"},
        gradient_accumulation=True,
        packing="step",
        clip=True,
        precision={"fp32", "bf16"},
        optimizers={"sgd", "adamw"},
        activation_checkpointing=True,
        tail="partial",
    )

    @staticmethod
    def trainer_class() -> type[Trainer]:
        """Return the trainer to run; a mutant returns one with a planted bug."""
        from pytest_ranks.reference import Trainer

        return Trainer

    def config(self, job: Job) -> TrainConfig:
        """Return the trainer's configuration for a job."""
        return config_of(job)

    def train(self, job: Job) -> Trained:
        """Train on `job.samples`."""
        from transformers import AutoTokenizer

        model = job.build_model()
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer_dir)
        trainer = self.trainer_class()(
            self.config(job), model=model, samples=job.samples, tokenizer=tokenizer
        )
        history = trainer.train()
        return Trained(parameters=full_parameters(trainer.model), history=history)
