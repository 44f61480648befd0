"""What a rule cannot know: fields of single families, each with its reason.

A value is fixed, or a function of the `Scale` of the tiny config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_ranks.models.meanings import grouped

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pytest_ranks.models.meanings import Scale


def _in_turn(*kinds: str) -> Any:
    """Return the function that gives a scale's layers these kinds in turn."""

    def kinds_of_layers(scale: Scale) -> list[str]:
        return [kinds[layer % len(kinds)] for layer in range(scale.layers)]

    return kinds_of_layers


# By model type of the config in question, which may be one part of a composite; by class name where
# it has no type.
PARTICULARS: Final[dict[str, dict[str, Any]]] = {
    # The default config leaves rotary parameters empty, and its attention looks them up by kind.
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    },
    # Its attention reads a field that its config class does not declare, and always clips.
    "DbrxAttentionConfig": {"rope_theta": 500_000.0, "clip_qkv": 8.0},
    # Its rotary part is fixed, so the size of its heads cannot follow the width.
    "dots3_note_text": {"head_dim": 32},
    # Experts of which every token uses all: the default config leaves their number open.
    "dots1": {"n_shared_experts": 1},
    # Text alone: with the default, the model takes the first positions for an image and cuts them.
    "git": {"num_image_with_embedding": 0},
    # `attention_types` counts repetitions of a pattern; `attention_layers` is worked out from it.
    "gpt_neo": {
        "attention_types": lambda scale: [
            [[kind], 1] for kind in _in_turn("global", "local")(scale)
        ],
    },
    # Every model released since Llama 3 and Qwen2 groups its heads; the default configs do not.
    "llama": {"num_key_value_heads": grouped},
    "qwen2": {"num_key_value_heads": grouped},
    # The default config does not say which layers attend.
    "lfm2_moe": {"layer_types": _in_turn("conv", "full_attention")},
    # Logits are divided by hidden_size / dim_model_base, 10 in the default config.
    "minicpm3": {"dim_model_base": lambda scale: max(scale.hidden // 10, 1)},
    # The default config has no indexer, though its layers ask for one.
    "qwen4_exp_text": {
        "indexer_n_heads": lambda scale: scale.heads,
        "indexer_kv_heads": 1,
        "indexer_head_dim": lambda scale: 2 * scale.coupled_head_dim,
        "indexer_budget": lambda scale: scale.top,
        "indexer_compress_ratio": 4,
    },
    # The pattern is counted in blocks, not in layers.
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # Axial position embeddings train on sequences of exactly one length only.
    "reformer": {"axial_pos_embds": False},
    # It reads in two directions by default. (So does xlnet, whose other mode cannot run with a mask.)
    "xlm": {"causal": True},
    # A forward without `lang_ids` needs a default.
    "xmod": {"default_language": "en_XX"},
    # Hybrid layers share one transformer block: tying it needs two of them.
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _in_turn("linear_attention", "hybrid"),
    },
}


# Families that are listed as causal language models but are no text model that stands alone.
NOT_ALONE: Final[dict[str, str]] = {
    "gemma4_assistant": "it drafts for a gemma4 model and reads that model's keys and values",
    "gemma4_unified_assistant": "it drafts for a gemma4_unified model and reads its keys and "
    "values",
    "musicgen": "its decoder is trained on audio codes",
    "musicgen_melody": "its decoder is trained on audio codes",
}


def particulars_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the exceptions for a config class."""
    return PARTICULARS.get(config_class.model_type or config_class.__name__, {})
