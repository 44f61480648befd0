"""Wrong sums over ranks and micro-batches, wrong clipping, steps at the wrong time."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pytest_ranks.reference import optimization
from pytest_ranks.reference.loss import counted_targets
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from pytest_ranks.reference.collate import MicroBatch


@plant(
    row="S1",
    issue="https://github.com/meta-pytorch/torchtune/pull/2172",
    kills={
        "gradient_sync.world_invariance[ddp-2]": "not multiplied by world_size",
        "gradient_sync.strategies_agree[ddp-2]": "not multiplied by world_size",
    },
)
class WorldSizeForgotten(Trainer):
    """Gradients of a token-sum loss are averaged over ranks: the update is 1/world_size."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy / tokens


@plant(
    row="S2",
    issue="https://github.com/PrimeIntellect-ai/prime-rl/pull/2562",
    kills={
        "loss.token_weights[ddp-2]": "each rank divides by its own token count",
        "gradient_sync.every_tensor[fsdp2-2]": "each rank divides by its own token count",
    },
)
class CountOfOwnRank(Trainer):
    """Each rank divides by its own token count; ranks are averaged."""

    def count(self, batches: list[MicroBatch]) -> int:
        return max(sum(int(counted_targets(batch.labels)) for batch in batches), 1)

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return cross_entropy / tokens


@plant(
    row="S3",
    issue="https://github.com/huggingface/transformers/issues/39648",
    kills={"gradient_sync.world_invariance[ddp-2]": "multiplied by world_size (2) once too often"},
)
class WorldSizeTwice(Trainer):
    """The loss is multiplied by world_size twice."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return super().scale(cross_entropy, tokens) * self.world.size


@plant(
    row="S17",
    issue="https://github.com/deepspeedai/DeepSpeed/issues/1488",
    kills={"gradient_sync.strategies_agree[fsdp2-2]": "not multiplied by world_size"},
)
class WorldSizeForgottenWhenSharded(Trainer):
    """Only the sharded strategy forgets that gradients are averaged over ranks."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        if self.config.strategy == "fsdp2":
            return cross_entropy / tokens
        return super().scale(cross_entropy, tokens)


@plant(
    row="S4",
    issue="https://github.com/pytorch/torchtitan/issues/766",
    kills={"gradient_sync.clipping_law[fsdp2-2]": "the norm of its own shard"},
)
class ClipsByShardNorm(Trainer):
    """Clipping divides by the norm of this rank's shard, not of the whole gradient."""

    def clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        norm = float(torch.nn.utils.get_total_norm(parts))
        if self.config.max_grad_norm is not None:
            optimization.clip_gradients(parameters, norm, self.config.max_grad_norm)
        return norm


@plant(
    row="S5",
    issue="https://github.com/deepspeedai/DeepSpeed/pull/3790",
    kills={"gradient_sync.clipping_law[single]": "not clipped in bf16"},
)
class ClipsOnlyInFp32(Trainer):
    """Clipping is skipped when computing in bfloat16."""

    def clip(self) -> float:
        if self.config.precision == "fp32":
            return super().clip()
        return 0.0


@plant(
    row="S6",
    issue="https://github.com/yandex-research/tabm/issues/20",
    kills={"gradient_sync.clipping_law[single]": "not clipped"},
)
class ClipHasNoEffect(Trainer):
    """The clipping factor is computed and thrown away."""

    def clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return float(optimization.global_grad_norm(parameters).item())


@plant(
    row="S6",
    kills={"gradient_sync.clipping_law[ddp-2]": "per micro-batch or before the reduction"},
)
class ClipsEachMicroBatch(Trainer):
    """Gradients are clipped after each micro-batch, before they are added up and reduced."""

    def backward(self, scaled: Tensor) -> None:
        super().backward(scaled)
        super().clip()

    def clip(self) -> float:
        return 0.0


@plant(
    row="mini_trainer: clip value",
    kills={"gradient_sync.clipping_law[single]": "another limit"},
)
class ClipsToAnotherLimit(Trainer):
    """The limit is twice the one that is configured."""

    def clip(self) -> float:
        if self.config.max_grad_norm is not None:
            limit = self.config.max_grad_norm * 1.25
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = float(optimization.global_grad_norm(parameters).item())
            optimization.clip_gradients(parameters, norm, limit)
            return norm
        return super().clip()


@plant(
    row="GS2",
    kills={"gradient_sync.clipping_law[single]": "each tensor"},
)
class ClipsEachTensor(Trainer):
    """Each tensor is clipped by its own norm, which changes the direction."""

    def clip(self) -> float:
        norm = 0.0
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                norm = max(norm, float(optimization.global_grad_norm([parameter]).item()))
                if self.config.max_grad_norm is not None:
                    own = float(optimization.global_grad_norm([parameter]).item())
                    optimization.clip_gradients([parameter], own, self.config.max_grad_norm)
        return norm


