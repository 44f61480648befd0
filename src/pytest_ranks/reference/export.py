"""The finished model as a folder that `from_pretrained` loads."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.checkpoint import full_on_cpu
from pytest_ranks.reference.orthogonal import plain_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pytest_ranks.reference.parallel import World


def consolidated_state(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer, whole, on the CPU (a collective).

    Args:
        model: the model, sharded or not.
        dtype: cast floating-point tensors to this; None keeps them as trained.

    Returns:
        Tensors by name; of parameters that are tied only the first name is kept, since loading ties
        them again and files cannot hold one tensor twice.
    """
    tied = tied_names(model)
    state = {name: full_on_cpu(value) for name, value in model.state_dict().items()}
    state = plain_state(model, state)
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    if dtype is None:
        return kept
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in kept.items()
    }


def tied_names(model: nn.Module) -> set[str]:
    """Return the further names of parameters that have several."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if first.setdefault(id(parameter), name) != name}


def export_model(
    model: Any,
    directory: Path,
    *,
    world: World,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Write the model, and its tokenizer if there is one; a collective.

    Args:
        model: the model, sharded or not.
        directory: is made if it does not exist.
        world: the ranks.
        tokenizer: written beside the model.
        dtype: cast floating-point tensors to this; None keeps them as trained.
        state: written in place of the model's own tensors, whole, in that dtype.

    Raises:
        BadInputError: the model is not one of transformers'.
        OSError: it cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise BadInputError(
            f"{type(model).__name__} has no save_pretrained; export needs a transformers model."
        )
    from safetensors import SafetensorError

    if state is None:
        state = consolidated_state(model, dtype=dtype)
    if world.rank == 0:
        try:
            model.save_pretrained(directory, state_dict=state)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(directory)) from error
        if dtype is not None:  # it wrote the dtype that the model has in memory
            config = copy.deepcopy(model.config)
            config.dtype = dtype
            config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    world.barrier()
    return directory
