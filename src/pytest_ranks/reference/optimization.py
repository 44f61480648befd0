"""The optimizer, its parameter groups, the learning rate's course, and clipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from pytest_ranks.reference.config import TrainConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and embeddings decay, norms and biases do not.

    The rule is the number of dimensions: a filter by name misses the norms of the next model
    (https://github.com/huggingface/transformers/pull/35927).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """Build the configured optimizer on parameters that are already sharded and float32."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps)


def learning_rate_factor(step: int, *, config: TrainConfig, total_steps: int) -> float:
    """Return the share of the peak learning rate that a step trains with.

    The formulas are those of transformers' `get_scheduler`: with a warm-up the first step has a
    learning rate of zero.

    Args:
        step: steps taken so far; 0 for the first.
        config: the schedule and its warm-up.
        total_steps: how many steps the run has.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    match config.schedule:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            return 1.0


def make_scheduler(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Build the schedule; it is moved on once for each optimizer step, on every world size."""

    def factor(step: int) -> float:
        return learning_rate_factor(step, config=config, total_steps=total_steps)

    return LambdaLR(optimizer, factor)


def global_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients, over all parameters and all shards.

    A collective under FSDP2: there each rank holds a part of each gradient, and the norm of a part
    is not the norm (https://github.com/pytorch/torchtitan/issues/766).

    Returns:
        float32 scalar, the same on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients by one factor, so that their global norm is at most `max_norm`.

    Args:
        parameters: those with gradients.
        norm: the gradients' global norm, over all ranks; torch adds 1e-6 to it.
        max_norm: the limit.
    """
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
