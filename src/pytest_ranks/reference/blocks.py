"""A model's repeated layers: what is sharded, recomputed and prefetched as one."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers, by what the model's author declares, never by a list of names.

    transformers names the classes that must stay whole in `_no_split_modules`. Where a family
    leaves that empty, its layers still are `GradientCheckpointingLayer`s. Inner blocks come before
    outer ones, the order in which `fully_shard` must be applied. A model without blocks is one
    unit.
    """
    parts = list(reversed(list(model.modules())))
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [part for part in parts if type(part).__name__ in names]
    return named or [part for part in parts if _is_checkpointing_layer(part)]


def outermost(blocks: list[nn.Module]) -> list[nn.Module]:
    """Return the blocks that lie in no other block; recomputing one recomputes what is in it."""
    inner = {id(part) for block in blocks for part in list(block.modules())[1:]}
    return [block for block in blocks if id(block) not in inner]


def find_units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that can be sharded on their own.

    A block that shares a parameter with a module outside it cannot (BERT's embeddings, which
    are also its head): `fully_shard` gives the block another parameter and leaves the module
    outside with the old one, so that what was tied is trained as two. Such a block is left to
    the root, where all owners are sharded together.
    """
    owners = parameter_owners(model)
    units = []
    for block in find_blocks(model):
        inside = {id(part) for part in block.modules()}
        mine = (owners[id(parameter)] for parameter in block.parameters())
        if all({id(owner) for owner, _ in each} <= inside for each in mine):
            units.append(block)
    return units


def parameter_owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return, for each parameter by its `id`, the modules that hold it and its name there."""
    owners = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, name))
    return owners


def _is_checkpointing_layer(part: nn.Module) -> bool:
    """Whether a module is one of transformers' layers, without importing transformers for it."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(part).__mro__)
