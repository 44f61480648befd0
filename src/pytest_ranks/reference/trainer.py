"""The training loop. Read `train` and `train_step` here and `update` in `updates.py` first.

Each step is a method of a few lines, so that a subclass can change one decision and nothing else.
Those that choose samples and make tensors are in `batches.py`, those before the first step in
`preparation.py`, those of forward, loss, backward and optimizer in `updates.py`, evaluation in
`evaluation.py`, checkpoints and export in `saving.py`; `cadence.py` says when.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.reference import initialization, metrics, parallel, trackers
from pytest_ranks.reference import model as models
from pytest_ranks.reference.cadence import Progress
from pytest_ranks.reference.evaluation import EvaluationSteps
from pytest_ranks.reference.preemption import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.data import Samples
    from pytest_ranks.reference.trackers import Tracker

    Record = dict[str, Any]

FORWARD_KEYWORDS = ("input_ids", "position_ids", "attention_mask", "use_cache")


class Trainer(EvaluationSteps):
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
        weights: str | Path | None = None,
        stop: StopRequest | None = None,
        own_trackers: Sequence[Tracker] = (),
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
            weights: the folder whose files the ranks read, for `initialization="sharded"`.
            stop: ends the run after a step when something asks it to (`preemption.listen`).
            own_trackers: shown each record, on rank 0; closed at the end of `train`.

        Raises:
            BadInputError: the arguments do not go together.
        """
        self.config = config
        self.world = parallel.find_world(config)
        self.model = model
        self.tokenizer = tokenizer
        self.samples, self.eval_samples = self.hold_out(samples, eval_samples)
        self.stop = stop or StopRequest()
        self.stopping = False
        self.own_trackers = own_trackers
        trackers.check_installed(config)
        self.on_step = on_step
        self.weights = weights
        self.lora_settings = None
        initialization.check_source(config.initialization, model, weights)
        self.keywords = models.accepted_keywords(model.forward, FORWARD_KEYWORDS)
        self.pad_id = models.padding_id(model, tokenizer)
        self.global_batch = (
            config.micro_batch * config.gradient_accumulation_steps * self.world.size
        )
        self.lengths = self.measure(self.samples)
        self.eval_lengths = None if self.eval_samples is None else self.measure(self.eval_samples)
        self.history: list[Record] = []
        self.progress = Progress()
        self.wrapped: nn.Module | None = None
        self.optimizer: Optimizer
        self.scheduler: LambdaLR
        self.metrics: metrics.MetricsLog

    clock = staticmethod(time.perf_counter)
    """Seconds that never go back; what records call `seconds` is measured with it."""

    # ---- a run ------------------------------------------------------------------------------

    def train(self) -> list[Record]:
        """Train to the end that the config names, or until a stop is requested.

        Returns:
            A record for each step, with `step`, `epoch`, `loss` (mean over the global batch's
            counted tokens), `lr` (that this step used), `grad_norm` (before clipping), `tokens`
            (counted), `samples`, `seconds`; `eval_loss` where there was an evaluation; `note` on a
            step that was skipped, and where an evaluation was. `stopping` says whether a request
            ended the run.
        """
        self.setup()
        with self.reporting(), self.writing():
            self.begin()
            for window, last_of_epoch in self.windows():
                record, best = self.train_step(window), False
                self.note_divergence(record)
                if self.evaluation_due(last_of_epoch=last_of_epoch):
                    best = self.evaluate_into(record)
                self.log(record)
                self.check_writer()
                if self.saving_due(trained=len(window), last_of_epoch=last_of_epoch, best=best):
                    self.save_here()
            if self.stopping:
                self.save_here()
        return self.history

    def begin(self) -> None:
        """Agree on a request to stop that came before the first step; evaluate, if that is asked."""
        self.add_up(torch.zeros((), device=self.world.device))
        if self.config.eval_at_start and self.steps_taken == 0 and not self.stopping:
            record: Record = {"step": 0, "epoch": 0}
            self.evaluate_into(record)
            self.report(record)

    def train_step(self, window: list[int]) -> Record:
        """Train on one global batch, given as the samples' indices; make one optimizer step."""
        started = self.clock()
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
            self.add_up(torch.zeros((), device=self.world.device))
        self.steps_taken += 1
        self.tokens_trained += tokens
        self.samples_trained += len(window)
        return record | {"seconds": self.clock() - started}

    # ---- reports ----------------------------------------------------------------------------

    def log(self, record: Record) -> None:
        """Keep a record; a loss that is not finite is shown as it is."""
        self.history.append(record)
        self.report(record)
        if self.on_step is not None and self.world.rank == 0:
            self.on_step(record)

    def report(self, record: Record) -> None:
        """Write a record down, and show it to the trackers; both are there on rank 0 only."""
        self.metrics.write(record)
        self.trackers.log(record)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Have the metrics file and the trackers open, however the run ends."""
        resumed_at = self.steps_taken if self.config.resume_from is not None else None
        shown: list[Tracker] = []
        if self.world.rank == 0:
            shown = [*self.own_trackers]
            if self.config.out_dir is not None:
                shown += trackers.make_trackers(self.config, resumed_at=resumed_at)
        self.trackers = trackers.Trackers(shown)
        try:
            with metrics.MetricsLog(self.metrics_path(), resumed_at=resumed_at) as self.metrics:
                yield
        finally:
            self.trackers.close()

    def metrics_path(self) -> Path | None:
        """Return the file that rank 0 writes its records to."""
        if self.config.out_dir is None or self.world.rank != 0:
            return None
        return Path(self.config.out_dir) / "metrics.jsonl"
