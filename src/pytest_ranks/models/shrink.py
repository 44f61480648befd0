"""Make the tiny config of a family: its default config, with every size replaced by its meaning.

The default config is the pattern to keep: which kinds of layers there are, whether heads are
grouped, whether embeddings are tied. Layers are chosen such that each kind occurs once; lists with
one entry a layer, and lists of layer numbers, follow the choice.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from pytest_ranks.models.layers import SHARED_LAYERS, choose_layers, layer_count, layer_numbers
from pytest_ranks.models.meanings import WINDOWS, hidden_of, tiny_value, unset_value
from pytest_ranks.models.particulars import particulars_of
from pytest_ranks.models.tokenizers import BOS_ID, EOS_ID, FIRST_RESERVED_ID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from pytest_ranks.models.meanings import Scale

# The roles that trainers and models look up; other *_token_ids are placeholders (image, audio).
TOKEN_ROLES = {
    "bos_token_id": BOS_ID,
    "decoder_start_token_id": BOS_ID,
    "cls_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "sep_token_id": EOS_ID,
    "forced_eos_token_id": EOS_ID,
}


def pattern_config(
    config_class: type[PretrainedConfig], overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """Return the family's default config, with the switches that the user (or we) set.

    Booleans and words decide which kinds of layers there are; sizes are not needed here.
    """
    fixed = {**particulars_of(config_class), **overrides}
    fields = own_fields(config_class)
    return config_class(
        **{k: v for k, v in fixed.items() if k in fields and isinstance(v, (bool, str))}
    )


def tiny_config(
    pattern: PretrainedConfig,
    *,
    scale: Scale,
    pad_id: int,
    overrides: Mapping[str, Any],
    layers: int | None = None,
) -> PretrainedConfig:
    """Make a tiny config after the pattern of a full one.

    Args:
        pattern: the family's default config, or a part of it.
        scale: the numbers that sizes are derived from.
        pad_id: id of the padding token.
        overrides: fields that the user set; those that this config does not have are passed over.
        layers: number of layers that the user asked for; None: one of each kind, at least two.

    Returns:
        The config; `transformers` has validated it.
    """
    config_class = type(pattern)
    values, derived = default_values(pattern)
    particulars = particulars_of(config_class)
    chosen = choose_layers(values, count=layers or particulars.get("num_hidden_layers"))
    if chosen:
        scale = dataclasses.replace(scale, layers=len(chosen))
    fixed = {name: v(scale) if callable(v) else v for name, v in particulars.items()}
    fixed.update({name: value for name, value in overrides.items() if name in values})
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in fixed:
            continue
        if name in config_class.sub_configs and value is not None:
            arguments[name] = tiny_config(
                value, scale=scale, pad_id=pad_id, overrides=overrides, layers=layers
            )
            continue
        if value is None:
            arguments[name] = unset_value(name, scale)
            continue
        tiny = _tiny(name, value, scale=scale, values=values, chosen=chosen)
        # What is worked out from other fields is left to the family; lists, rotary parameters and
        # windows it works out from numbers of its own.
        own = isinstance(value, (list, dict)) or WINDOWS.fullmatch(name)
        if name not in derived or (own and tiny != value):
            arguments[name] = tiny
    arguments.update(_token_ids(values, pad_id=pad_id))
    arguments.update(_training_switches(values, config_class))
    arguments.update(fixed)
    return config_class(**arguments)


def own_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the fields that a config class adds to the base class, with their defaults."""
    from transformers import PretrainedConfig

    inherited = _fields(PretrainedConfig)
    return {k: v for k, v in _fields(config_class).items() if k not in inherited}


def _fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the arguments of a config class, which transformers 5.0 wrote as `__init__`."""
    if not dataclasses.is_dataclass(config_class):
        arguments = inspect.signature(config_class.__init__).parameters.values()
        return {a.name: a.default for a in arguments if a.default is not a.empty}
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(config_class)
        if field.init
    }


def default_values(pattern: PretrainedConfig) -> tuple[dict[str, Any], set[str]]:
    """Return a config's values, and the names of those that it derives from the others.

    Args:
        pattern: a full config.

    Returns:
        The value of each field, and the fields whose own default is None ("work it out").
    """
    fields = own_fields(type(pattern))
    values = {name: vars(pattern).get(name, default) for name, default in fields.items()}
    derived = {name for name, default in fields.items() if default is None}
    per_layer = pattern.to_dict().get("per_layer_config")
    if per_layer:
        values["per_layer_config"] = {int(layer): own for layer, own in per_layer.items()}
    return values, derived


def _tiny(
    name: str, value: Any, *, scale: Scale, values: Mapping[str, Any], chosen: list[int]
) -> Any:
    """Return the tiny form of one value, whatever its type."""
    if name == SHARED_LAYERS:
        return sum(layer >= layer_count(values) - value for layer in chosen)
    if name == "per_layer_config":
        return {
            new: _tiny_layer(value[old], scale=scale, values=values)
            for new, old in enumerate(chosen)
            if old in value
        }
    if isinstance(value, dict):
        return _tiny_rope(value, scale=scale, values=values) if "rope" in name else value
    if isinstance(value, (list, tuple)):
        count = layer_count(values)
        if (numbers := layer_numbers(name, value, count)) is not None:
            return [new for new, old in enumerate(chosen) if old in numbers]
        if chosen and len(value) == count:
            value = [value[layer] for layer in chosen]
        return [_tiny(name, item, scale=scale, values=values, chosen=[]) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_token_id"):
        return tiny_value(name, value, scale, values)
    return value


def _tiny_layer(
    own: Mapping[str, Any], *, scale: Scale, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one layer's deviations from the config, in the proportion that they have."""
    tiny = {}
    for name, value in own.items():
        base = values.get(name)
        if isinstance(value, int) and isinstance(base, int) and base > 0:
            value = int(tiny_value(name, base, scale, values) * value / base)
        tiny[name] = value
    return tiny


def _tiny_rope(
    rope: Mapping[str, Any], *, scale: Scale, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return rotary parameters for short positions; nested ones hold one set a kind of layer."""
    tiny: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _tiny_rope(value, scale=scale, values=values)
        elif name == "original_max_position_embeddings":
            value = tiny_value(name, value, scale, values)
        tiny[name] = value
    return tiny


def _token_ids(values: Mapping[str, Any], *, pad_id: int) -> dict[str, int]:
    """Return an id inside the vocabulary for every field that names a token."""
    ids = {"pad_token_id": pad_id, **TOKEN_ROLES}
    placeholders = [
        name
        for name, value in values.items()
        if name.endswith(("_token_id", "_token_index"))
        and name not in ids
        and isinstance(value, int)
    ]
    named = {name: FIRST_RESERVED_ID + i for i, name in enumerate(sorted(placeholders))}
    return {**{name: token for name, token in ids.items() if name in values}, **named}


def _training_switches(
    values: Mapping[str, Any], config_class: type[PretrainedConfig]
) -> dict[str, Any]:
    """Return what training needs: no key-value cache, and causal attention for encoder families."""
    switches: dict[str, Any] = {}
    for name in ("use_cache", "use_mamba_kernels"):  # the kernels need CUDA and come from the hub
        if name in values:
            switches[name] = False
    is_encoder_decoder = getattr(config_class, "is_encoder_decoder", False)
    if values.get("is_decoder") is False and not is_encoder_decoder and hidden_of(values):
        switches["is_decoder"] = True
    return switches
