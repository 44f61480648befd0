"""Checkpoints: one file that holds everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import pickle
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from pytest_ranks.reference.parallel import World


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
    progress: dict[str, int],
    settings: dict[str, Any],
    world: World,
) -> None:
    """Write a checkpoint; a collective.

    The file appears whole or not at all: it is written under another name and renamed.

    Args:
        path: the file.
        model: the model whose parameters are trained, not its DDP wrapper.
        optimizer: with its state (moments).
        scheduler: the schedule.
        progress: steps taken, epoch, samples consumed in it.
        settings: what a run that resumes must have equal.
        world: the ranks.
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
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    world.barrier()


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    settings: dict[str, Any],
    world: World,
) -> dict[str, int]:
    """Restore everything that `save_checkpoint` wrote.

    Returns:
        The progress.

    Raises:
        BadInputError: the file cannot be read, or belongs to another model, world size or setting.
    """
    state = read_checkpoint(path)
    if len(state["random"]) != world.size:
        raise BadInputError(
            f"{path} was written by {len(state['random'])} ranks and cannot be continued exactly "
            f"by {world.size}; use as many ranks."
        )
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise BadInputError(
                f"{path} was trained with {name}={state['settings'].get(name)!r}, this run has "
                f"{name}={value!r}; use the same value, or start without resume_from."
            )
    load_parameters(model, state["model"], origin=str(path))
    load_optimizer(optimizer, state["optimizer"], origin=str(path))
    scheduler.load_state_dict(state["scheduler"])
    set_random_state(state["random"][world.rank], world.device)
    return dict(state["progress"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the file; no code in it is run.

    Raises:
        BadInputError: there is none, or it is no checkpoint of this trainer.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInputError(f"there is no checkpoint {path}.") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
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


def checkpoint_path(out_dir: Path, step: int) -> Path:
    """Return the file of the checkpoint after so many steps."""
    return out_dir / f"checkpoint-{step}.pt"


def find_checkpoint(given: Path) -> Path:
    """Return the file itself, or the newest checkpoint in a folder.

    Raises:
        BadInputError: the folder has none.
    """
    if not given.is_dir():
        return given
    steps = [
        int(match.group(1))
        for file in given.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", file.name))
    ]
    if not steps:
        raise BadInputError(f"the folder {given} has no checkpoint-<step>.pt to resume from.")
    return checkpoint_path(given, max(steps))


def _gather(value: Any, world: World) -> list[Any]:
    """Return every rank's value (a collective); the list is complete on rank 0."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []
