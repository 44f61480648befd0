from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import byte_tokenizer
from pytest_ranks.reference.alignment import align, largest_token_id


@pytest.fixture
def fitting(make_model):
    """Return a model and a tokenizer of one vocabulary whose special tokens agree."""
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id")}
    return make_model(vocab_size=320, eos_token_id=tokenizer.eos_token_id, **ids), tokenizer


def test_what_fits_stays_as_it_is(fitting):
    model, tokenizer = fitting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert align(model, tokenizer, resize=False) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_growth_to_a_multiple_keeps_old_rows_and_centres_new_ones(make_model, tied):
    model, tokenizer = make_model(tie_word_embeddings=tied), byte_tokenizer()
    old = {
        "embedding": model.get_input_embeddings().weight.detach().clone(),
        "head": model.get_output_embeddings().weight.detach().clone(),
    }
    changes = align(model, tokenizer, multiple_of=128)
    assert "embedding grown from 96 to 384 rows" in changes
    new = {
        "embedding": model.get_input_embeddings().weight.detach(),
        "head": model.get_output_embeddings().weight.detach(),
    }
    for part, rows in new.items():
        assert rows.shape == (384, 32)
        assert torch.equal(rows[:96], old[part])
        mean = old[part].mean(0)
        assert (rows[96:] - mean).abs().max() < 1e-3 * old[part].std()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 384
    assert align(model, tokenizer, multiple_of=128) == []


def test_a_smaller_tokenizer_does_not_shrink_the_model(make_model):
    model, tokenizer = make_model(vocab_size=1000), byte_tokenizer()
    assert not any("embedding" in change for change in align(model, tokenizer))
    assert model.get_input_embeddings().num_embeddings == 1000


def test_special_ids_agree_wherever_they_are_looked_up(make_model):
    model, tokenizer = make_model(vocab_size=320), byte_tokenizer()
    assert align(model, tokenizer) == [
        "config.pad_token_id None -> 256",
        "generation_config.pad_token_id None -> 256",
        "config.bos_token_id 1 -> 257",
        "generation_config.bos_token_id 1 -> 257",
        "config.eos_token_id 2 -> 258",
        "generation_config.eos_token_id 2 -> 258",
    ]
    for owner in (model.config, model.generation_config):
        assert (owner.pad_token_id, owner.bos_token_id, owner.eos_token_id) == (256, 257, 258)


def test_several_ends_of_text_are_kept_when_the_tokenizers_is_among_them(fitting):
    model, tokenizer = fitting
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert align(model, tokenizer) == []
    assert model.generation_config.eos_token_id == [7, tokenizer.eos_token_id]


def test_a_tokenizer_without_special_tokens_changes_none(fitting):
    model, tokenizer = fitting
    before = model.config.bos_token_id
    tokenizer.bos_token = None
    assert align(model, tokenizer) == []
    assert model.config.bos_token_id == before


def test_ids_with_gaps_get_rows_too(make_model):
    class Gappy:
        pad_token_id = bos_token_id = eos_token_id = None

        def __len__(self):
            return 3

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 99}

    assert largest_token_id(Gappy()) == 99
    model = make_model()
    assert align(model, Gappy()) == ["embedding grown from 96 to 100 rows"]
    with pytest.raises(BadInputError) as caught:
        align(make_model(), Gappy(), resize=False)
    assert str(caught.value) == (
        "the tokenizer has ids up to 99, the model has rows for 0 to 95; "
        "use the tokenizer that the model was made for, or let the embedding grow."
    )


def test_rows_without_values_grow_too():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=2))
    assert "embedding grown from 100 to 320 rows" in align(model, byte_tokenizer())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.is_meta


def test_another_models_tokenizer_is_refused_when_the_model_stays_as_it_is(make_model):
    with pytest.raises(BadInputError) as caught:
        align(make_model(vocab_size=320), byte_tokenizer(), resize=False)
    assert str(caught.value) == (
        "the tokenizer is not the one that the model was trained with: bos_token_id 1 in the "
        "model, 257 in the tokenizer; eos_token_id 2 in the model, 258 in the tokenizer. Use the "
        "tokenizer of the model's own folder."
    )
    one_differs = make_model(vocab_size=320, bos_token_id=257)  # a chat end-of-turn, say
    assert "config.eos_token_id 2 -> 258" in align(one_differs, byte_tokenizer(), resize=False)


@pytest.mark.parametrize("wrong", [0, -8, True])
def test_a_multiple_is_a_positive_number(fitting, wrong):
    model, tokenizer = fitting
    with pytest.raises(BadInputError) as caught:
        align(model, tokenizer, multiple_of=wrong)
    assert str(caught.value) == f"multiple_of={wrong!r} is not a whole number of at least 1."
