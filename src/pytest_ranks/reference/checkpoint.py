"""What a checkpoint holds: everything that a run needs to go on as if it had never stopped.

How its file is written and found again is in `checkpoint_files`.
"""

from __future__ import annotations

import copy
import pickle
import random
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.checkpoint_files import checkpoint_path as checkpoint_path
from pytest_ranks.reference.checkpoint_files import damage, write_checkpoint
from pytest_ranks.reference.checkpoint_files import find_checkpoint as find_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pytest_ranks.reference.parallel import World

STEP_STRIDE = 1_000_003
"""What a step moves a seed by where random states begin anew: a prime, far above any number of ranks."""


def full_on_cpu(tree: Any) -> Any:
    """Return nested state with every tensor whole and on the CPU (a collective under FSDP2)."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            leaf = leaf.full_tensor()
        return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(whole, tree)


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, cut as the parameter is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        local = value.to(parameter.device)
        return distribute_tensor(local, mesh, placements, src_data_rank=None)
    return value


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    progress: dict[str, Any],
    settings: dict[str, Any],
    world: World,
    write: Callable[[Path, dict[str, Any]], None] = write_checkpoint,
) -> None:
    """Write a checkpoint; a collective.

    Args:
        path: the file.
        model: the model whose parameters are trained, not its DDP wrapper.
        optimizer: with its state (moments).
        scheduler: the schedule.
        progress: the fields of `cadence.Progress`.
        settings: what a run that resumes must have equal.
        world: the ranks.
        write: called on rank 0 with the file and all that goes into it.
    """
    state = {
        "model": full_on_cpu(model.state_dict()),
        "optimizer": full_on_cpu(optimizer.state_dict()),
        "scheduler": scheduler.state_dict(),
        "progress": progress,
        "settings": settings,
        "random": _gather(random_state(world.device), world),
    }
    if world.rank == 0:
        write(path, state)
    world.barrier()


def staged(state: Any) -> Any:
    """Return nested state with tensors of its own: what is trained on meanwhile does not reach it.

    On the CPU `full_on_cpu` returns the very tensors that the optimizer changes next. Tensors that
    share their memory (tied weights) still do, so that a file holds them once.
    """
    return copy.deepcopy(state)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: dict[str, Any],
    world: World,
    elastic: bool = False,
) -> dict[str, Any]:
    """Restore everything that `save_checkpoint` wrote.

    With `elastic`, another number of ranks may go on, if the global batch is the same. They have the
    same place in the data, moments and schedule; where their number is another one, each rank's
    random state (dropout) begins anew from seed, rank and step.

    Returns:
        The progress.

    Raises:
        BadInputError: the file cannot be read, or belongs to another model, world size or setting.
    """
    state = read_checkpoint(path)
    ranks = len(state["random"])
    if ranks != world.size and not elastic:
        raise BadInputError(
            f"{path} was written by {ranks} ranks and cannot be continued exactly "
            f"by {world.size}; use as many ranks, or elastic=True."
        )
    before, now = state["settings"], settings
    if elastic:
        before, now = by_global_batch(before, ranks), by_global_batch(now, world.size)
    for name, value in now.items():
        if before.get(name) != value:
            raise BadInputError(
                f"{path} was trained with {name}={before.get(name)!r}, this run has "
                f"{name}={value!r}; use the same value, or start without resume_from."
            )
    load_parameters(model, state["model"], origin=str(path))
    load_optimizer(optimizer, state["optimizer"], origin=str(path))
    scheduler.load_state_dict(state["scheduler"])
    if ranks == world.size:
        set_random_state(state["random"][world.rank], world.device)
    else:
        seed = settings["seed"] + world.rank + STEP_STRIDE * state["progress"]["step"]
        torch.manual_seed(seed)
    return dict(state["progress"])


def by_global_batch(settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Return the settings with one number in place of the two that divide it among ranks."""
    shared = ("micro_batch", "gradient_accumulation_steps")
    kept = {name: value for name, value in settings.items() if name not in shared}
    return kept | {"global_batch": settings[shared[0]] * settings[shared[1]] * ranks}


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read the file, after a look at its checksum; no code in it is run.

    Args:
        path: the file.
        mapped: leave tensors in the file, for a caller who asks only whether it can be read.

    Raises:
        BadInputError: there is none, it is damaged, or it is no checkpoint of this trainer.
    """
    try:
        if (fault := damage(path)) is not None:
            raise BadInputError(f"{path} is not a readable checkpoint ({fault}).")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise BadInputError(f"there is no checkpoint {path}.") from error
    except pickle.UnpicklingError as error:  # whose text advises to run the code that is in it
        raise BadInputError(
            f"{path} is not a readable checkpoint (it is no archive of plain tensors)."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInputError(f"{path} is not a readable checkpoint ({reason}).") from error
    parts = {"model", "optimizer", "scheduler", "progress", "settings", "random"}
    if not isinstance(state, dict) or not parts <= state.keys():
        raise BadInputError(f"{path} is not a checkpoint of this trainer.")
    return state


def load_parameters(model: nn.Module, saved: dict[str, Tensor], *, origin: str) -> None:
    """Copy parameters and buffers, all of them or none.

    Raises:
        BadInputError: a name or a shape differs.
    """
    current = model.state_dict()
    if current.keys() != saved.keys():
        names = sorted(current.keys() ^ saved.keys())
        owner = "the model" if names[0] in current else "the checkpoint"
        raise BadInputError(
            f"{origin} belongs to another model: {len(names)} names differ, {names[0]!r} is only "
            f"in {owner}."
        )
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise BadInputError(
                f"{origin} belongs to another model: {name!r} has shape "
                f"{list(saved[name].shape)}, expected {list(tensor.shape)}."
            )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(sharded_like(saved[name], tensor))


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], *, origin: str) -> None:
    """Restore moments and step counts, cut as the parameters are.

    Raises:
        BadInputError: the parameter groups differ.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: sharded_like(value, parameters[index]) if torch.is_tensor(value) else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    try:
        optimizer.load_state_dict({**saved, "state": state})
    except ValueError as error:
        raise BadInputError(f"{origin} belongs to another optimizer: {error}.") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that a training step may draw from."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


def _gather(value: Any, world: World) -> list[Any]:
    """Return every rank's value (a collective); the list is complete on rank 0."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []
