"""What outlives a run: checkpoints to go on from, and the finished model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import cadence, checkpoint, checkpoint_files, export, lora
from pytest_ranks.reference.background import BackgroundWriter
from pytest_ranks.reference.batches import BatchSteps

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from pytest_ranks.reference.metrics import MetricsLog


class SavingSteps(BatchSteps):
    """The steps of `Trainer` that write and read files; each can be overridden there."""

    metrics: MetricsLog
    tokenizer: Any
    lora_settings: Any
    """peft's configuration of the adapters; None without any."""
    optimizer: Optimizer
    scheduler: LambdaLR
    schedule_ends_at: int | None = None
    """The step at which the learning rate comes to zero; None where it is constant."""
    writer: BackgroundWriter | None = None
    """Writes beside training; None where a save waits for its file."""
    saved_step: int | None = None
    """The step that the output folder's newest checkpoint of this run is of."""
    diverged_at: int | None = None
    """The first step whose loss or gradient was not finite; nothing is saved from it on."""

    def settings(self) -> dict[str, Any]:
        """Return what must be equal for a resumed run to go on exactly as it would have."""
        names = [
            *("micro_batch", "gradient_accumulation_steps", "max_tokens_per_rank", "pack_length"),
            *("packer", "shuffle", "seed", "tail", "optimizer", "lr", "betas", "eps"),
            *("weight_decay", "schedule", "warmup_steps", "max_grad_norm", "precision"),
            *("orthogonal_rank_ratio", "orthogonal_targets"),
        ]
        if self.config.lora_rank is not None:
            names += ["lora_rank", "lora_alpha", "lora_targets", "lora_dropout"]
        data = {"samples": len(self.samples), "data": getattr(self.samples, "fingerprint", None)}
        schedule = {"schedule_ends_at": self.schedule_ends_at}
        return {name: getattr(self.config, name) for name in names} | schedule | data

    # ---- checkpoints ------------------------------------------------------------------------

    def saving_due(self, *, trained: int, last_of_epoch: bool, best: bool) -> bool:
        """Whether to save after this step."""
        return cadence.is_saving_due(
            self.config, self.progress, trained=trained, last_of_epoch=last_of_epoch, best=best
        )

    def note_divergence(self, record: dict[str, Any]) -> None:
        """Keep parameters that are no numbers from taking the place of a checkpoint that can be used."""
        finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        if not finite and self.diverged_at is None:
            self.diverged_at = record["step"]
            record["note"] = "the loss or the gradient is not finite: nothing is saved from here on"

    def save_here(self) -> None:
        """Save into the output folder, if there is one, and this moment is neither there nor diverged."""
        if self.config.out_dir is None or self.saved_step == self.steps_taken:
            return
        if self.diverged_at is not None:
            return
        self.metrics.sync()  # records are on the disk before the checkpoint that they led to
        self.save(checkpoint.checkpoint_path(Path(self.config.out_dir), self.steps_taken))
        self.saved_step = self.steps_taken

    def save(self, path: Path) -> None:
        """Write a checkpoint: after the step, with everything that the next one depends on."""
        checkpoint.save_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            progress=dataclasses.asdict(self.progress),
            settings=self.settings(),
            world=self.world,
            write=self.write,
        )

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """Write the file, now or beside training, on rank 0."""
        if self.writer is None:
            self.write_and_prune(path, state)
        else:
            self.writer.submit(self.write_and_prune, path, checkpoint.staged(state))

    def write_and_prune(self, path: Path, state: dict[str, Any]) -> None:
        """Write the file; then, and only then, let go of older ones."""
        checkpoint_files.write_checkpoint(path, state)
        best = state["progress"]["best_step"]
        if self.config.checkpoint_best and best is not None:
            checkpoint_files.point_to_best(path.parent, best)
        if self.config.keep_checkpoints is not None:
            checkpoint_files.prune(
                path.parent,
                newest=state["progress"]["step"],
                keep=self.config.keep_checkpoints,
                protected=() if best is None else (best,),
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have files written beside training, if asked to, and be done with it at the end."""
        if not self.config.async_checkpoints:
            yield
            return
        self.writer = BackgroundWriter()
        try:
            yield
        finally:
            writer, self.writer = self.writer, None
            writer.close()
        self.world.barrier()  # no rank leaves before rank 0 has written

    def check_writer(self) -> None:
        """Raise what went wrong beside training since the last step."""
        if self.writer is not None:
            self.writer.check()

    # ---- resuming ---------------------------------------------------------------------------

    def find(self, given: Path) -> Path:
        """Return the checkpoint to resume from: rank 0 looks, and all ranks take the same.

        Raises:
            BadInputError: a folder has none.
        """
        found: Path | BadInputError | None = None
        if self.world.rank == 0:
            try:
                found = checkpoint.find_checkpoint(given)
            except BadInputError as error:
                found = error
        found = self.world.share(found)
        if isinstance(found, BadInputError):
            raise found
        assert found is not None
        return found

    def load(self, path: Path) -> None:
        """Continue from a checkpoint: parameters, moments, schedule, randomness, place in data."""
        progress = checkpoint.load_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            settings=self.settings(),
            world=self.world,
            elastic=self.config.elastic,
        )
        self.progress = cadence.Progress(**progress)
        if (
            self.config.out_dir is not None
            and path.parent.resolve() == Path(self.config.out_dir).resolve()
        ):
            self.saved_step = self.steps_taken

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
