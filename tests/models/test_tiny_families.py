"""Tiny models of many families: small, whole, seeded, trainable, and loaded as they were saved."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from pytest_ranks.models import byte_tokenizer, causal_lm_families, tiny_model
from pytest_ranks.models.shrink import own_fields

FAMILIES = (
    "deepseek_v3",
    "emu3",  # built from its text part, which alone could not be loaded again
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def batch(length: int = 48) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`: int64 [2, length], bytes only."""
    input_ids = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def same_bits(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


@every_family
def test_built_as_promised(family: str) -> None:
    model = tiny_model(family)
    config = model.config.get_text_config()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(module.training for module in model.modules())
    assert getattr(config, "use_cache", False) is False
    assert config.vocab_size == len(model.tokenizer) == 320
    assert model.get_input_embeddings().num_embeddings == 320
    for holder in (model.config, model.generation_config):
        assert (holder.pad_token_id, holder.bos_token_id, holder.eos_token_id) == (256, 257, 258)
    if family != "mamba":  # which has no positions
        assert config.max_position_embeddings >= 256


@every_family
def test_a_step_trains_it(family: str) -> None:
    model = tiny_model(family)
    inputs = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = model(**inputs, labels=inputs["input_ids"]).loss
    before.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert len(gradients) >= 0.7 * len(list(model.parameters()))
    optimizer.step()
    after = model(**inputs, labels=inputs["input_ids"]).loss
    assert after < before


@every_family
def test_saved_it_loads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, seed=3)
    assert model.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch()).logits, again(**batch()).logits)
    assert (
        tokenizer("é <eos>").input_ids
        == model.tokenizer("é <eos>").input_ids
        == [195, 169, 32, 258]
    )
    assert again.get_output_embeddings().weight.dtype == torch.float32


@every_family
def test_kinds_of_layers_and_ties_are_kept(family: str) -> None:
    full, tiny = CONFIG_MAPPING[family]().get_text_config(), tiny_model(family).config
    tiny = tiny.get_text_config()
    for kinds in ("layer_types", "mlp_layer_types"):
        if getattr(full, kinds, None):
            assert set(getattr(tiny, kinds)) == set(getattr(full, kinds))
    assert tiny.tie_word_embeddings == full.tie_word_embeddings
    if getattr(full, "num_key_value_heads", None):
        groups = full.num_attention_heads > full.num_key_value_heads
        groups = groups or family in ("llama", "qwen2")  # as released, not as the default config
        assert (tiny.num_attention_heads > tiny.num_key_value_heads) == groups
    if getattr(full, "sliding_window", None):
        assert 0 < tiny.sliding_window <= 33 < tiny.max_position_embeddings


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_grouped_query_attention(family: str) -> None:
    model = tiny_model(family)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 64
    assert attention.k_proj.out_features == attention.v_proj.out_features == 32


@pytest.mark.parametrize("family", ["bert", "llama", "mamba", "xlm"])
def test_logits_depend_on_earlier_tokens_alone(family: str) -> None:
    model = tiny_model(family).eval()
    inputs = batch()
    with torch.no_grad():
        one = model(**inputs).logits
        inputs["input_ids"][:, 20] = (inputs["input_ids"][:, 20] + 1) % 256
        difference = (one - model(**inputs).logits).abs().amax((0, 2))
    assert difference[:20].max() < 1e-5
    assert difference[20:].max() > 1e-5


def test_special_ids_also_where_the_config_has_no_field_for_them() -> None:
    model = tiny_model("gemma3")
    assert "pad_token_id" not in own_fields(type(model.config))
    for holder in (model.config, model.generation_config):
        assert (holder.pad_token_id, holder.bos_token_id, holder.eos_token_id) == (256, 257, 258)


def test_mixture_has_few_experts_and_uses_some() -> None:
    config = tiny_model("qwen3_moe").config
    assert (config.num_experts, config.num_experts_per_tok) == (4, 2)


