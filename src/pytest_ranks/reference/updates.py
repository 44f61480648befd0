"""One optimizer step: forward, loss, backward, clipping, and the update itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.reference import gradients, liger, loss, optimization, orthogonal, parallel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from pytest_ranks.reference.collate import MicroBatch
    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.parallel import World
    from pytest_ranks.reference.preemption import StopRequest

    Record = dict[str, Any]


class UpdateSteps:
    """The steps of `Trainer` that train on a global batch; each can be overridden there."""

    config: TrainConfig
    world: World
    model: nn.Module
    wrapped: nn.Module | None
    keywords: frozenset[str]
    optimizer: Optimizer
    scheduler: LambdaLR
    stop: StopRequest
    stopping: bool
    """Whether a rank was asked to stop, as all ranks know it."""

    def update(self, batches: list[MicroBatch], tokens: int) -> Record:
        """Add up the gradients of this rank's micro-batches and make one optimizer step."""
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches):
            with self.sync(last=number == len(batches) - 1):
                cross_entropy = self.cross_entropy(self.forward(batch), batch.labels)
                self.backward(self.scale(cross_entropy, tokens))
            total += cross_entropy.detach()
        self.check_gradients()
        self.project_gradients()
        grad_norm = self.clip()
        self.step()
        self.project_parameters()
        self.schedule()
        self.zero()
        return {"loss": self.mean_loss(total, tokens), "grad_norm": grad_norm}

    def mean_loss(self, cross_entropy: Tensor, tokens: int) -> float:
        """Return the mean loss of the global batch's trained tokens, over all ranks."""
        return float(self.add_up(cross_entropy) / tokens)

    def add_up(self, value: Tensor) -> float:
        """Return a number's sum over all ranks (a collective).

        Whether a rank was asked to stop goes around with it, so that no further collective is
        needed: after this one all ranks know.
        """
        asked = torch.full_like(value, self.stop.requested)
        total, asking = self.world.sum(torch.stack([value, asked])).tolist()
        self.stopping = self.stopping or asking > 0
        return total  # type: ignore[no-any-return]

    # ---- forward and backward ---------------------------------------------------------------

    def count(self, batches: list[MicroBatch]) -> int:
        """Count the trained tokens of the global batch: every rank, every micro-batch."""
        counts = [loss.counted_targets(batch.labels) for batch in batches]
        return int(self.add_up(torch.stack(counts).sum()))

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
        if self.config.liger:
            return liger.shifted_cross_entropy_sum(logits, labels)
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

    def check_gradients(self) -> None:
        """Refuse to step on gradients that were not reduced over the ranks.

        Raises:
            BadInputError: they were not.
        """
        gradients.check_arrived(self.model, self.config.strategy)

    def project_gradients(self) -> None:
        """Keep the gradient of split weights out of what they freeze; before it is measured."""
        orthogonal.project_gradients(self.model)

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

    def project_parameters(self) -> None:
        """Keep split weights themselves out of what they freeze: no optimizer's update does."""
        orthogonal.project_parameters(self.model)

    def schedule(self) -> None:
        """Move the learning rate on: once an optimizer step, whatever the world size."""
        self.scheduler.step()

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()
