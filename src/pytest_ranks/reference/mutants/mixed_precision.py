"""Wrong precision: bfloat16 where float32 must stay, and recomputation that is not the same."""

# ruff: noqa: D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pytest_ranks.reference import parallel
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor, nn


class _InBf16(Trainer):
    """Tells whether the job computes in bfloat16."""

    @property
    def bf16(self) -> bool:
        return self.config.precision == "bf16"


@plant(
    row="M1",
    issue="https://github.com/huggingface/accelerate/issues/3979",
    kills={
        "mixed_precision.master_weights_are_fp32[single]": "cast to bf16 before the optimizer",
        "mixed_precision.accumulates_in_fp32[single]": "parameters are bf16",
        "mixed_precision.optimizer_state_is_fp32[single]": "built on bf16 parameters",
        "mixed_precision.small_updates_survive[single]": "weights are bf16",
    },
)
class ParametersInBf16(_InBf16):
    """The upcast to float32 does nothing: the optimizer updates bfloat16 parameters."""

    def masters(self) -> None:
        if self.bf16:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


@plant(
    row="M1",
    issue="https://github.com/huggingface/accelerate/issues/3979",
    kills={"mixed_precision.master_weights_are_fp32[fsdp2-2]": "cast to bf16"},
)
class ShardsInBf16(_InBf16):
    """The upcast does nothing under FSDP2 alone: its shards are bfloat16."""

    def masters(self) -> None:
        if self.bf16 and self.config.strategy == "fsdp2":
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


@plant(
    row="M2",
    issue="https://github.com/areal-project/AReaL/issues/1292",
    kills={"mixed_precision.optimizer_state_is_fp32[single]": "moments are cast"},
)
class MomentsInBf16(_InBf16):
    """AdamW's moments are kept in bfloat16, on float32 parameters."""

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not self.bf16 or self.config.optimizer != "adamw":
            return super().build_optimizer(groups)
        config = self.config
        return _SmallAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


class _SmallAdamW(torch.optim.AdamW):
    """Computes in float32 and keeps its moments in bfloat16."""

    def step(self, closure: Any = None) -> Any:
        self._cast(torch.float32)
        loss = super().step(closure)
        self._cast(torch.bfloat16)
        return loss

    def _cast(self, dtype: torch.dtype) -> None:
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(dtype)


@plant(
    row="M3",
    issue="https://github.com/pytorch/ao/pull/1124",
    kills={
        "mixed_precision.small_updates_survive[single]": "an update below half their last bit",
        "mixed_precision.master_weights_are_fp32[single]": "rounded to bf16 after each step",
    },
)
class WeightsRoundedEachStep(_InBf16):
    """Weights are float32 tensors that hold bfloat16 values: each step ends in a rounding."""

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        if self.bf16:
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


@plant(
    row="M4",
    issue="https://github.com/pytorch/pytorch/issues/106395",
    kills={"mixed_precision.gradients_are_reduced_in_fp32[fsdp2-2]": "reduce_dtype=torch.bfloat16"},
)
class ReducesInBf16(Trainer):
    """FSDP2 adds up gradients over ranks in bfloat16."""

    def mixed_precision(self) -> MixedPrecisionPolicy:
        if self.config.precision == "fp32":
            return super().mixed_precision()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


@plant(
    row="M4",
    issue="https://github.com/pytorch/pytorch/issues/106395",
    kills={"mixed_precision.gradients_are_reduced_in_fp32[fsdp2-2]": "None"},
)
class ReduceDtypeLeftOut(Trainer):
    """FSDP2 is told no reduce_dtype, which means the dtype that it computes in."""

    def mixed_precision(self) -> MixedPrecisionPolicy:
        if self.config.precision == "fp32":
            return super().mixed_precision()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@plant(
    row="M4",
    kills={"mixed_precision.gradients_are_reduced_in_fp32[ddp-2]": "compression hook"},
)
class CompressedReduction(_InBf16):
    """DDP compresses gradients to bfloat16 before it adds them up."""

    def parallelize(self) -> nn.Module:
        wrapped = super().parallelize()
        if self.bf16 and isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, _reduce_in_bf16)
        return wrapped


def _reduce_in_bf16(_: object, bucket: Any) -> Any:
    """Do what torch's `bf16_compress_hook` does, which runs on devices alone."""
    small = bucket.buffer().to(torch.bfloat16) / dist.get_world_size()
    work = dist.all_reduce(small, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0].to(torch.float32))


_reduce_in_bf16.__annotations__.clear()  # DDP compares them with types, not with their names


@plant(
    row="M5",
    issue="https://github.com/instructlab/training/issues/477",
    kills={"mixed_precision.buffers_stay_fp32[single]": "buffers included"},
)
class BuffersInBf16(_InBf16):
    """Rotary frequencies are cast to bfloat16 along with everything else."""

    def parallelize(self) -> nn.Module:
        if self.bf16:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(torch.bfloat16)
        return super().parallelize()


@plant(
    row="M6",
    issue="https://github.com/meta-pytorch/torchtune/issues/2254",
    kills={"mixed_precision.accumulates_in_fp32[single]": "accumulation buffer"},
)
class AccumulatesInBf16(_InBf16):
    """Gradients of micro-batches are added up in a bfloat16 buffer."""

    @torch.no_grad()
    def backward(self, scaled: Tensor) -> None:
        with torch.enable_grad():
            super().backward(scaled)
        if self.bf16:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(parameter.grad.to(torch.bfloat16))


@plant(
    row="M9",
    issue="https://github.com/allenai/OLMo-core/pull/828",
    kills={
        "mixed_precision.recomputation_is_neutral[single]": "preserve_rng_state=False",
    },
)
class RecomputesOtherDropout(Trainer):
    """Recomputed activations draw another dropout mask than the forward did."""

    def checkpoint_activations(self) -> None:
        for block in parallel.find_blocks(self.model):
            forward: Any = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
            block.forward = forward
