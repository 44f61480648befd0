from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

peft = pytest.importorskip("peft", reason="needs peft")

from pytest_ranks.errors import BadInputError  # noqa: E402
from pytest_ranks.models import tiny_model  # noqa: E402
from pytest_ranks.reference import (  # noqa: E402
    TrainConfig,
    Trainer,
    lora,
)
from pytest_ranks.reference.checkpoint import full_on_cpu  # noqa: E402
from pytest_ranks.reference.model import load_model  # noqa: E402

SAMPLES = [{"input_ids": [*range(1, n)], "labels": [*range(1, n)]} for n in (6, 9, 4, 12)]
PROBE = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def trainer_of(model, **fields):
    base = {"lr": 1e-2, "max_steps": 3, "micro_batch": 4, "device": "cpu", "lora_rank": 4}
    return Trainer(TrainConfig(**(base | fields)), model=model, samples=SAMPLES)


def whole(model):
    return {name: full_on_cpu(p.detach()).clone() for name, p in model.named_parameters()}


def base_name(name):
    return name.replace(".base_layer.", ".")


def check_what_changed(trainer, original):
    """Exactly the adapters moved: the base model has its bits, every B left zero behind."""
    found = whole(trainer.model)
    adapters = {name for name in found if lora.is_adapter(name)}
    assert {base_name(name) for name in found if name not in adapters} == original.keys()
    for name, value in found.items():
        if name in adapters:
            assert torch.isfinite(value).all()
            assert ".lora_A." in name or value.abs().max() > 1e-4, name
        else:
            assert torch.equal(value, original[base_name(name)]), name
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = trainer.model.named_parameters()
    assert trained == {id(p) for name, p in named if name in adapters}
    return found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "bloom"])
def test_adapters_alone_are_trained(family, recompute):
    model = tiny_model(family)
    original = whole(model)
    trainer = trainer_of(model, activation_checkpointing=recompute)
    history = trainer.train()
    check_what_changed(trainer, original)
    assert history[-1]["loss"] < history[0]["loss"]


def test_recomputing_changes_no_bit_of_them():
    results = []
    for recompute in (False, True):
        trainer = trainer_of(
            tiny_model("llama"), activation_checkpointing=recompute, lora_dropout=0.3
        )
        trainer.train()
        results.append(whole(trainer.model))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_first_loss_is_the_base_models():
    adapted = trainer_of(tiny_model("llama"), max_steps=1).train()
    plain = trainer_of(tiny_model("llama"), max_steps=1, lora_rank=None).train()
    assert adapted[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_trains(rank, strategy):
    model = tiny_model("llama")
    original = whole(model)
    fields = {"strategy": strategy, "micro_batch": 2, "lora_rank": 3, "optimizer": "sgd", "lr": 0.5}
    trainer = trainer_of(model, **fields)
    trainer.train()
    found = check_what_changed(trainer, original)

    alone = tiny_model("llama")
    lora.add_adapters(alone, trainer.config)
    for window in trainer.order(0), trainer.order(1), trainer.order(2):
        alone.zero_grad()
        tokens = sum(len(sample["labels"]) - 1 for sample in SAMPLES)
        for index in window:
            ids = torch.tensor([SAMPLES[index]["input_ids"]])
            chances = alone(input_ids=ids).logits[0, :-1].log_softmax(-1)
            (-chances.gather(1, ids[0, 1:, None]).sum() / tokens).backward()
        gradients = [p.grad for p in alone.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for parameter in alone.parameters():
            if parameter.grad is not None:
                factor = min(1.0, 1.0 / (norm.item() + 1e-6))
                parameter.data -= 0.5 * factor * parameter.grad
    for name, value in whole(alone).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.ranks([1, 2])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's own call
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_and_separate_exports_answer_as_the_trained_model(rank, tmp_path, family):
    folders = [str(tmp_path)]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    if rank.index == 0:
        base = tiny_model(family)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith("bias"):  # zeros would not be missed
                    parameter.normal_()
        base.save(folder / "base")
    dist.barrier()
    model, tokenizer = load_model(folder / "base")
    size = 4 // rank.world_size
    trainer = trainer_of(model, strategy="fsdp2", micro_batch=size, lora_alpha=32)
    trainer.tokenizer = tokenizer
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        wanted = trainer.model(input_ids=PROBE).logits
    merged, its_tokenizer = load_model(trainer.export(folder / "merged"))
    assert its_tokenizer is not None
    base, _ = load_model(folder / "base")
    with torch.no_grad():
        untrained = base.eval()(input_ids=PROBE).logits
        assert (untrained - wanted).abs().max() > 1e-2
        torch.testing.assert_close(merged.eval()(input_ids=PROBE).logits, wanted)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in base.named_parameters()]

    alone = lora.save_adapter(
        trainer.model, folder / "adapter", settings=trainer.lora_settings, world=trainer.world
    )
    files = {file.name for file in alone.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)
    assert settings["base_model_name_or_path"] == str(folder / "base")
    loaded = peft.PeftModel.from_pretrained(base, alone).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=PROBE).logits, wanted)


