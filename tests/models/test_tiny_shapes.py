"""The rules behind tiny configs: what a field's name means, and which layers are kept."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from pytest_ranks.models import causal_lm_families, tiny_model
from pytest_ranks.models.layers import choose_layers, layer_numbers
from pytest_ranks.models.meanings import Scale, tiny_value
from pytest_ranks.models.overrides import own_names
from pytest_ranks.models.particulars import NOT_ALONE, PARTICULARS

SCALE = Scale(vocab_size=320)
LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("name", "default", "family", "tiny"),
    [
        ("hidden_size", 4096, LLAMA, 64),
        ("n_embd", 768, {}, 64),
        ("intermediate_size", 11008, LLAMA, 128),
        ("moe_intermediate_size", 2048, LLAMA, 32),
        ("num_key_value_heads", 8, LLAMA, 2),
        ("num_key_value_heads", 32, LLAMA, 4),  # multi-head stays multi-head
        ("num_key_value_heads", 1, LLAMA, 1),  # multi-query stays multi-query
        ("head_dim", 128, LLAMA, 16),
        ("head_dim", 256, LLAMA, 32),  # heads larger than their share of the width
        ("head_dim", 64, {**LLAMA, "qk_rope_head_dim": 64}, 8),
        ("qk_rope_head_dim", 64, LLAMA, 8),
        ("kv_lora_rank", 512, LLAMA, 16),
        ("mamba_d_head", 64, {"hidden_size": 4096, "mamba_n_heads": 128}, 32),
        ("attention_hidden_size", 7424, {"hidden_size": 3712}, 128),
        ("n_routed_experts", 256, LLAMA, 4),
        ("num_experts_per_tok", 8, LLAMA, 2),
        ("num_experts_per_tok", 1, LLAMA, 1),
        ("sliding_window", 4096, LLAMA, 32),
        ("sliding_window", 513, LLAMA, 33),
        ("max_position_embeddings", 131072, LLAMA, 512),
        ("max_position_embeddings", 128, LLAMA, 512),
        ("vocab_size", 32000, LLAMA, 320),
        ("vocab_size", 260, LLAMA, 320),
        ("type_vocab_size", 2, LLAMA, 2),
        ("num_hidden_layers", 61, LLAMA, 2),
        ("first_k_dense_replace", 3, LLAMA, 1),
        ("first_k_dense_replace", 0, LLAMA, 0),
        ("conv_kernel", 4, LLAMA, 4),  # no size: left alone
        ("an_unheard_of_dim", 9000, LLAMA, 64),
    ],
)
def test_meaning_of_a_name(name: str, default: int, family: dict[str, Any], tiny: int) -> None:
    assert tiny_value(name, default, SCALE, family) == tiny


@pytest.mark.parametrize(
    ("values", "count", "chosen"),
    [
        ({"num_hidden_layers": 32}, None, [0, 1]),
        ({"n_layer": 1}, None, [0, 0]),
        ({"num_hidden_layers": 6, "layer_types": ["s", "s", "f"] * 2}, None, [0, 2]),
        ({"num_hidden_layers": 6, "layer_types": ["s", "s", "f"] * 2}, 3, [0, 1, 2]),
        ({"num_hidden_layers": 3, "layer_types": ["s", "s", "f"]}, 7, [0, 1, 2, 0, 1, 2, 0]),
        ({"num_hidden_layers": 4, "a": [1, 1, 2, 2], "b": [1, 2, 1, 2]}, None, [0, 1, 2, 3]),
        ({"num_hidden_layers": 4, "moe_layers": [1, 3]}, None, [0, 1]),
        ({"num_hidden_layers": 4, "per_layer_config": {2: {"head_dim": 9}}}, None, [0, 2]),
        ({"num_hidden_layers": 5, "num_kv_shared_layers": 2}, None, [0, 3]),
        ({"num_hidden_layers": 99, "layer_types": [str(i) for i in range(99)]}, None, [*range(6)]),
        ({"vocab_size": 8}, None, []),
    ],
)
def test_one_layer_of_each_kind(
    values: dict[str, Any], count: int | None, chosen: list[int]
) -> None:
    assert choose_layers(values, count=count) == chosen


def test_numbers_of_layers_and_entries_of_layers_are_told_apart() -> None:
    assert layer_numbers("full_attn_idxs", [2, 5], 6) == {2, 5}
    assert layer_numbers("no_rope_layers", [1, 1, 0], 3) is None  # one entry a layer
    assert layer_numbers("moe_layers", [0, 1, 9], 6) is None  # not layers of this model
    assert layer_numbers("layer_types", [0, 1], 6) is None


def test_lists_of_layers_follow_the_choice() -> None:
    config = tiny_model("llama4_text").config
    assert config.moe_layers == list(range(config.num_hidden_layers))
    assert config.no_rope_layers == [1, 0]
    gemma4 = tiny_model("gemma4_text")
    sizes = [layer.self_attn.q_proj.out_features for layer in gemma4.model.layers]
    assert sizes == [128, 256]  # full attention has twice the head size there, as in the original


def test_positions_that_a_model_was_trained_on_are_fewer_than_it_takes() -> None:
    config = tiny_model("gpt_oss").config
    assert config.rope_parameters["original_max_position_embeddings"] == 128
    assert config.max_position_embeddings == 512


def test_placeholder_tokens_are_reserved_ones() -> None:
    model = tiny_model("gemma3")
    config = model.config
    ids = [config.image_token_index, config.boi_token_index, config.eoi_token_index]
    assert len(set(ids)) == 3
    assert all(model.tokenizer.decode([i]).startswith("<|reserved_") for i in ids)


def test_exceptions_name_real_fields() -> None:
    families = causal_lm_families()
    for family in set(PARTICULARS) & set(families):
        fields = dict.fromkeys(PARTICULARS[family])
        assert own_names(family, CONFIG_MAPPING[family], fields) == fields
    assert set(PARTICULARS) - set(families) == {"DbrxAttentionConfig"}
    assert set(NOT_ALONE) <= set(families)