def test_a_sliding_window_is_felt_inside_a_test_sequence() -> None:
    model = tiny_model("mistral", num_hidden_layers=1).eval()
    one = batch(length=64)["input_ids"]
    other = one.clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    with torch.no_grad():
        difference = (
            (model(input_ids=one).logits - model(input_ids=other).logits).abs().amax((0, 2))
        )
    window = model.config.sliding_window
    assert difference[:window].min() > 0
    assert difference[window:].max() == 0


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False), ("gemma2", True)])
def test_tied_or_untied_as_the_family_and_on_request(family: str, tied: bool) -> None:
    def is_tied(model: torch.nn.Module) -> bool:
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    assert is_tied(tiny_model(family)) is tied
    assert is_tied(tiny_model(family, tie_word_embeddings=True)) is True
    assert is_tied(tiny_model(family, tie_word_embeddings=False)) is False


@every_family
def test_the_seed_decides_every_bit(family: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        model = tiny_model(family, seed=5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(model, tiny_model(family, seed=5))
    assert not same_bits(model, tiny_model(family, seed=6))


def test_random_states_are_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    tiny_model("llama", seed=7)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


def test_defaults_of_the_process_do_not_matter() -> None:
    expected = tiny_model()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        model = tiny_model()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
    assert same_bits(expected, model)


def test_copies_and_pickles_keep_what_we_attached(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(model, other)
        assert other.tokenizer("a").input_ids == [97]
        with torch.no_grad():
            other.transformer.wte.weight.fill_(2.0)
        other.save(tmp_path)  # saves the copy, not the model that it was copied from
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.transformer.wte.weight.unique().tolist() == [2.0]
    assert model.transformer.wte.weight.unique().numel() > 1


def test_overrides_and_what_follows_them() -> None:
    config = tiny_model("llama", hidden_size=128, num_attention_heads=8).config
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (128, 16, 4)
    assert tiny_model("llama", num_attention_heads=1).config.num_key_value_heads == 1
    assert tiny_model("gpt2", hidden_size=32).config.n_embd == 32  # the family's name for it
    assert tiny_model("gpt2", max_position_embeddings=300).config.n_positions == 300
    config = tiny_model("qwen3", num_attention_heads=6, head_dim=16, num_key_value_heads=3).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 16)
    model = tiny_model("llama", vocab_size=1000)
    assert model.lm_head.out_features == len(model.tokenizer) == 1000


def test_layers_on_request_keep_the_pattern() -> None:
    def kinds(**overrides: int) -> list[str]:
        types = tiny_model("gemma3_text", **overrides).config.layer_types
        return [kind.removesuffix("_attention") for kind in types]

    assert kinds() == ["sliding", "full"]
    assert kinds(num_hidden_layers=1) == ["sliding"]
    assert kinds(num_hidden_layers=4) == ["sliding"] * 3 + ["full"]
    assert len(kinds(num_hidden_layers=60)) == 60
    layers = tiny_model("deepseek_v3", num_hidden_layers=3).model.layers
    kinds_of_mlp = [type(layer.mlp).__name__ for layer in layers]
    assert kinds_of_mlp == ["DeepseekV3MLP", "DeepseekV3MoE", "DeepseekV3MoE"]


def test_a_switch_decides_the_kinds_of_layers() -> None:
    config = tiny_model("qwen2", use_sliding_window=True).config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.sliding_window == 32


def test_override_reaches_the_text_part_of_a_composite() -> None:
    config = tiny_model("gemma3", num_hidden_layers=3, rms_norm_eps=0.5).config
    assert config.text_config.num_hidden_layers == 3
    assert config.text_config.rms_norm_eps == 0.5
    assert len(config.text_config.layer_types) == 3


def test_padding_with_the_end_token() -> None:
    model = tiny_model(pad_token_id=258)
    assert model.tokenizer.pad_token_id == model.config.pad_token_id == 258
    assert byte_tokenizer(pad_equals_eos=True).pad_token == model.tokenizer.pad_token


def test_families_are_those_of_transformers() -> None:
    families = causal_lm_families()
    assert set(FAMILIES) <= set(families)
    assert list(families) == sorted(families)
    assert len(families) > 100
