"""What a rank's spies saw, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Forward:
    """One call of the model.

    Attributes:
        step: optimizer steps that were complete when it began.
        input_ids: the ids, [B][T].
        labels: the labels that the model was given, [B][T]; None when the trainer computes its own
            loss.
        position_ids: [B][T], or None.
        attention_mask: the mask as nested lists where it has two or four dimensions; None otherwise.
        masked: whether any attention mask was given.
        training: the module's mode.
        grad: whether autograd was recording.
        autocast: the dtype of an active CPU or CUDA autocast, else None.
        weight_dtype: dtype of the first floating parameter during the call.
        buffers: dtype of each floating buffer during the call.
    """

    step: int
    input_ids: list[list[int]]
    labels: list[list[int]] | None
    position_ids: list[list[int]] | None
    attention_mask: list[Any] | None
    masked: bool
    training: bool
    grad: bool
    autocast: str | None
    weight_dtype: str
    buffers: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Group:
    """One parameter group of the optimizer at a step.

    Attributes:
        numbers: the float settings (`lr`, `betas`, `eps`, `weight_decay`, ...).
        names: how many parameters it holds.
    """

    numbers: dict[str, object]
    size: int


@dataclass(slots=True, kw_only=True)
class Step:
    """One optimizer step, as the optimizer saw it.

    Attributes:
        optimizer: the optimizer's class.
        groups: its parameter groups.
        sharded: parameters that are DTensors with a Shard placement.
        parameters: all parameters with a gradient.
        grad_norm: the local gradients' L2 norm (of this rank's shards).
        grad_dtypes: dtypes of the gradients.
        weight_dtypes: dtypes of the parameters.
        state_dtypes: dtypes of the optimizer's floating state before and after the step.
        grad_census: share of non-zero gradient entries that bf16 can hold exactly; None without
            entries.
        weight_census: the same of the parameters, after the step.
        weight_census_before: the same, before the step.
        weight_hash: a digest of the replicated parameters after the step; None when all are
            sharded.
        grad_hash: a digest of the replicated gradients.
        where: file and line that called `step`.
    """

    optimizer: str
    groups: list[Group]
    sharded: int
    parameters: int
    grad_norm: float
    grad_dtypes: list[str]
    weight_dtypes: list[str]
    state_dtypes: list[str] = field(default_factory=list)
    grad_census: float | None = None
    weight_census: float | None = None
    weight_census_before: float | None = None
    weight_hash: str | None = None
    grad_hash: str | None = None
    where: str = ""


@dataclass(slots=True, kw_only=True)
class Collective:
    """One collective operation.

    Attributes:
        step: optimizer steps that were complete when it was issued.
        op: its name, such as `allreduce_`.
        dtype: the tensors' dtype.
        numel: their elements.
    """

    step: int
    op: str
    dtype: str
    numel: int


@dataclass(slots=True, kw_only=True)
class Observed:
    """All that one rank's spies saw during a run.

    Attributes:
        rank: the rank.
        forwards: calls of the model.
        steps: optimizer steps.
        collectives: collective operations.
        clips: limits of torch's gradient clipping.
        layer_calls: calls of the model's linear layers with autograd on; more than in an equal run where activations
            are computed again.
    """

    rank: int
    forwards: list[Forward] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)
    layer_calls: int = 0

    def training_forwards(self, step: int | None = None) -> list[Forward]:
        """Return the forwards that autograd recorded, of one step or of all."""
        return [seen for seen in self.forwards if seen.grad and (step is None or seen.step == step)]
