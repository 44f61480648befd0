"""What a config field means, read from its name, and how small it may become.

The fields of transformers configs are named by convention, not by contract: the width of a model is
`hidden_size`, `d_model`, `n_embd` or `emb_dim`. Each row of `MEANINGS` is one idea: a pattern over
field names and the tiny value for it. The first row that matches decides; a field that no row knows
keeps its default. Everything is derived from a few numbers (`Scale`), so that fields which must
agree (heads times head size, groups and experts, state-space heads and expansion) do agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_ranks.models.tokenizers import BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The names that transformers 5.23 uses for one meaning; more specific rows of MEANINGS come first.
OWN_WIDTH = re.compile(r"hidden_size|(d|dim)_model|n_embd|emb_dim|embedding_dim")
WIDTH = re.compile(
    rf"({OWN_WIDTH.pattern}|embed_dim|\w*embedding_(size|dim)|word_embed_proj_dim"
    r"|lru_width|\w+_hidden_size|hidden_size_\w+|\w*_embed_dim|\w*proj(ection|ector)?_(size|dim)"
    r"|(vision|audio|adapter)_(output_dim|input_size|out_dim|dim)|output_proj_dims|input_size)"
)
HEADS = re.compile(
    r"((n|num)_heads?|(\w+_)?attention_heads|\w*_n_heads|(n_)?mamba_(num_|n_)?heads"
    r"|linear_num_heads|num_attention_heads_per_layer)"
)
KEY_VALUE_HEADS = re.compile(r"(\w+_)?(key_value|kv|kv_n)_heads|num_query_groups")
LAYERS = re.compile(
    r"((n|num)_)?(conf_num_)?((hidden|decoder|encoder)_)?layers|n_layer|num_blocks|depth"
    r"|num_layers_per_stack|num_global_layers"
)
HEAD_DIM = re.compile(
    r"(swa_)?head_dim|d_head|dim_head|d_kv|attention_head_(dim|size)|kv_channels"
    r"|mamba_(d_head|head_?dim)"
)

# The part of a latent attention's head that carries positions; its other part has 16.
ROTARY_PART: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The few numbers that every tiny size is derived from.

    The defaults divide by 2 and 4, so that a tiny model can be split over as many tensor-parallel
    ranks, and every product that a family checks (heads times head size) comes out whole.

    Attributes:
        vocab_size: number of token ids.
        hidden: width of the residual stream.
        heads: query heads.
        layers: decoder layers that the tiny config has.
        positions: longest sequence; above 256, so that tests can use real sequences.
        window: sliding windows and chunks; far below `positions`, so that they matter.
        top: tokens or blocks that a sparse attention may choose.
        experts: experts of a layer; two groups of two, as grouped routing needs at least.
        rank: of low-rank factors, as in latent attention.
        head_dim: size of a head that the user asked for; None: from hidden and heads.
    """

    vocab_size: int
    hidden: int = 64
    heads: int = 4
    layers: int = 2
    positions: int = 512
    window: int = 32
    top: int = 16
    experts: int = 4
    rank: int = 16
    head_dim: int | None = None

    @property
    def coupled_head_dim(self) -> int:
        """The size of a head when the heads share the width."""
        return self.head_dim or self.hidden // self.heads


def _width(name: str, default: int, scale: Scale, family: Mapping[str, Any]) -> int:
    """Make all widths one, so that parts fit together; an attention may be twice as wide."""
    twice = "attention" in name and default == 2 * (hidden_of(family) or 0)
    return 2 * scale.hidden if twice else scale.hidden


def _head_dim(name: str, default: int, scale: Scale, family: Mapping[str, Any]) -> int:
    """Share the width among the heads, or keep heads larger than their share where they are.

    With multi-head latent attention, `head_dim` is another name for the rotary part.
    """
    if default == family.get("qk_rope_head_dim"):
        return min(default, ROTARY_PART)
    heads = next((family[field] for field in heads_beside(name, family)), None)
    hidden = hidden_of(family)
    if not heads or not hidden or default * heads == hidden:
        return scale.coupled_head_dim
    return scale.head_dim or 2 * scale.hidden // scale.heads


