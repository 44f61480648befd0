from __future__ import annotations

import json
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import tiny_model
from pytest_ranks.reference import TrainConfig, Trainer


def config(**fields):
    base = {"micro_batch": 2, "gradient_accumulation_steps": 2, "optimizer": "sgd", "lr": 0.1,
            "max_grad_norm": None, "device": "cpu"}  # fmt: skip
    if "epochs" not in fields:
        base["max_steps"] = 3
    return TrainConfig(**(base | fields))


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def windows_of(trainer, samples):
    """The samples of each step, cut by hand."""
    order, size = trainer.order(0), trainer.global_batch
    return [[samples[i] for i in order[s : s + size]] for s in range(0, len(order), size)]


LAYOUTS = {
    "rows": {},
    "one row a forward": {"micro_batch": 1, "gradient_accumulation_steps": 4},
    "one forward": {"micro_batch": 4, "gradient_accumulation_steps": 1},
    "packed by step": {"max_tokens_per_rank": 40},
    "packed by step, greedy": {"max_tokens_per_rank": 31, "packer": "greedy"},
    "packed by step, by level": {"max_tokens_per_rank": 31, "packer": "level"},
    "packed by rows": {"pack_length": 40},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("max_grad_norm", "lr"), [(None, 0.1), (0.5, 2.0)])
def test_update_is_the_float64_oracles_in_every_layout(
    make_model, samples, sgd_oracle, relative_error, layout, max_grad_norm, lr
):
    model = make_model()
    before = parameters(model)
    settings = config(max_grad_norm=max_grad_norm, lr=lr, **layout)
    trainer = Trainer(settings, model=model, samples=samples)
    windows = windows_of(trainer, samples)
    oracle, losses, norms = sgd_oracle(model, windows, max_grad_norm=max_grad_norm, lr=lr)
    history = trainer.train()
    assert relative_error(before, parameters(model), oracle) < 1e-5
    assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-6)
    assert [record["grad_norm"] for record in history] == pytest.approx(norms, rel=1e-5)
    assert [record["samples"] for record in history] == [4, 4, 3]
    counted = [sum(x != -100 for s in window for x in s["labels"][1:]) for window in windows]
    assert [record["tokens"] for record in history] == counted


def test_oracle_tells_a_wrong_scale_apart(make_model, samples, sgd_oracle, relative_error):
    class MeanOfMeans(Trainer):
        def scale(self, cross_entropy, tokens):
            return super().scale(cross_entropy, tokens) * 1.001

    model = make_model()
    before = parameters(model)
    trainer = MeanOfMeans(config(), model=model, samples=samples)
    oracle, _, _ = sgd_oracle(model, windows_of(trainer, samples))
    trainer.train()
    assert relative_error(before, parameters(model), oracle) > 1e-4


def test_packed_documents_do_not_see_each_other(make_model, samples):
    """Change one document: what the others' tokens give stays exactly equal."""
    logits = []
    for first in (9, 10):
        model = make_model().eval()
        changed = [{**samples[0], "input_ids": [first, *samples[0]["input_ids"][1:]]}, samples[1]]
        trainer = Trainer(config(pack_length=100), model=model, samples=changed)
        trainer.setup()
        batch = trainer.collate([[changed[0], changed[1]]])
        assert batch.attention_mask is None
        model.eval()
        logits.append(trainer.forward(batch)[0])
    length = len(samples[0]["input_ids"])
    assert not torch.equal(logits[0][:length], logits[1][:length])
    assert torch.equal(logits[0][length:], logits[1][length:])


@pytest.mark.parametrize(
    ("tail", "steps", "drawn"), [("partial", 3, 11), ("drop", 2, 8), ("pad", 3, 12)]
)
def test_tail_says_what_becomes_of_the_short_last_batch(make_model, samples, tail, steps, drawn):
    class Spy(list):
        drawn: list[int] = []  # noqa: RUF012

        def __getitem__(self, index):
            self.drawn.append(index)
            return super().__getitem__(index)

    spy = Spy(samples)
    spy.drawn = []
    trainer = Trainer(config(epochs=1, tail=tail), model=make_model(), samples=spy)
    assert len(trainer.train()) == steps
    assert len(spy.drawn) == drawn
    order = trainer.order(0)
    assert sorted(spy.drawn) == sorted((order + order)[:drawn])


