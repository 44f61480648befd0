"""Choose which layers of a family's default config a tiny model keeps: one of each kind."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pytest_ranks.models.meanings import LAYERS

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYER_NUMBERS = re.compile(r"\w*(_idxs|_layers|_ids|_indices)")
# The last so many layers read keys and values that earlier ones have computed.
SHARED_LAYERS = "num_kv_shared_layers"
FEWEST_LAYERS = 2
# More kinds of layers than this would not fit a tiny model; the first ones are kept.
MOST_LAYERS = 6


def choose_layers(values: Mapping[str, Any], *, count: int | None) -> list[int]:
    """Choose layers such that every kind occurs.

    Args:
        values: the family's default values; fields with one entry a layer say what kind it is.
        count: number of layers wanted; None: one of each kind, at least two.

    Returns:
        The chosen layers' numbers in the default config, in order; where more layers are wanted
        than that has, its pattern starts again. Empty for a config without a number of layers.
    """
    total = layer_count(values)
    if not total:
        return []
    first_of_kind: dict[str, int] = {}
    for layer in range(total):
        first_of_kind.setdefault(_kind(values, layer, total), layer)
    kinds = sorted(first_of_kind.values())
    wanted = count or min(max(len(kinds), FEWEST_LAYERS), MOST_LAYERS)
    others = [layer for layer in range(total) if layer not in kinds]
    whole, rest = divmod(wanted, total)
    return list(range(total)) * whole + sorted((kinds + others)[:rest])


def layer_count(values: Mapping[str, Any]) -> int:
    """Return the number of (decoder) layers of a config, or 0 where it has none."""
    counts = [
        value
        for name, value in values.items()
        if LAYERS.fullmatch(name) and isinstance(value, int) and "encoder_l" not in name
    ]
    return counts[0] if counts else 0


def layer_numbers(name: str, value: Any, total: int) -> set[int] | None:
    """Return the layers that a field lists by number, or None where it lists something else.

    `full_attn_idxs=[2, 5, 8]` lists layers; `no_rope_layers=[1, 1, 1, 0]` has one entry a layer.
    """
    if not LAYER_NUMBERS.fullmatch(name) or not isinstance(value, (list, tuple)) or not value:
        return None
    if not all(isinstance(item, int) and 0 <= item < total for item in value):
        return None
    return set(value) if all(a < b for a, b in pairwise(value)) else None


def _kind(values: Mapping[str, Any], layer: int, total: int) -> str:
    """Return a text that is equal for layers of one kind."""
    traits = []
    for name, value in values.items():
        if name == "per_layer_config":
            traits.append(value.get(layer))
        elif name == SHARED_LAYERS:
            traits.append(layer >= total - value)
        elif (numbers := layer_numbers(name, value, total)) is not None:
            traits.append(layer in numbers)
        elif isinstance(value, (list, tuple)) and len(value) == total:
            traits.append(value[layer])
    return repr(traits)
