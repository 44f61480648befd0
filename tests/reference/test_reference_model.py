from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import byte_tokenizer
from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.model import accepted_keywords, align, load_model, padding_id
from pytest_ranks.reference.parallel import find_blocks


@pytest.mark.parametrize("tied", [False, True])
def test_alignment_grows_the_embedding_and_keeps_old_rows_and_ties(make_model, tied):
    model, tokenizer = make_model(tie_word_embeddings=tied), byte_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    changes = align(model, tokenizer)
    assert f"embedding grown from 96 to {len(tokenizer)} rows" in changes
    assert torch.equal(model.get_input_embeddings().weight[:96], before)
    assert torch.equal(model.get_output_embeddings().weight[:96], head)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert align(model, tokenizer) == []


def test_tokenizer_without_padding_pads_with_end_of_text(make_model):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    changes = align(make_model(), tokenizer)
    assert any("padding token set to the end-of-text token" in change for change in changes)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == padding_id(None, tokenizer)


def test_padding_falls_back_to_the_model_and_then_to_zero(make_model):
    model = make_model(pad_token_id=7)
    assert padding_id(model, None) == 7
    assert padding_id(torch.nn.Linear(1, 1), None) == 0


def test_only_keywords_that_a_forward_takes_are_given():
    names = ("input_ids", "use_cache")
    assert accepted_keywords(lambda input_ids: 0, names) == {"input_ids"}
    assert accepted_keywords(lambda input_ids, **rest: 0, names) == set(names)


def test_blocks_are_those_that_the_model_names(make_model):
    model = make_model()
    assert {id(block) for block in find_blocks(model)} == {
        id(layer) for layer in model.model.layers
    }
    assert find_blocks(torch.nn.Linear(1, 1)) == []


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_what_from_pretrained_loads(make_model, samples, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    tokenizer = byte_tokenizer()
    config = TrainConfig(max_steps=2, lr=1e-2, micro_batch=4, device="cpu")
    trainer = Trainer(config, model=model, samples=samples, tokenizer=tokenizer)
    trainer.train()
    folder = trainer.export(tmp_path / "model")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 - no mapping
    again, tokenizer_again = load_model(folder)
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    trained, reloaded = model.state_dict(), again.state_dict()
    assert trained.keys() == reloaded.keys()
    assert all(torch.equal(trained[name], reloaded[name]) for name in trained)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_export_can_be_cast(make_model, samples, tmp_path):
    trainer = Trainer(TrainConfig(max_steps=1, device="cpu"), model=make_model(), samples=samples)
    folder = trainer.export(tmp_path / "half", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(
        BadInputError, match=r"has no config\.json; expected a folder that save_pre"
    ):
        load_model(tmp_path)
    Path(tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="cannot be loaded: "):
        load_model(tmp_path)


def test_export_needs_a_transformers_model(samples, tmp_path):
    config = TrainConfig(max_steps=1, device="cpu")
    trainer = Trainer(config, model=torch.nn.Linear(1, 1), samples=samples)
    with pytest.raises(BadInputError, match="Linear has no save_pretrained"):
        trainer.export(tmp_path)
