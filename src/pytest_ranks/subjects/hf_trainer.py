"""transformers' `Trainer`, unmodified, as a subject: also the model for an adapter of your own trainer.

An adapter says to the trainer what the job says, switches off every default that the job does not say, and repairs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytest_ranks.conformance import Capabilities, Job, Trained, full_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import TrainingArguments

IGNORE = -100
"""The label that is left out of the loss."""

EXPECTED_FAILURES: dict[str, str] = {
    "loss.any_forward": (
        "a model whose forward takes no **kwargs is trained on the mean of micro-batch means: "
        "https://github.com/huggingface/transformers/issues/37766"
    ),
    "data_loading.random_numbers_differ[ddp-2]": (
        "set_seed gives every rank the same random numbers, so that dropout masks are the same on all: "
        "https://github.com/huggingface/transformers/issues/31412"
    ),
}
"""Seen with transformers 5.17 and 5.23; the documentation's page "Found in the wild" says more."""


def padding_collator(
    pad_token_id: int,
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Return a collator that pads on the right, by length: comparing with the padding id would mask a real EOS too.

    Args:
        pad_token_id: what input ids are padded with.
    """
    import torch

    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for sample in samples:
            length = len(sample["input_ids"])
            rest = longest - length
            columns["input_ids"].append([*sample["input_ids"], *[pad_token_id] * rest])
            columns["attention_mask"].append([1] * length + [0] * rest)
            columns["labels"].append([*sample["labels"], *[IGNORE] * rest])
        return {name: torch.tensor(rows) for name, rows in columns.items()}  # int64 [B, T]

    return collate


class HFTrainer:
    """transformers' `Trainer`: on one process, or with DDP where there are ranks.

    It takes the process group that it finds, so it is left to us. FSDP is not declared: on CPU the Trainer accepts
    `fsdp=True` and wraps the model in DDP.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        world_sizes={1, 2, 4},
        strategies={"single", "ddp"},
        gradient_accumulation=True,
        clip=True,
        precision={"fp32", "bf16"},
        optimizers={"sgd", "adamw"},
        activation_checkpointing=True,
        tail="pad",  # accelerate's even_batches: the last batches of an epoch draw its first samples again
    )
    expected_failures: ClassVar[Mapping[str, str]] = EXPECTED_FAILURES

    def train(self, job: Job) -> Trained:
        """Train on `job.samples`."""
        from transformers import Trainer
        from transformers.trainer_callback import PrinterCallback

        trainer = Trainer(
            model=job.build_model(),
            args=self.arguments(job),
            train_dataset=job.samples,  # itself, not a copy: reading a sample is part of training
            data_collator=padding_collator(job.pad_token_id),
        )
        trainer.remove_callback(PrinterCallback)  # it prints each row of the log
        trainer.train()
        history = [
            {
                "step": row["step"],
                "loss": row["loss"],
                "lr": row["learning_rate"],
                "grad_norm": row["grad_norm"],
            }
            for row in trainer.state.log_history
            if "loss" in row
        ]
        return Trained(parameters=full_parameters(trainer.model), history=history)

    def arguments(self, job: Job) -> TrainingArguments:
        """Return the `TrainingArguments` that say what the job says."""
        from transformers import TrainingArguments

        optimizer = job.optimizer
        schedule: str = job.schedule
        if schedule == "constant" and job.warmup_steps:
            schedule = "constant_with_warmup"  # "constant" ignores warmup_steps
        settings: dict[str, Any] = {
            "output_dir": job.out_dir,
            "use_cpu": job.device == "cpu",
            "per_device_train_batch_size": job.micro_batch,
            "gradient_accumulation_steps": job.gradient_accumulation_steps,
            "max_steps": job.max_steps or -1,
            "num_train_epochs": job.epochs or 1,
            "train_sampling_strategy": "random" if job.shuffle else "sequential",
            "seed": job.seed,
            "optim": {"sgd": "sgd", "adamw": "adamw_torch"}[optimizer.name],
            "learning_rate": optimizer.lr,
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_epsilon": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "lr_scheduler_type": schedule,
            "warmup_steps": job.warmup_steps,
            "max_grad_norm": job.max_grad_norm or 0.0,  # 0 is off; the default is 1.0
            "bf16": job.precision == "bf16",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # the default logs an average in place of a NaN
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
        }
        if job.activation_checkpointing:
            # transformers 5.23 deprecates the name that 5.17 knows only.
            known = TrainingArguments.__dataclass_fields__
            new, old = "activation_checkpointing", "gradient_checkpointing"
            settings[new if new in known else old] = True
        return TrainingArguments(**settings)