def test_export_follows_the_configuration_and_can_be_cast(tmp_path):
    trainer = trainer_of(tiny_model("llama"), lora_export="adapter", max_steps=1)
    trainer.train()
    assert not (trainer.export(tmp_path / "adapter") / "model.safetensors").exists()
    trainer = trainer_of(tiny_model("llama"), max_steps=1)
    trainer.train()
    folder = trainer.export(tmp_path / "merged", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert not any("lora" in name for name in load_model(folder)[0].state_dict())


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    fields = {"lora_dropout": 0.2, "max_steps": 4, "micro_batch": 2}
    saving = trainer_of(tiny_model(), checkpoint_every=2, out_dir=tmp_path, **fields)
    saving.train()
    resumed = trainer_of(tiny_model(), resume_from=tmp_path / "checkpoint-2.pt", **fields)
    resumed.train()
    wanted, found = whole(saving.model), whole(resumed.model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = trainer_of(
        tiny_model(), resume_from=tmp_path / "checkpoint-2.pt", **fields | {"lora_alpha": 1.0}
    )
    with pytest.raises(BadInputError, match=r"trained with lora_alpha=None, this run has .*=1\.0"):
        other.train()


def test_targets_and_scale_are_the_ones_given():
    model = tiny_model("llama")
    settings = lora.add_adapters(
        model,
        TrainConfig(max_steps=1, lora_rank=2, lora_alpha=6.0, lora_targets=("q_proj", "down_proj")),
    )
    layers = lora.adapted_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "down_proj"}
    assert len(layers) == 4
    assert {layer.scaling["default"] for layer in layers.values()} == {3.0}
    assert settings.r == 2
    every = tiny_model("llama")
    lora.add_adapters(every, TrainConfig(max_steps=1, lora_rank=2))
    ends = {name.rpartition(".")[2] for name in lora.adapted_layers(every)}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_draw_does_not_depend_on_what_was_drawn_before():
    drawn = []
    for calls in (0, 5):
        torch.manual_seed(calls)
        model = tiny_model("llama")
        before = torch.get_rng_state()
        lora.add_adapters(model, TrainConfig(max_steps=1, lora_rank=2))
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(whole(model))
    assert all(torch.equal(drawn[0][name], value) for name, value in drawn[1].items())


def test_targets_that_are_not_there_are_named_with_those_that_are():
    with pytest.raises(BadInputError) as caught:
        trainer_of(tiny_model("gpt2"), lora_targets=("q_proj",)).train()
    text = str(caught.value)
    assert text.startswith("lora_targets=('q_proj',): Target modules ")
    assert text.endswith("The linear layers of GPT2LMHeadModel are c_attn, c_fc, c_proj, lm_head.")
    with pytest.raises(BadInputError) as caught:
        trainer_of(tiny_model("llama"), lora_targets=("embed_tokens",)).train()
    assert str(caught.value) == (
        "lora_targets=('embed_tokens',): 'model.embed_tokens' is a Embedding; adapters go beside "
        "linear layers only."
    )


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")  # which is the point
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's own call
def test_a_head_that_is_also_the_embedding_is_not_merged(tmp_path):
    with pytest.raises(BadInputError) as caught:
        trainer_of(tiny_model("gpt2"), lora_targets=("lm_head",)).train()
    assert str(caught.value) == (
        "lora_targets=('lm_head',): the weight of 'lm_head' is shared with another layer, which "
        "merging would change too; leave it out, or use lora_export='adapter'."
    )
    trainer = trainer_of(tiny_model("gpt2"), lora_targets=("lm_head",), lora_export="adapter")
    trainer.train()
    loaded = peft.PeftModel.from_pretrained(tiny_model("gpt2"), trainer.export(tmp_path / "alone"))
    with torch.no_grad():
        wanted = trainer.model.eval()(PROBE).logits
        torch.testing.assert_close(loaded.eval()(PROBE).logits, wanted)
    untied = trainer_of(tiny_model("llama"), lora_targets=("lm_head",))
    untied.train()
    untied.model.eval()
    merged, _ = load_model(untied.export(tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(PROBE).logits, untied.model(PROBE).logits)


def test_without_peft_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInputError) as caught:
        trainer_of(tiny_model("llama")).train()
    assert str(caught.value) == (
        "lora_rank=4 needs peft (import of peft halted; None in sys.modules); "
        "install it with: pip install 'pytest-ranks[lora]'"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"lora_rank": 0}, "lora_rank=0 is not a whole number of at least 1."),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 needs lora_rank, the adapters' rank."),
        ({"lora_rank": 1, "lora_dropout": 1.0}, "lora_dropout=1.0 is not a number in [0, 1)."),
        ({"lora_alpha": 8.0}, "lora_alpha=8.0 needs lora_rank, the adapters' rank."),
        (
            {"lora_rank": 1, "lora_alpha": 0.0},
            "lora_alpha=0.0 is not a finite number above 0.",
        ),
        (
            {"lora_rank": 1, "lora_targets": "q_proj"},
            "lora_targets='q_proj' is not a tuple of names; expected one or more, such as "
            "('q_proj', 'v_proj'), or None for every linear layer but the head.",
        ),
        (
            {"lora_rank": 1, "lora_export": "merge"},
            "lora_export='merge' is not known; use one of 'merged', 'adapter'. "
            "Did you mean 'merged'?",
        ),
        (
            {"lora_rank": 1, "initialization": "broadcast", "strategy": "fsdp2"},
            "found lora_rank=1 and initialization='broadcast'; give one of them: adapters are put "
            "beside a model that every rank holds whole and that stays as it is.",
        ),
        (
            {"lora_rank": 1, "orthogonal_rank_ratio": 0.5},
            "found lora_rank=1 and orthogonal_rank_ratio=0.5; give one of them: adapters are put "
            "beside a model that every rank holds whole and that stays as it is.",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields, text):
    with pytest.raises(BadInputError) as caught:
        TrainConfig(max_steps=1, **fields)
    assert str(caught.value) == text
