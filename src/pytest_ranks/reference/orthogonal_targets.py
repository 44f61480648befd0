"""Which linear layers orthogonal subspace fine-tuning splits, found by the model's declarations."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.blocks import find_blocks, parameter_owners

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES_SHOWN = 8
"""How many names a message lists: the layers of one block of most models."""


def is_stored_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, GPT-2's linear layer, whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is trained.

    Exactly `torch.nn.Linear`, or `Conv1D`: a subclass may compute something else.
    """
    if type(module) is not nn.Linear and not is_stored_transposed(module):
        return False
    return module.get_parameter("weight").requires_grad


def find_targets(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers to split by name, in the model's order.

    Args:
        model: whole, not sharded.
        patterns: shell patterns for a layer's name or its end ("q_proj", "mlp.*"); None takes the
            linear layers inside the blocks that the model declares.

    Raises:
        BadInputError: nothing is found, a pattern names no linear layer, or a weight cannot be
            split.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if patterns is None:
        inside = {id(part) for block in find_blocks(model) for part in block.modules()}
        targets = {name: module for name, module in linear.items() if id(module) in inside}
        if not targets:
            raise BadInputError(
                f"orthogonal_rank_ratio: {type(model).__name__} declares no block with a "
                "trained torch.nn.Linear; name the layers with orthogonal_targets."
            )
    else:
        for pattern in patterns:
            if not any(_names(pattern, name) for name in linear):
                raise BadInputError(_unknown(pattern, list(linear)))
        targets = {
            name: module
            for name, module in linear.items()
            if any(_names(pattern, name) for pattern in patterns)
        }
    check_weights(model, targets)
    return targets


def check_weights(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse weights that cannot be split.

    Raises:
        BadInputError: a weight is shared with another layer, or is not there.
    """
    owners = parameter_owners(model)
    for name, module in targets.items():
        weight = module.get_parameter("weight")
        if len(owners[id(weight)]) > 1:
            raise BadInputError(
                f"orthogonal_targets: the weight of {name!r} is shared with another layer, and a "
                "split weight cannot be; leave the layer out."
            )
        if weight.is_meta:
            raise BadInputError(
                f"orthogonal_rank_ratio: {name!r} is on the meta device, expected its values; load "
                "the model before it is split."
            )


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module in another's place, wherever it is used."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _unknown(pattern: str, linear: list[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    shown = ", ".join(repr(end) for end in ends[:NAMES_SHOWN])
    more = f" and {len(ends) - NAMES_SHOWN} more" if len(ends) > NAMES_SHOWN else ""
    return (
        f"orthogonal_targets: {pattern!r} names no linear layer that is trained; the model has "
        f"{shown or 'none'}{more}.{did_you_mean(pattern, ends)}"
    )
