"""Models that no rank but the first holds whole: empty parameters, cut, then filled with values.

`broadcast`: rank 0 has the model, the others its shape; rank 0 sends each rank its rows.
`sharded`: no rank has the model; each reads its rows from the safetensors files.

What goes wrong in silence here, and what is done about it: buffers that no file holds (rotary
frequencies) are computed on every rank and never emptied; tied parameters become empty together;
what no one fills is NaN and not what memory happened to hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import parallel
from pytest_ranks.reference.blocks import parameter_owners

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from pytest_ranks.reference.parallel import World


def empty_model(directory: str | Path) -> Any:
    """Build a folder's model with float32 parameters on the meta device: shapes, no memory.

    Buffers are real: those that no file holds exist only where the model was built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    if (Path(directory) / "generation_config.json").is_file():  # from_pretrained reads it, too
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def is_empty(model: nn.Module) -> bool:
    """Whether any parameter has no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_source(initialization: str, model: nn.Module, weights: str | Path | None) -> None:
    """Refuse a model that would get no values, or a folder that would not be read.

    Raises:
        BadInputError: it is so.
    """
    if initialization == "sharded" and weights is None:
        raise BadInputError(
            "initialization='sharded' needs weights, the folder whose files the ranks read."
        )
    if initialization != "sharded" and weights is not None:
        raise BadInputError(
            f"weights={str(weights)!r} is read with initialization='sharded' only, found "
            f"initialization={initialization!r}."
        )
    if initialization == "full" and is_empty(model):
        raise BadInputError(
            "the model has parameters on the meta device, without values; use "
            "initialization='broadcast' or 'sharded', or load it with load_model(folder)."
        )


def shard_from_first_rank(model: nn.Module, world: World, policy: MixedPrecisionPolicy) -> None:
    """Cut the model under FSDP2 and fill it with rank 0's values (a collective).

    A rank beside the first holds its own rows and, while they arrive, those of one parameter once
    more. Rank 0 holds the model once on the CPU until all is sent.

    Args:
        model: with values on rank 0; on the others its parameters may be empty.
        world: the ranks.
        policy: FSDP2's mixed precision.

    Raises:
        BadInputError: rank 0's model has no values.
    """
    if world.rank == 0 and is_empty(model):
        raise BadInputError(
            "initialization='broadcast' sends rank 0's parameters, and rank 0 has none with values; "
            "load its model with load_model(folder)."
        )
    values = {name: p.detach() for name, p in model.named_parameters()} if world.rank == 0 else {}
    empty_parameters(model)
    parallel.shard(model, world, policy)
    allocate(model, world.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _scatter(parameter, values.pop(name, None), world)
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def shard_from_files(
    model: nn.Module, folder: str | Path, world: World, policy: MixedPrecisionPolicy
) -> None:
    """Cut the model under FSDP2; each rank reads its rows from the safetensors files.

    Raises:
        BadInputError: the files do not hold the model's parameters under their names and in their
            shapes.
    """
    files = weight_files(Path(folder))
    names = _stored_names(model, files)
    empty_parameters(model)
    parallel.shard(model, world, policy)
    allocate(model, world.device)
    state = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for file in sorted({files[stored] for stored in names.values()}):
            _read(file, {n: s for n, s in names.items() if files[s] == file}, state, world)


def empty_parameters(model: nn.Module) -> None:
    """Put every parameter on the meta device; what is tied stays tied, buffers stay."""
    for owners in list(parameter_owners(model).values()):
        old = owners[0][0].get_parameter(owners[0][1])
        values = torch.empty_like(old, device="meta")
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        for module, name in owners:
            setattr(module, name, new)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give empty sharded parameters memory full of NaN on a device; buffers keep their values."""
    kept = {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)}
    model.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in model.named_buffers(remove_duplicate=False):
            buffer.copy_(kept[name])
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)


def rows_of(length: int, world: World) -> tuple[int, int]:
    """Return the rows [start, stop) of a rank, as `torch.chunk` cuts: the last may have fewer."""
    each = -(-length // world.size)
    start = min(world.rank * each, length)
    return start, min(start + each, length)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return, for each tensor in a folder's safetensors files, the file it is in.

    Raises:
        BadInputError: the folder has none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in found.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise BadInputError(
            f"{folder} has neither model.safetensors nor its index; initialization='sharded' reads "
            "safetensors files: use 'broadcast' for other formats."
        )
    from safetensors import safe_open

    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _stored_names(model: nn.Module, files: dict[str, Path]) -> dict[str, str]:
    """Return, for each tensor of the model, the name under which it is stored.

    Of tied parameters one name is enough.

    Raises:
        BadInputError: a tensor is not there; some families' files have other names than the model
            and are converted while they are loaded whole (experts that are stored one by one).
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    found = {n[0]: next((one for one in n if one in files), None) for n in tied.values()}
    missing = sorted(name for name, stored in found.items() if stored is None)
    if missing:
        raise BadInputError(
            f"initialization='sharded' reads tensors by the model's names, and {len(missing)} of "
            f"{len(found)} are not in the files, such as {missing[0]!r}; use 'broadcast', which "
            "loads the model whole on rank 0 and converts names."
        )
    return {name: stored for name, stored in found.items() if stored is not None}


def _read(file: Path, names: dict[str, str], state: dict[str, Tensor], world: World) -> None:
    """Copy this rank's rows of some tensors out of one file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name, stored in names.items():
            target, source = state[name], opened.get_slice(stored)
            if list(target.shape) != source.get_shape():
                raise BadInputError(
                    f"{file}: {stored!r} has shape {source.get_shape()}, the model's has "
                    f"{list(target.shape)}; initialization='sharded' reads files as they are: use "
                    "'broadcast' for an embedding that has grown."
                )
            if isinstance(target, DTensor):
                start, stop = rows_of(target.shape[0], world)
                target.to_local().copy_(source[start:stop])
            else:
                target.copy_(opened.get_tensor(stored))


def _scatter(parameter: Tensor, value: Tensor | None, world: World) -> None:
    """Send each rank its rows of rank 0's value (a collective)."""
    assert isinstance(parameter, DTensor)
    local = parameter.to_local()
    rows = -(-parameter.shape[0] // world.size)
    mine = local.new_empty((rows, *parameter.shape[1:]))
    parts = None
    if value is not None:
        missing = rows * world.size - value.shape[0]
        filled = torch.cat([value, value.new_zeros((missing, *value.shape[1:]))])
        parts = list(filled.to(mine).chunk(world.size))
    dist.scatter(mine, parts, src=0)
    local.copy_(mine[: local.shape[0]])