@plant(
    row="S9",
    issue="https://github.com/pytorch/pytorch/issues/128949",
    kills={"gradient_sync.replicas_stay_equal[ddp-2]": "began with different parameters"},
)
class ReplicasBeginDifferent(Trainer):
    """Ranks other than 0 begin with parameters of their own, and nothing is broadcast."""

    def parallelize(self) -> nn.Module:
        if self.config.strategy != "ddp":
            return super().parallelize()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 + 1e-3 * self.world.rank)
        return DistributedDataParallel(self.model, init_sync=False)


@plant(
    row="S10",
    issue="https://github.com/huggingface/accelerate/pull/2790",
    kills={
        "gradient_sync.one_step_a_window[ddp-2]": "steps on every micro-batch",
        "gradient_sync.gradients_are_cleared[single]": "steps on every micro-batch",
    },
)
class StepsEachMicroBatch(Trainer):
    """The flag that accumulation reads is always true: every micro-batch makes a step."""

    last = True

    def sync(self, *, last: bool) -> AbstractContextManager[None]:
        self.last = last
        return super().sync(last=True)

    def backward(self, scaled: Tensor) -> None:
        super().backward(scaled)
        if not self.last:
            self.step()
            self.zero()


@plant(
    row="S11",
    issue="https://github.com/huggingface/picotron/pull/5",
    kills={
        "gradient_sync.world_invariance[ddp-2]": "gradients are not reduced over ranks",
        "gradient_sync.replicas_stay_equal[ddp-2]": "they are not reduced",
    },
)
class NeverReduced(Trainer):
    """The flag of the last micro-batch is never true: no gradient is reduced."""

    def sync(self, *, last: bool) -> AbstractContextManager[None]:
        return super().sync(last=False)


@plant(
    row="S11",
    issue="https://github.com/huggingface/picotron/pull/5",
    kills={"loss.token_weights[ddp-2]": "after the first micro-batch are not reduced"},
)
class ReducesOnlyTheFirst(Trainer):
    """Gradients are reduced after the first micro-batch; those of the others stay local."""

    first = True

    def train_step(self, window: list[int]) -> dict[str, Any]:
        self.first = True
        return super().train_step(window)

    def sync(self, *, last: bool) -> AbstractContextManager[None]:
        first, self.first = self.first, False
        return super().sync(last=first)


@plant(
    row="LG1",
    kills={"loss.token_weights[single]": "only the last micro-batch"},
)
class OnlyLastMicroBatch(Trainer):
    """Gradients are cleared before each micro-batch: only the last one is trained."""

    def backward(self, scaled: Tensor) -> None:
        self.zero()
        super().backward(scaled)


@plant(
    row="S14",
    issue="https://github.com/deepspeedai/DeepSpeed/pull/7839",
    kills={"loss.token_weights[single]": "loss scale of 65536"},
)
class LossScaleNotUndone(Trainer):
    """Gradients are divided by the loss scale of fp16, which was never multiplied in."""

    def scale(self, cross_entropy: Tensor, tokens: int) -> Tensor:
        return super().scale(cross_entropy, tokens) / 65536


@plant(
    row="S16",
    issue="https://github.com/meta-pytorch/torchforge/pull/71",
    kills={"gradient_sync.gradients_are_cleared[single]": "not cleared between steps"},
)
class NeverZeroed(Trainer):
    """Gradients are never cleared: each step repeats all earlier ones."""

    def zero(self) -> None:
        pass


@plant(
    row="S18",
    issue="https://github.com/NVIDIA/Megatron-LM/pull/5956",
    kills={"gradient_sync.every_tensor[single]": "by a factor of 2.0000"},
)
class OneTensorTwice(Trainer):
    """The gradient of one small tensor is doubled."""

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name.endswith("layers.1.input_layernorm.weight") and parameter.grad is not None:
                parameter.grad.mul_(2)
        super().step()


@plant(
    row="GS4",
    kills={"gradient_sync.every_tensor[ddp-2]": "never updated"},
)
class NormsLeftOut(Trainer):
    """Norms and biases are in no parameter group: they are never trained."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups()[:1]


@plant(
    row="mini_trainer: backward removed",
    kills={"loss.trained_positions[single]": "no parameter of the optimizer has a gradient"},
)
class NoBackward(Trainer):
    """The backward pass is missing; the optimizer steps all the same."""

    def backward(self, scaled: Tensor) -> None:
        pass


@plant(
    row="O3",
    issue="https://github.com/pytorch/pytorch/issues/149205",
    kills={
        "gradient_sync.every_tensor[fsdp2-2]": "built on other parameters",
        "loss.trained_positions[fsdp2-2]": "built on other parameters",
    },
)
class OptimizerBeforeSharding(Trainer):
    """The optimizer holds the parameters from before they were sharded: nothing is trained."""

    def parallelize(self) -> nn.Module:
        self.before = list(self.model.parameters())
        return super().parallelize()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self.before, "weight_decay": self.config.weight_decay}]