def test_samples_are_drawn_once_an_epoch_in_another_order(make_model, samples):
    trainer = Trainer(config(epochs=2), model=make_model(), samples=samples)
    windows = [window for window, _ in _walk(trainer)]
    epochs = [list(chain(*windows[:3])), list(chain(*windows[3:]))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]
    assert epochs == [trainer.order(0), trainer.order(1)]


def _walk(trainer):
    for window in trainer.windows():
        trainer.steps_taken += 1
        yield window


def test_batch_without_any_target_is_skipped_with_a_note(make_model):
    blank = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    model = make_model()
    before = parameters(model)
    settings = config(optimizer="adamw", weight_decay=0.1, max_steps=2, schedule="linear")
    history = Trainer(settings, model=model, samples=[blank] * 4).train()
    assert [record["note"] for record in history] == [
        "no token of this batch is trained: no step was made"
    ] * 2
    assert [(r["loss"], r["grad_norm"], r["tokens"]) for r in history] == [(0.0, 0.0, 0)] * 2
    after = parameters(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_loss_that_is_not_finite_is_shown(make_model, samples):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    history = Trainer(config(max_steps=1), model=model, samples=samples[:4]).train()
    assert not math.isfinite(history[0]["loss"])


def test_a_single_sample_is_learnt(make_model, samples):
    settings = config(optimizer="adamw", lr=1e-2, max_steps=40, max_grad_norm=1.0)
    history = Trainer(settings, model=make_model(), samples=samples[:1]).train()
    assert history[-1]["loss"] < 0.1 < 1.0 < history[0]["loss"]


def test_evaluation_counts_each_token_once_and_changes_nothing(make_model, samples):
    settings = {"epochs": 2, "eval_every": 1, "optimizer": "adamw"}
    dropping = {"attention_dropout": 0.5}
    model, other = make_model(**dropping), make_model(**dropping)
    Trainer(config(epochs=2, optimizer="adamw"), model=other, samples=samples).train()
    history = Trainer(
        config(**settings), model=model, samples=samples, eval_samples=samples[:7]
    ).train()
    assert all("eval_loss" in record for record in history)
    assert model.training
    after, expected = parameters(model), parameters(other)
    assert all(torch.equal(after[name], expected[name]) for name in after)
    model.eval()
    total, tokens = 0.0, 0
    for sample in samples[:7]:
        output = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(sample["labels"]):
            if place and label != -100:
                total, tokens = total - output[place - 1, label].item(), tokens + 1
    assert history[-1]["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_evaluation_is_at_the_end_of_each_epoch_unless_told(make_model, samples):
    history = Trainer(
        config(max_steps=5), model=make_model(), samples=samples, eval_samples=samples[:2]
    ).train()
    assert ["eval_loss" in record for record in history] == [False, False, True, False, True]


def test_dropout_is_equal_with_and_without_recomputation(make_model, samples):
    trained = []
    for recompute in (False, True):
        model = make_model(attention_dropout=0.5)
        Trainer(config(activation_checkpointing=recompute), model=model, samples=samples).train()
        trained.append(parameters(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_recomputation_forgets_activations(make_model, samples):
    """Each block runs a second time, in the backward pass."""
    model = make_model()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = config(activation_checkpointing=True, max_steps=1, micro_batch=4,
                      gradient_accumulation_steps=1)  # fmt: skip
    Trainer(settings, model=model, samples=samples).train()
    assert len(calls) == 2


def test_bf16_computes_in_bf16_on_float32_masters(make_model, samples):
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    settings = config(precision="bf16", optimizer="adamw", lr=1e-5)
    trainer = Trainer(settings, model=model, samples=samples)
    before = None
    trainer.setup()
    before = parameters(model)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = trainer.optimizer.state.values()
    assert {values["exp_avg"].dtype for values in state} == {torch.float32}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    moved = torch.cat([(parameters(model)[n] != before[n]).flatten() for n in before])
    assert moved.float().mean() > 0.9  # bf16 masters lose most steps of 1e-5


def test_frozen_parameters_stay_as_they_are(make_model, samples):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = parameters(model)
    Trainer(config(optimizer="adamw", weight_decay=0.1), model=model, samples=samples).train()
    after = parameters(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}


class Table(nn.Module):
    """The smallest language model: no config, no blocks, no further keywords."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table[input_ids])


def test_a_model_without_blocks_or_keywords_can_be_trained():
    ids = list(range(10))
    model = Table(10)
    settings = config(lr=1.0, max_steps=1, micro_batch=1, activation_checkpointing=True)
    history = Trainer(settings, model=model, samples=[{"input_ids": ids, "labels": ids}]).train()
    assert history[0]["tokens"] == 9
    weights = model.table[range(9), range(1, 10)] / (1 - 0.1)
    torch.testing.assert_close(weights.detach(), torch.full((9,), 1 / 9))


def test_a_model_that_lets_packed_documents_leak_is_refused(samples):
    """Mamba's forward takes position_ids, and its state runs on over them."""
    model = tiny_model("mamba")
    with pytest.raises(BadInputError) as caught:
        Trainer(config(pack_length=40), model=model, samples=samples).train()
    assert str(caught.value).startswith(
        "packing: MambaForCausalLM does not keep packed documents apart: changing one changed"
    )
    Trainer(config(), model=model, samples=samples).train()


def test_a_model_whose_tokens_never_meet_can_be_packed_without_positions():
    sample = {"input_ids": [1, 2], "labels": [1, 2]}
    history = Trainer(config(pack_length=4), model=Table(4), samples=[sample] * 4).train()
    assert history[0]["tokens"] == 4


@pytest.mark.parametrize(
    ("samples", "fields", "text"),
    [
        ([], {}, "0 samples make no global batch of 4 with tail='partial'"),
        ([{"input_ids": [1], "labels": [1]}] * 3, {"tail": "drop"}, "3 samples make no global"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, "sample 0: 2 input_ids and 1 labels"),
        ([[1, 2]], {}, "sample 0: expected an object with 'input_ids' and 'labels', found list"),
        ([{"input_ids": [1] * 9, "labels": [1] * 9}], {"pack_length": 8}, "sample 0 has 9 tokens"),
        ([{"input_ids": [1], "labels": [1]}], {"strategy": "ddp"}, "needs an initialised process"),
        ([{"input_ids": [1], "labels": [1]}], {"device": "gpu9"}, "device='gpu9' is not a torch"),
    ],
)
def test_bad_input_is_one_clear_sentence(make_model, samples, fields, text, request):
    given = request.node.callspec.params["samples"]
    with pytest.raises(BadInputError) as caught:
        Trainer(config(**fields), model=make_model(), samples=given).train()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_file_has_the_history_line_by_line(make_model, samples, tmp_path):
    """Each line is on disk before the next step begins."""
    lines = []

    def count_lines(record):
        lines.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))

    trainer = Trainer(
        config(out_dir=tmp_path), model=make_model(), samples=samples, on_step=count_lines
    )
    history = trainer.train()
    assert lines == [1, 2, 3]
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == history
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "samples", "seconds"}
    assert set(history[0]) == keys
    assert [record["step"] for record in history] == [1, 2, 3]


def test_history_has_the_learning_rate_that_the_step_used(make_model, samples):
    settings = config(max_steps=4, schedule="linear", lr=1.0, max_grad_norm=1.0)
    seen = []

    class Spy(Trainer):
        def step(self):
            seen.append(self.optimizer.param_groups[0]["lr"])
            super().step()

    history = Spy(settings, model=make_model(), samples=samples).train()
    assert [record["lr"] for record in history] == seen == [1.0, 0.75, 0.5, 0.25]
