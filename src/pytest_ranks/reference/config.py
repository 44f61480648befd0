"""What a training run is told: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.cadence import check_loop

LARGEST_SEED = 2**62
"""Ranks, epochs and steps are added to it, and generators take 64 bits."""

CHOICES = {
    "tail": ("partial", "drop", "pad"),
    "packer": ("level", "lpt", "greedy"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("constant", "linear", "cosine"),
    "precision": ("fp32", "bf16"),
    "strategy": ("single", "ddp", "fsdp2"),
    "lora_export": ("merged", "adapter"),
    "attention": ("auto", "flash_attention_2", "varlen", "sdpa", "eager"),
    "initialization": ("full", "broadcast", "sharded"),
}
"""The fields that take one of a few names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Say how to train; every field is checked when the object is made.

    The global batch is `micro_batch * gradient_accumulation_steps * data-parallel size` samples;
    one optimizer step trains on one global batch, whatever the packing.

    Attributes:
        micro_batch: rows a rank puts through one forward (one sample a row, unless packed).
        gradient_accumulation_steps: forwards a rank makes for one optimizer step.
        max_tokens_per_rank: packing by step: the global batch is packed into as few micro-batches
            as the packer finds, each one row of at most this many tokens a rank.
        pack_length: packing by rows: the global batch is packed into rows of at most this many
            tokens, and `micro_batch` such rows go through one forward.
        packer: "level" (the fewest micro-batches, the least waiting), "lpt" (even loads, few
            micro-batches) or "greedy" (keeps the order).
        max_steps: stop after this many optimizer steps; epochs follow each other as needed.
        epochs: stop after this many passes over the samples.
        max_tokens: stop after the step with which this many tokens are trained (those that count
            towards the loss, over all ranks).
        until_stopped: go on until a signal or `Trainer.stop` ends the run. Exactly one of the four
            is given.
        shuffle: draw each epoch in its own order, `randperm(seed + epoch)`.
        seed: of the data order; `seed + rank` seeds each rank's own randomness (dropout).
        tail: the last, short global batch of an epoch: "partial" trains on what there is with its
            own token count, "drop" leaves it out, "pad" fills it from the epoch's start.
        optimizer: "adamw" or "sgd" (no momentum).
        lr: the peak learning rate.
        betas: AdamW's two decay rates.
        eps: AdamW's denominator term.
        weight_decay: decoupled for AdamW; on parameters of two or more dimensions only.
        schedule: "constant", "linear" or "cosine" (both to zero at the last step).
        warmup_steps: steps over which the learning rate climbs from zero.
        max_grad_norm: clip the global gradient norm to this; None: off.
        precision: "fp32", or "bf16" (compute in bfloat16; parameters, gradients that are reduced
            and optimizer state stay float32).
        strategy: "single" (one process), "ddp" or "fsdp2" (an initialised process group).
        initialization: under FSDP2, where parameters come from: "full" (every rank has the model),
            "broadcast" (rank 0 has it and sends each rank its rows) or "sharded" (each rank reads
            its rows from the model's files).
        activation_checkpointing: recompute each block's activations in the backward pass.
        attention: "auto" (flash-attn where it is installed and can run, else what the model was
            loaded with), "flash_attention_2", "varlen" (torch's variable-length kernel on CUDA;
            document by document on the CPU), "sdpa" or "eager".
        lora_rank: train adapters of this rank beside frozen linear layers; None: everything.
        lora_alpha: what they learn is added times alpha / rank; None: twice the rank.
        lora_targets: names of the layers that get one; None: every linear layer but the head.
        lora_dropout: on what goes into an adapter.
        lora_export: "merged" (a model like any other) or "adapter" (for peft, without the model).
        orthogonal_rank_ratio: orthogonal subspace fine-tuning: the share of each weight's singular
            directions that is trained, 0 to 1; the others are frozen. None: off.
        orthogonal_targets: the linear layers that it splits, as patterns for their names or the
            ends of these ("q_proj", "mlp.*"); None: all that are in the model's blocks.
        liger: compute with Liger's Triton kernels where the model's layers have one, and the loss.
        device: "auto" (the accelerator if there is one, else cpu), or a torch device.
        eval_every: evaluate every so many steps; None: at the end of each epoch.
        eval_at_start: evaluate before the first step too.
        validation_split: the share of the samples that is held out for evaluation; 0: none.
        checkpoint_every: save every so many steps; None: not by steps.
        checkpoint_every_samples: save each time another so many samples are trained.
        checkpoint_each_epoch: save at the end of each epoch.
        checkpoint_best: save after each evaluation that is the best so far.
        keep_checkpoints: keep so many of the newest, and the best; None: all.
        async_checkpoints: write files in a thread while training goes on.
        elastic: resume on another number of ranks, with the same global batch.
        resume_from: a checkpoint, or a folder whose newest whole one is taken.
        out_dir: where metrics and checkpoints go; None: nothing is written.
        tensorboard: write event files for TensorBoard there too.
        wandb: log to Weights & Biases; project, key and mode are those of the environment.
    """

    micro_batch: int = 1
    gradient_accumulation_steps: int = 1
    max_tokens_per_rank: int | None = None
    pack_length: int | None = None
    packer: str = "lpt"
    max_steps: int | None = None
    epochs: int | None = None
    max_tokens: int | None = None
    until_stopped: bool = False
    shuffle: bool = True
    seed: int = 0
    tail: str = "partial"
    optimizer: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    precision: str = "fp32"
    strategy: str = "single"
    initialization: str = "full"
    activation_checkpointing: bool = False
    attention: str = "auto"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    lora_export: str = "merged"
    orthogonal_rank_ratio: float | None = None
    orthogonal_targets: tuple[str, ...] | None = None
    liger: bool = False
    device: str = "auto"
    eval_every: int | None = None
    eval_at_start: bool = False
    validation_split: float = 0.0
    checkpoint_every: int | None = None
    checkpoint_every_samples: int | None = None
    checkpoint_each_epoch: bool = False
    checkpoint_best: bool = False
    keep_checkpoints: int | None = None
    async_checkpoints: bool = False
    elastic: bool = False
    resume_from: str | Path | None = None
    out_dir: str | Path | None = None
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            BadInputError: a field has a value outside its range, or two fields contradict.
        """
        for name, known in CHOICES.items():
            found = getattr(self, name)
            if found not in known:
                names = ", ".join(repr(one) for one in known)
                raise BadInputError(
                    f"{name}={found!r} is not known; use one of {names}."
                    f"{did_you_mean(str(found), known)}"
                )
        self._check_counts()
        self._check_rates()
        self._check_orthogonal()
        self._check_liger()
        self._check_lora()
        check_loop(self)
        if self.max_tokens_per_rank is not None and self.pack_length is not None:
            raise BadInputError(
                f"found max_tokens_per_rank={self.max_tokens_per_rank!r} and "
                f"pack_length={self.pack_length!r}; give one of them: a batch is packed by step or "
                "by rows, not both."
            )
        if self.initialization != "full" and self.strategy != "fsdp2":
            raise BadInputError(
                f"initialization={self.initialization!r} needs strategy='fsdp2', found "
                f"strategy={self.strategy!r}: elsewhere every rank holds the whole model."
            )
        if self.initialization != "full" and self.orthogonal_rank_ratio is not None:
            raise BadInputError(
                f"initialization={self.initialization!r} gives parameters their values after they "
                "are cut, and orthogonal_rank_ratio splits whole ones; use initialization='full'."
            )

    def _check_counts(self) -> None:
        at_least_one = (
            *("micro_batch", "gradient_accumulation_steps", "max_tokens_per_rank", "pack_length"),
            *("max_steps", "epochs", "max_tokens", "eval_every", "checkpoint_every"),
            *("checkpoint_every_samples", "keep_checkpoints", "lora_rank"),
        )
        lowest = dict.fromkeys(at_least_one, 1) | {"seed": 0, "warmup_steps": 0}
        optional = {field.name for field in dataclasses.fields(self) if "None" in str(field.type)}
        for name, low in lowest.items():
            found: Any = getattr(self, name)
            if found is None and name in optional:
                continue
            if isinstance(found, bool) or not isinstance(found, int) or found < low:
                raise BadInputError(f"{name}={found!r} is not a whole number of at least {low}.")
        if self.seed > LARGEST_SEED:
            raise BadInputError(f"seed={self.seed!r} is more than {LARGEST_SEED}, the largest.")

    def _check_rates(self) -> None:
        for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
            found: Any = getattr(self, name)
            if found is None and name == "max_grad_norm":
                continue
            number = isinstance(found, int | float) and not isinstance(found, bool)
            if not number or not math.isfinite(found) or found < 0:
                raise BadInputError(f"{name}={found!r} is not a finite number of at least 0.")
        if self.max_grad_norm == 0:
            raise BadInputError(
                "max_grad_norm=0 would clip every gradient to nothing; use None to turn it off."
            )
        betas = tuple(self.betas)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise BadInputError(f"betas={self.betas!r} are not two numbers in [0, 1).")

    def _check_liger(self) -> None:
        if not isinstance(self.liger, bool):
            raise BadInputError(f"liger={self.liger!r} is not True or False.")
        if self.liger and self.initialization != "full":
            raise BadInputError(
                f"initialization={self.initialization!r} gives parameters their values after they "
                "are cut, and liger tries its kernels on whole layers; use initialization='full'."
            )

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            for name, off in (("lora_alpha", None), ("lora_targets", None), ("lora_dropout", 0.0)):
                if getattr(self, name) != off:
                    raise BadInputError(
                        f"{name}={getattr(self, name)!r} needs lora_rank, the adapters' rank."
                    )
            return
        targets: Any = self.lora_targets
        names = isinstance(targets, tuple) and all(isinstance(one, str) for one in targets)
        if targets is not None and not (names and targets):
            raise BadInputError(
                f"lora_targets={targets!r} is not a tuple of names; expected one or more, such as "
                "('q_proj', 'v_proj'), or None for every linear layer but the head."
            )
        alpha: Any = self.lora_alpha
        if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
            raise BadInputError(f"lora_alpha={alpha!r} is not a finite number above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise BadInputError(f"lora_dropout={self.lora_dropout!r} is not a number in [0, 1).")
        for name in ("initialization", "orthogonal_rank_ratio"):
            found = getattr(self, name)
            if found not in ("full", None):
                raise BadInputError(
                    f"found lora_rank={self.lora_rank!r} and {name}={found!r}; give one of them: "
                    "adapters are put beside a model that every rank holds whole and that stays "
                    "as it is."
                )

    def _check_orthogonal(self) -> None:
        ratio: Any = self.orthogonal_rank_ratio
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if ratio is not None and not (number and 0 <= ratio <= 1):
            raise BadInputError(
                f"orthogonal_rank_ratio={ratio!r} is not a number from 0 to 1; it is the share of "
                "each weight's singular directions that is trained."
            )
        targets: Any = self.orthogonal_targets
        if targets is None:
            return
        if ratio is None:
            raise BadInputError(
                f"orthogonal_targets={targets!r} needs orthogonal_rank_ratio, the share of each "
                "weight's singular directions that is trained."
            )
        listed = isinstance(targets, tuple) and len(targets) > 0
        if not listed or not all(isinstance(one, str) and one for one in targets):
            raise BadInputError(
                f"orthogonal_targets={targets!r} is not a tuple of patterns; expected one or more, "
                "such as ('q_proj', 'mlp.*')."
            )

    @property
    def packed(self) -> bool:
        """Whether several documents may share a row."""
        return self.max_tokens_per_rank is not None or self.pack_length is not None
