"""One process, DDP or FSDP2: who this process is, and how its model takes part."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.blocks import find_blocks as find_blocks
from pytest_ranks.reference.blocks import find_units, outermost

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_ranks.reference.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among its peers; all of them are data-parallel.

    Attributes:
        rank: this process's number.
        size: how many processes train together.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks (a collective)."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def share(self, value: Any) -> Any:
        """Return rank 0's value (a collective); those of other ranks do not matter."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def find_world(config: TrainConfig) -> World:
    """Find out who this process is.

    Raises:
        BadInputError: the strategy and the process group do not go together, or the device is
            none.
    """
    ready = dist.is_available() and dist.is_initialized()
    if config.strategy == "single":
        if ready and dist.get_world_size() > 1:
            raise BadInputError(
                f"strategy='single' on {dist.get_world_size()} ranks would train as many separate "
                "models; use strategy='ddp' or 'fsdp2'."
            )
        return World(rank=0, size=1, device=find_device(config.device))
    if not ready:
        raise BadInputError(
            f"strategy={config.strategy!r} needs an initialised process group: run under torchrun "
            "and call torch.distributed.init_process_group first, or use strategy='single'."
        )
    device = find_device(config.device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def find_device(name: str) -> torch.device:
    """Return the device of this process: with several of a kind, the one of its local rank.

    Raises:
        BadInputError: the name is no torch device, or one that is not there.
    """
    if name == "auto" and dist.is_initialized() and dist.get_backend() == "gloo":
        name = "cpu"  # ranks that chose the CPU's backend compute there
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInputError(
            f"device={name!r} is not a torch device; use 'auto', 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if device.type != "cpu" and ":" not in name:
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type != "cpu":
        try:
            torch.accelerator.set_device_index(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise BadInputError(
                f"device={name!r} cannot be used here ({reason}); use 'auto' or 'cpu'."
            ) from error
    return device


def recompute_activations(model: nn.Module) -> int:
    """Let each block forget its activations and compute them again in the backward pass.

    `preserve_rng_state` makes dropout draw the same mask again: without it the gradient belongs to
    another network than the loss (https://github.com/allenai/OLMo-core/pull/828). The wrapper is
    put around `forward`, so that the hooks of FSDP2 stay outside it.

    Returns:
        How many blocks were wrapped; none lies inside another.
    """
    blocks = outermost(find_blocks(model))
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True
        )
    return len(blocks)


def precision_policy(precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy: compute in bfloat16, but add up gradients over ranks in float32.

    Summing bfloat16 gradients loses bits that grow with the number of ranks
    (https://github.com/pytorch/pytorch/issues/106395). Sharded parameters, which the optimizer
    sees, keep their float32; buffers (RoPE frequencies) are not touched.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def parallelize(
    model: nn.Module, strategy: str, world: World, policy: MixedPrecisionPolicy
) -> nn.Module:
    """Make the model take part; every strategy starts from rank 0's parameters.

    Each rank holds the whole model until FSDP2 has cut it: for models that fit one device.

    Returns:
        The module to call: the model itself, or DDP around it.
    """
    if strategy == "ddp":
        ids = None if world.device.type == "cpu" else [world.device.index]
        return DistributedDataParallel(model, device_ids=ids)
    if strategy == "fsdp2":
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                dist.broadcast(tensor.detach().contiguous(), src=0)
        shard(model, world, policy)
    return model


def shard(model: nn.Module, world: World, policy: MixedPrecisionPolicy) -> None:
    """Cut the model over the ranks with FSDP2: each block a unit, the rest with the root."""
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp",))
    for block in find_units(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def gradient_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context in which one micro-batch runs forward and backward.

    DDP keeps gradients to itself until the window's last micro-batch; its forward must be inside
    too, since that is where it decides. FSDP2 reduces after each micro-batch: the sum is the same,
    and no rank ever has to hold the whole float32 gradient, which is what sharding is for.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Let go of the full parameters that a forward without a backward leaves in FSDP2's root."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
