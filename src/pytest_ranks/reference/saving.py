"""What outlives a run: checkpoints to go on from, and the finished model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.reference import checkpoint, export, lora
from pytest_ranks.reference.batches import BatchSteps

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


class SavingSteps(BatchSteps):
    """The steps of `Trainer` that write and read files; each can be overridden there."""

    tokenizer: Any
    lora_settings: Any
    """peft's configuration of the adapters; None without any."""
    optimizer: Optimizer
    scheduler: LambdaLR

    def settings(self) -> dict[str, Any]:
        """Return what must be equal for a resumed run to go on exactly as it would have."""
        names = [
            *("micro_batch", "gradient_accumulation_steps", "max_tokens_per_rank", "pack_length"),
            *("packer", "shuffle", "seed", "tail", "optimizer"),
            *("orthogonal_rank_ratio", "orthogonal_targets"),
        ]
        if self.config.lora_rank is not None:
            names += ["lora_rank", "lora_alpha", "lora_targets", "lora_dropout"]
        data = {"samples": len(self.samples), "data": getattr(self.samples, "fingerprint", None)}
        return {name: getattr(self.config, name) for name in names} | data

    def save(self, path: Path) -> None:
        """Write a checkpoint: after the step, with everything that the next one depends on."""
        progress = {"step": self.steps_taken, "epoch": self.epoch, "cursor": self.cursor}
        checkpoint.save_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=progress,
            settings=self.settings(),
            world=self.world,
        )

    def load(self, path: Path) -> None:
        """Continue from a checkpoint: parameters, moments, schedule, randomness, place in data."""
        progress = checkpoint.load_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            settings=self.settings(),
            world=self.world,
        )
        self.steps_taken = progress["step"]
        self.epoch = progress["epoch"]
        self.cursor = progress["cursor"]

    def export(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the trained model as a folder that `from_pretrained` loads (a collective).

        Of adapters, `lora_export` says whether they are merged into it or written alone.
        """
        state = None
        if self.lora_settings is not None:
            if self.config.lora_export == "adapter":
                return lora.save_adapter(
                    self.model, Path(directory), settings=self.lora_settings, world=self.world
                )
            state = lora.merged_state(self.model, dtype=dtype)
        return export.export_model(
            self.model,
            Path(directory),
            world=self.world,
            tokenizer=self.tokenizer,
            dtype=dtype,
            state=state,
        )
