"""What a user may set on a tiny model: names, sizes that others follow, and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.models.meanings import KEY_VALUE_HEADS, LAYERS, OWN_WIDTH, Scale
from pytest_ranks.models.shrink import own_fields, pattern_config
from pytest_ranks.models.tokenizers import EOS_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPECIAL_IDS: Final = ("pad_token_id", "bos_token_id", "eos_token_id")
# Accepted by every config, though few declare them.
EXTRA_FIELDS: Final = ("tie_word_embeddings", "attn_implementation")

# Overrides that other sizes follow, by the number of `Scale` that they set.
SCALED_BY: Final = {
    "layers": re.compile(rf"(?!encoder|num_encoder)({LAYERS.pattern})"),
    "kv_heads": KEY_VALUE_HEADS,
    "heads": re.compile(r"(num|n)_(attention_)?heads?|(decoder_)?attention_heads"),
    "head_dim": re.compile(r"head_dim|d_head|dim_head|d_kv|attention_head_size|kv_channels"),
    "hidden": OWN_WIDTH,
}


def own_names(
    family: str, config_class: type[PretrainedConfig], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return the overrides under the family's own field names (`n_embd` for `hidden_size`)."""
    if not overrides:
        return {}
    parts = _parts(pattern_config(config_class, {}))
    aliases = {alias: name for part in parts for alias, name in part.attribute_map.items()}
    known = {name for part in parts for name in own_fields(type(part))} | set(EXTRA_FIELDS)
    for name in overrides:
        if name not in known and name not in aliases:
            near = did_you_mean(name, known | set(aliases))
            raise BadInputError(
                f"{name} is no config field of {family!r}.{near} "
                f"Fields of {config_class.__name__} can be overridden"
            )
    return {name if name in known else aliases[name]: v for name, v in overrides.items()}


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return a config and its parts (`text_config`), parts of parts included."""
    parts = [config]
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            parts += _parts(getattr(config, name))
    return parts


def scale_of(
    family: str, overrides: dict[str, Any], pattern: PretrainedConfig
) -> tuple[Scale, int | None]:
    """Return the numbers that sizes are derived from, after the user's wishes."""
    scale = Scale(vocab_size=overrides.get("vocab_size", VOCAB_SIZE))
    layers = None
    for name, value in overrides.items():
        of = next((kind for kind, names in SCALED_BY.items() if names.fullmatch(name)), None)
        if of is None or value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInputError(f"{name} is {value!r}: expected an integer of 1 or more")
        if of == "layers":
            layers = value
        elif of != "kv_heads":
            scale = replace(scale, **{of: value})
    _check_heads(family, overrides, scale, pattern)
    return scale, layers


def _check_heads(
    family: str, overrides: dict[str, Any], scale: Scale, pattern: PretrainedConfig
) -> None:
    """Refuse head counts that do not divide what they split."""
    if scale.hidden % scale.heads and scale.head_dim is None:
        way_out = ", or give head_dim" if hasattr(pattern.get_text_config(), "head_dim") else ""
        raise BadInputError(
            f"{family!r} with {scale.heads} attention heads and width {scale.hidden}: the heads "
            f"must divide the width; use a multiple of {scale.heads}{way_out}"
        )
    if scale.coupled_head_dim % 2 and hasattr(pattern.get_text_config(), "rope_parameters"):
        raise BadInputError(
            f"{family!r} with heads of size {scale.coupled_head_dim}: rotary embeddings need an "
            f"even size (width {scale.hidden}, {scale.heads} attention heads)"
        )
    for name, value in overrides.items():
        if KEY_VALUE_HEADS.fullmatch(name) and value and scale.heads % value:
            raise BadInputError(
                f"{name}={value} with {scale.heads} attention heads: "
                f"the key and value heads must divide the attention heads"
            )


def check_token_ids(overrides: dict[str, Any], tokenizer: Any) -> None:
    """Refuse special ids that the tokenizer would contradict."""
    for name in SPECIAL_IDS:
        if overrides.get(name, getattr(tokenizer, name)) != getattr(tokenizer, name):
            also = f" or {EOS_ID}, its <eos>" if name == "pad_token_id" else ""
            raise BadInputError(
                f"{name}={overrides[name]!r}: "
                f"the byte tokenizer's is {getattr(tokenizer, name)}{also}"
            )
