"""What happens before the first step: model, optimizer and schedule, in the one order that is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import (
    attention,
    initialization,
    liger,
    lora,
    optimization,
    orthogonal,
    parallel,
)
from pytest_ranks.reference import model as models
from pytest_ranks.reference.saving import SavingSteps

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.optim import Optimizer


class PreparationSteps(SavingSteps):
    """The steps of `Trainer` that prepare model, optimizer and schedule; each can be overridden there."""

    wrapped: nn.Module | None
    weights: str | Path | None
    kernels: liger.KernelReport | None = None

    def setup(self) -> None:
        """Prepare model, optimizer and schedule in the one order that is right; once."""
        if self.wrapped is not None:
            return
        total_steps = self.total_steps()
        if total_steps is None:
            self.check_schedule()
        self.schedule_ends_at = None if self.config.schedule == "constant" else total_steps
        self.seed()
        self.masters()
        if self.config.lora_rank is not None:
            self.add_adapters()
        values_come_later = self.config.initialization != "full"
        if not values_come_later:
            self.model.to(self.world.device)
        if self.config.liger:
            self.kernels = self.apply_kernels()
        if not values_come_later:
            self.try_attention()
        if self.config.orthogonal_rank_ratio is not None:
            self.split_weights()
        if self.config.activation_checkpointing:
            self.checkpoint_activations()
        self.wrapped = self.parallelize()
        if values_come_later:
            self.try_attention()
            parallel.reshard(self.model)
        # After sharding: FSDP2 replaces the parameters, and an optimizer on the old ones would
        # train nothing (https://github.com/pytorch/pytorch/issues/149205).
        self.optimizer = self.build_optimizer(self.parameter_groups())
        self.scheduler = optimization.make_scheduler(self.optimizer, self.config, total_steps or 1)
        if self.config.resume_from is not None:
            self.load(self.find(Path(self.config.resume_from)))
        self.set_train_mode()

    def check_schedule(self) -> None:
        """Refuse a learning rate that falls towards an end that cannot be known.

        Raises:
            BadInputError: it would.
        """
        if self.config.schedule != "constant":
            raise BadInputError(
                f"schedule={self.config.schedule!r} with max_tokens={self.config.max_tokens!r} "
                "needs samples with an attribute counted (the trained tokens of each), as "
                "JsonlDataset has; give them, or use schedule='constant'."
            )

    def seed(self) -> None:
        """Seed each rank's own randomness, once: equal dropout masks on all ranks waste ranks."""
        torch.manual_seed(self.config.seed + self.world.rank)

    def masters(self) -> None:
        """Train float32 parameters, also where computation is in bfloat16."""
        models.float32_masters(self.model)

    def add_adapters(self) -> None:
        """Freeze the model and train adapters beside it."""
        self.lora_settings = lora.add_adapters(self.model, self.config)

    def try_attention(self) -> None:
        """Choose the attention, and try what is claimed of it, on the model as it is now."""
        used = self.choose_attention()
        if self.config.packed:
            with attention.computing_for(used, self.world.device):
                self.check_isolation()

    def choose_attention(self) -> str:
        """Let the model compute with the configured attention; return its name."""
        return attention.choose_attention(
            self.model,
            self.config.attention,
            device=self.world.device,
            precision=self.config.precision,
            keywords=self.keywords,
        )

    def check_isolation(self) -> None:
        """Refuse to pack for a model whose packed documents would see each other.

        Raises:
            BadInputError: they would.
        """
        if not models.keeps_documents_apart(self.model, self.keywords):
            raise BadInputError(
                f"packing: {type(self.model).__name__} does not keep packed documents apart: "
                "changing one changed another's logits. Train it without max_tokens_per_rank and "
                "pack_length; models that go by position_ids (Llama, Qwen, GPT-2 and most others) "
                "can be packed."
            )
        several = self.config.pack_length is not None and self.config.micro_batch > 1
        if several and not models.keeps_documents_apart(self.model, self.keywords, rows=2):
            raise BadInputError(
                f"pack_length: {type(self.model).__name__} keeps packed documents apart in one row "
                f"and not in the micro_batch={self.config.micro_batch!r} rows of one forward, as "
                "with flash-attn; use micro_batch=1 with more gradient_accumulation_steps, or "
                "attention='sdpa'."
            )

    def apply_kernels(self) -> liger.KernelReport:
        """Let layers compute with Liger's kernels; while they are whole, so that each can be tried."""
        liger.check_available(self.world.device, precision=self.config.precision)
        return liger.apply_kernels(self.model)

    def split_weights(self) -> None:
        """Freeze each weight's high subspace; a resumed run finds its factors in the checkpoint."""
        assert self.config.orthogonal_rank_ratio is not None
        orthogonal.split_model(
            self.model,
            rank_ratio=self.config.orthogonal_rank_ratio,
            patterns=self.config.orthogonal_targets,
            world=self.world,
            decompose=self.config.resume_from is None,
        )

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, dropout masks included."""
        parallel.recompute_activations(self.model)

    def mixed_precision(self) -> MixedPrecisionPolicy:
        """Say what FSDP2 computes in and what it reduces in."""
        return parallel.precision_policy(self.config.precision)

    def parallelize(self) -> nn.Module:
        """Wrap or shard the model; return the module to call."""
        match self.config.initialization:
            case "broadcast":
                initialization.shard_from_first_rank(self.model, self.world, self.mixed_precision())
                return self.model
            case "sharded":
                assert self.weights is not None
                initialization.shard_from_files(
                    self.model, self.weights, self.world, self.mixed_precision()
                )
                return self.model
        return parallel.parallelize(
            self.model, self.config.strategy, self.world, self.mixed_precision()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Decay matrices, not norms and biases."""
        return optimization.decay_groups(self.model, self.config.weight_decay)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the configured optimizer."""
        return optimization.make_optimizer(groups, self.config)

    def set_train_mode(self) -> None:
        """Turn dropout on; also after each evaluation."""
        self.model.train()