def _key_value_heads(name: str, default: int, scale: Scale, family: Mapping[str, Any]) -> int:
    """Keep what the family has: multi-head, grouped-query or multi-query attention."""
    heads = next((family[field] for field in heads_beside(name, family)), default)
    if default == 1:
        return 1
    if default >= heads:
        return scale.heads
    return grouped(scale)


def grouped(scale: Scale) -> int:
    """Return the number of key and value heads when groups of query heads share one."""
    most = max(scale.heads // 2, 1)
    return next(n for n in range(most, 0, -1) if scale.heads % n == 0)


def _feed_forward(name: str, _: int, scale: Scale, __: Mapping[str, Any]) -> int:
    return scale.hidden // 2 if re.search(r"moe|expert", name) else 2 * scale.hidden


def _window(_: str, default: int, scale: Scale, __: Mapping[str, Any]) -> int:
    """Keep an odd window odd: such a family counts the query itself as well."""
    return min(default, scale.window + default % 2) if default > 0 else default


def at_most(limit: Callable[[Scale], int]) -> Callable[..., int]:
    """Return the rule that caps a default (and leaves -1 or 0, which mean "off", alone)."""
    return lambda _name, default, scale, _family: min(default, limit(scale))


WINDOWS = re.compile(
    r"(?!no_)\w*(window_size|sliding_window(_size)?|window_len|local_attention)"
    r"|attention_chunk_size"
)

MEANINGS: Final[tuple[tuple[str, re.Pattern[str], Callable[..., int]], ...]] = (
    (
        "tokens",  # also where the family's own is smaller: the tokenizer's ids must fit
        re.compile(r"vocab_size"),
        lambda _n, default, s, _f: s.vocab_size if default > BYTES else default,
    ),
    ("other tokens", re.compile(r"\w*vocab_size\w*|\w+_vocab"), at_most(lambda s: s.vocab_size)),
    ("layers", LAYERS, at_most(lambda s: s.layers)),
    ("last layer", re.compile(r"moe_layer_end_index"), at_most(lambda s: s.layers - 1)),
    (
        "first layers",  # one dense layer before the experts is as good as three
        re.compile(r"first_k_dense_replace|num_dense_layers|\w*start_index|max_window_layers"),
        at_most(lambda _: 1),
    ),
    (
        "layer patterns",  # every second layer, so that two layers show both kinds
        re.compile(r"\w*(period|interval|every_n\w*|_pattern|layer_group_size|layer_step)"),
        at_most(lambda _: 2),
    ),
    ("layer offsets", re.compile(r"\w*_layer_offset"), at_most(lambda _: 1)),
    ("key and value heads", KEY_VALUE_HEADS, _key_value_heads),
    ("linear attention key heads", re.compile(r"linear_num_key_heads"), at_most(lambda _: 2)),
    (
        "linear attention value heads",
        re.compile(r"linear_num_value_heads"),
        lambda _name, default, _scale, family: (
            2 if family.get("linear_num_key_heads") == default else 4
        ),
    ),
    ("heads", HEADS, lambda _name, _default, scale, _family: scale.heads),
    ("rotary part of a head", re.compile(r"qk_rope_head_dim"), at_most(lambda _: ROTARY_PART)),
    (
        "rotary size",
        re.compile(r"rotary_dim"),
        at_most(lambda s: max(s.coupled_head_dim // 4 * 2, 2)),
    ),
    ("head size", HEAD_DIM, _head_dim),
    ("query scale", re.compile(r"query_pre_attn_scalar"), _head_dim),
    ("other head sizes", re.compile(r"\w+_head_dim"), at_most(lambda _: 16)),
    ("state-space width", re.compile(r"mamba_d_ssm"), lambda _n, _d, scale, _f: 2 * scale.hidden),
    ("state", re.compile(r"\w*(d_state|state_size)"), at_most(lambda _: 16)),
    ("rank", re.compile(r"\w*(rank|lowrank)"), at_most(lambda s: s.rank)),
    (
        "experts",
        re.compile(r"(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num"),
        at_most(lambda s: s.experts),
    ),
    (
        "experts of a token",
        re.compile(r"(num_)?experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts"),
        at_most(lambda _: 2),
    ),
    ("shared experts", re.compile(r"\w*shared_experts"), at_most(lambda _: 1)),
    ("groups", re.compile(r"n_groups?|num_expert_group|\w*_n_?groups"), at_most(lambda _: 2)),
    ("groups of a token", re.compile(r"topk_group"), at_most(lambda _: 1)),
    (
        "feed forward",
        re.compile(
            r"(?!hidden_size)\w*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size)\w*"
            r"|n_inner|d_inner|d_ff|dff|dim_ff|prompt_mid_dim"
        ),
        _feed_forward,
    ),
    ("width", WIDTH, _width),
    (
        "trained positions",  # a quarter, so that a scaled rotary embedding is used beyond them
        re.compile(r"original_max_position_embeddings"),
        at_most(lambda s: s.positions // 4),
    ),
    (
        "positions",  # also where the family's own are fewer; a handful are not text positions
        re.compile(
            r"max_(target_)?(position_embeddings|positions)|n_positions|n_ctx|max_seq_len"
            r"|context_length|model_max_length"
        ),
        lambda _n, default, s, _f: s.positions if default > s.window else default,
    ),
    (
        "other positions",
        re.compile(r"\w*max_\w*position\w*|rel_extent|mem_len|\w*max_distance"),
        at_most(lambda s: s.positions),
    ),
    ("windows", WINDOWS, _window),
    (
        "chunks",
        re.compile(r"(?!.*feed_forward).*chunk_(size|length)|block_size|index_block_size"),
        at_most(lambda s: s.top),
    ),
    ("chosen blocks", re.compile(r"index_topk_blocks"), at_most(lambda _: 2)),
    (
        "chosen tokens",
        re.compile(r"index\w*_(topk|budget)|index_topk"),
        at_most(lambda s: s.top),
    ),
    (
        "image",
        re.compile(r"image_size"),
        lambda _n, _d, _s, family: 4 * family.get("patch_size", 8),
    ),
    # What no row above knows, but whose name says that it is a size.
    ("other sizes", re.compile(r"\w+_(size|dim|channels?|filters)"), at_most(lambda s: s.hidden)),
)


def tiny_value(name: str, default: int, scale: Scale, family: Mapping[str, Any]) -> int:
    """Return the tiny value of a config field.

    Args:
        name: the field's name.
        default: its value in the family's default config.
        scale: the numbers that sizes are derived from.
        family: all default values of this config, for rules that keep a ratio.

    Returns:
        The tiny value, or the default where no rule knows the name.
    """
    for _meaning, pattern, rule in MEANINGS:
        if pattern.fullmatch(name):
            return rule(name, default, scale, family)
    return default


def unset_value(name: str, scale: Scale) -> int | None:
    """Return what a field left at None is set to; None: leave it for the family to work out.

    Most families work these out, some models expect them. The values are those that a family that
    does work them out would arrive at.
    """
    meanings = {
        "head_dim": scale.coupled_head_dim,
        "num_key_value_heads": scale.heads,
        "n_routed_experts": scale.experts,
        "num_experts_per_tok": 2,
    }
    return meanings.get(name)


def hidden_of(family: Mapping[str, Any]) -> int | None:
    """Return the family's own width, whatever the field is called."""
    widths = (v for name, v in family.items() if OWN_WIDTH.fullmatch(name) and isinstance(v, int))
    return next(widths, None)


def heads_beside(name: str, family: Mapping[str, Any]) -> list[str]:
    """Return the fields that count the query heads which belong to a head field, best first.

    `swa_head_dim` and `swa_num_key_value_heads` belong to `swa_num_attention_heads`, `mamba_d_head`
    to `mamba_n_heads`, `head_dim` to `num_attention_heads` (or what the family calls it).
    """
    prefix = re.match(r"swa_|mamba_|index_|indexer_|conf_|decoder_|encoder_", name)
    known = [
        field
        for field, value in family.items()
        if HEADS.fullmatch(field) and isinstance(value, int) and not isinstance(value, bool)
    ]
    start = prefix.group() if prefix else ""
    own = [f for f in known if start and (f.startswith(start) or f"_{start}" in f)]
    plain = [f for f in known if re.fullmatch(r"(n|num)_(attention_)?heads?|attention_heads", f)]
    return own + plain + known
