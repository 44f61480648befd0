"""The training loop. Read `train`, `train_step` and `update` first: the rest are their steps.

Each step is a method of a few lines, so that a subclass can change one decision and nothing else.
Those that choose samples and make tensors are in `batches.py`.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import (
    checkpoint,
    export,
    loss,
    metrics,
    optimization,
    parallel,
)
from pytest_ranks.reference import model as models
from pytest_ranks.reference.batches import BatchSteps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from pytest_ranks.reference.collate import MicroBatch
    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.data import Samples

    Record = dict[str, Any]

FORWARD_KEYWORDS = ("input_ids", "position_ids", "attention_mask", "use_cache")


class Trainer(BatchSteps):
    """Train a causal language model on tokenised samples.

    Every rank makes one with the same arguments and calls `train`. `model` is trained in place
    (sharded in place under FSDP2); `history` has one record a step.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module,
        samples: Samples,
        tokenizer: Any = None,
        eval_samples: Samples | None = None,
        on_step: Callable[[Record], None] | None = None,
    ) -> None:
        """Prepare; nothing is trained and nothing is written yet.

        Args:
            config: how to train.
            model: called with those of `FORWARD_KEYWORDS` that its forward accepts; returns an
                object with `logits`.
            samples: what to train on; each is drawn once an epoch, on the rank that trains on it.
            tokenizer: saved beside exports, and asked for the padding token.
            eval_samples: what to evaluate on.
            on_step: called with each record, on rank 0 (a progress bar).

        Raises:
            BadInputError: the arguments do not go together.
        """
        self.config = config
        self.world = parallel.find_world(config)
        self.model = model
        self.samples = samples
        self.tokenizer = tokenizer
        self.eval_samples = eval_samples
        self.on_step = on_step
        self.keywords = models.accepted_keywords(model.forward, FORWARD_KEYWORDS)
        self.pad_id = models.padding_id(model, tokenizer)
        self.global_batch = (
            config.micro_batch * config.gradient_accumulation_steps * self.world.size
        )
        self.lengths = self.measure(samples)
        self.eval_lengths = None if eval_samples is None else self.measure(eval_samples)
        self.history: list[Record] = []
        self.steps_taken = 0
        self.epoch = 0
        self.cursor = 0
        self.wrapped: nn.Module | None = None
        self.optimizer: Optimizer
        self.scheduler: LambdaLR
        self.metrics: metrics.MetricsLog

    # ---- a run ------------------------------------------------------------------------------

    def train(self) -> list[Record]:
        """Train to the end that the config names; return a record for each step.

        Returns:
            Records with `step`, `epoch`, `loss` (mean over the global batch's counted tokens), `lr`
            (that this step used), `grad_norm` (before clipping), `tokens` (counted), `samples`,
            `seconds`; `eval_loss` where there was an evaluation; `note` on a step that was skipped.
        """
        self.setup()
        resumed_at = self.steps_taken if self.config.resume_from is not None else None
        with metrics.MetricsLog(self.metrics_path(), resumed_at=resumed_at) as self.metrics:
            for window, last_of_epoch in self.windows():
                record = self.train_step(window)
                if self.evaluation_due(last_of_epoch=last_of_epoch):
                    record["eval_loss"] = self.evaluate()
                self.log(record)
                every = self.config.checkpoint_every
                if every is not None and self.steps_taken % every == 0:
                    assert self.config.out_dir is not None
                    out_dir = Path(self.config.out_dir)
                    self.save(checkpoint.checkpoint_path(out_dir, self.steps_taken))
        return self.history

    def train_step(self, window: list[int]) -> Record:
        """Train on one global batch, given as the samples' indices; make one optimizer step."""
        started = time.perf_counter()
        rows = self.shard(self.pack(window, self.lengths))
        batches = [self.collate(self.draw(each, self.samples)) for each in rows]
        tokens = self.count(batches)
        record: Record = {"step": self.steps_taken + 1, "epoch": self.epoch}
        record |= {"lr": self.optimizer.param_groups[0]["lr"]}
        record |= {"tokens": tokens, "samples": len(window)}
        if tokens > 0:
            record |= self.update(batches, tokens)
        else:
            note = "no token of this batch is trained: no step was made"
            record |= {"loss": 0.0, "grad_norm": 0.0, "note": note}
        self.steps_taken += 1
        return record | {"seconds": time.perf_counter() - started}

    def update(self, batches: list[MicroBatch], tokens: int) -> Record:
        """Add up the gradients of this rank's micro-batches and make one optimizer step."""
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            with self.sync(last=number == len(batches) - 1):
                cross_entropy = self.cross_entropy(self.forward(batch), batch.labels)
                self.backward(self.scale(cross_entropy, tokens))
            total += cross_entropy.detach()
        grad_norm = self.clip()
        self.step()
        self.schedule()
        self.zero()
        return {"loss": self.mean_loss(total, tokens), "grad_norm": grad_norm}

    # ---- before the first step --------------------------------------------------------------

    def setup(self) -> None:
        """Prepare model, optimizer and schedule in the one order that is right; once."""
        if self.wrapped is not None:
            return
        total_steps = self.total_steps()
        self.seed()
        self.masters()
        self.model.to(self.world.device)
        if self.config.packed:
            self.check_isolation()
        if self.config.activation_checkpointing:
            self.checkpoint_activations()
        self.wrapped = self.parallelize()
        # After sharding: FSDP2 replaces the parameters, and an optimizer on the old ones would
        # train nothing (https://github.com/pytorch/pytorch/issues/149205).
        self.optimizer = self.build_optimizer(self.parameter_groups())
        self.scheduler = optimization.make_scheduler(self.optimizer, self.config, total_steps)
        if self.config.resume_from is not None:
            self.load(checkpoint.find_checkpoint(Path(self.config.resume_from)))
        self.set_train_mode()

    def seed(self) -> None:
        """Seed each rank's own randomness, once: equal dropout masks on all ranks waste ranks."""
        torch.manual_seed(self.config.seed + self.world.rank)

    def masters(self) -> None:
        """Train float32 parameters, also where computation is in bfloat16."""
        models.float32_masters(self.model)

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

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, dropout masks included."""
        parallel.recompute_activations(self.model)

    def mixed_precision(self) -> MixedPrecisionPolicy:
        """Say what FSDP2 computes in and what it reduces in."""
        return parallel.precision_policy(self.config.precision)

    def parallelize(self) -> nn.Module:
        """Wrap or shard the model; return the module to call."""
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

    # ---- forward and backward ---------------------------------------------------------------

    def count(self, batches: list[MicroBatch]) -> int:
        """Count the trained tokens of the global batch: every rank, every micro-batch."""
        counts = [loss.counted_targets(batch.labels) for batch in batches]
        return int(self.world.sum(torch.stack(counts).sum()).item())

    def sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Hold back gradient reduction until the global batch's last micro-batch."""
        assert self.wrapped is not None
        return parallel.gradient_sync(self.wrapped, last=last)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in bfloat16 where FSDP2's policy does not already see to it."""
        if self.config.precision == "bf16" and self.config.strategy != "fsdp2":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return the logits, [B, T, V]. The loss is ours: the model is given no labels."""
        assert self.wrapped is not None
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        with self.autocast():
            output = self.wrapped(
                **{name: inputs[name] for name in inputs if name in self.keywords}
            )
        logits: Tensor = output.logits
        return logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross entropy of the micro-batch's trained tokens."""
        return loss.shifted_cross_entropy_sum(logits, labels)

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        """Weigh every token of the global batch with 1 / tokens.

        DDP and FSDP2 average gradients over ranks: the factor turns their mean into the sum.
        """
        return cross_entropy * self.world.size / tokens

    def backward(self, scaled: Tensor) -> None:
        """Add this micro-batch's gradients."""
        torch.autograd.backward(scaled)

    # ---- the update -------------------------------------------------------------------------

    def clip(self) -> float:
        """Shorten the gradient of all parameters together; return its norm from before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = optimization.global_grad_norm(parameters).item()
        if self.config.max_grad_norm is not None:
            optimization.clip_gradients(parameters, norm, self.config.max_grad_norm)
        return norm

    def step(self) -> None:
        """Update the parameters."""
        self.optimizer.step()

    def schedule(self) -> None:
        """Move the learning rate on: once an optimizer step, whatever the world size."""
        self.scheduler.step()

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    # ---- reports ----------------------------------------------------------------------------

    def mean_loss(self, cross_entropy: Tensor, tokens: int) -> float:
        """Return the mean loss of the global batch's trained tokens, over all ranks."""
        return float(self.world.sum(cross_entropy).item() / tokens)

    def log(self, record: Record) -> None:
        """Keep a record; a loss that is not finite is shown as it is."""
        self.history.append(record)
        self.metrics.write(record)
        if self.on_step is not None and self.world.rank == 0:
            self.on_step(record)

    def metrics_path(self) -> Path | None:
        """Return the file that rank 0 writes its records to."""
        if self.config.out_dir is None or self.world.rank != 0:
            return None
        return Path(self.config.out_dir) / "metrics.jsonl"

    def evaluation_due(self, *, last_of_epoch: bool) -> bool:
        """Whether to evaluate after this step."""
        if self.eval_samples is None:
            return False
        if self.config.eval_every is None:
            return last_of_epoch or self.finished()
        return self.steps_taken % self.config.eval_every == 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss of the evaluation set's tokens, each counted once."""
        assert self.eval_samples is not None
        everything = list(range(len(self.eval_samples)))
        total = torch.zeros((), device=self.world.device)
        tokens = 0
        self.model.eval()
        for start in range(0, len(everything), self.global_batch):
            window = everything[start : start + self.global_batch]
            rows = self.shard(self.pack(window, self.eval_lengths))
            batches = [self.collate(self.draw(each, self.eval_samples)) for each in rows]
            tokens += self.count(batches)
            for batch in batches:
                total += loss.shifted_cross_entropy_sum(self.forward(batch), batch.labels)
        parallel.reshard(self.model)
        self.set_train_mode()
        return self.mean_loss(total, tokens) if tokens else 0.0

    # ---- what outlives the run --------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return what must be equal for a resumed run to go on exactly as it would have."""
        names = [
            *("micro_batch", "gradient_accumulation_steps", "max_tokens_per_rank", "pack_length"),
            *("packer", "shuffle", "seed", "tail", "optimizer"),
        ]
        return {name: getattr(self.config, name) for name in names} | {"samples": len(self.samples)}

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
        """Write the trained model as a folder that `from_pretrained` loads (a collective)."""
        return export.export_model(
            self.model, Path(directory), world=self.world, tokenizer=self.tokenizer, dtype=dtype
        )
