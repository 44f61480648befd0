from __future__ import annotations

import copy
import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.host import RankHost
from pytest_ranks.reference import TrainConfig, Trainer, orthogonal
from pytest_ranks.reference.checkpoint import full_on_cpu
from pytest_ranks.reference.cli import make_config, train
from pytest_ranks.reference.export import consolidated_state
from pytest_ranks.reference.orthogonal import join_weight, low_rank, split_layers, split_weight

INPUTS = torch.arange(24).reshape(2, 12)
HIGH, LOW = ("u_high", "s_high", "v_high"), ("u_low", "s_low", "v_low")


@pytest.fixture(scope="module")
def host():
    with RankHost() as started:
        yield started


def config(**fields):
    base = {"orthogonal_rank_ratio": 0.25, "lr": 1e-2, "weight_decay": 0.1, "max_steps": 10}
    base |= {"micro_batch": 4, "device": "cpu"}
    return TrainConfig(**(base | fields))


def overlap(basis, vectors):
    """Return how much of the vectors lies in the span of the basis: 0 none, 1 all."""
    if vectors.norm() == 0:
        return 0.0
    return ((basis.double().mT @ vectors.double()).norm() / vectors.double().norm()).item()


def worst_overlap(model, values):
    """Return the worst overlap of any low factor's value with the high vectors (a collective)."""
    worst = 0.0
    for _, layer in split_layers(model):
        factors = layer.factors()
        low = {name: full_on_cpu(values(factors[name])) for name in ("u_low", "v_low")}
        high = {name: full_on_cpu(factors[name].detach()) for name in ("u_high", "v_high")}
        worst = max(worst, *(overlap(high[f"{x}_high"], low[f"{x}_low"]) for x in "uv"))
    return worst


class Spy(Trainer):
    """Keeps how far gradients, before the step, and parameters, after it, leave the low subspace."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.parameters = [], []

    def step(self):
        self.gradients.append(worst_overlap(self.model, lambda factor: factor.grad))
        super().step()

    def schedule(self):
        self.parameters.append(worst_overlap(self.model, lambda factor: factor.detach()))
        super().schedule()


def frozen(model):
    return {
        f"{name}.{factor}": full_on_cpu(layer.factors()[factor].detach()).clone()
        for name, layer in split_layers(model)
        for factor in HIGH
        if factor in layer.factors()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- a weight ---------------------------------------------------------------------------------


def weights():
    source = torch.Generator().manual_seed(0)
    square = torch.randn(12, 12, generator=source)
    return {
        "tall": torch.randn(30, 18, generator=source),
        "wide": torch.randn(18, 30, generator=source),
        "equal singular values": torch.linalg.qr(square).Q,
        "rank 2": square[:, :2] @ square[:2],
        "zero": torch.zeros(5, 7),
        "one row": torch.randn(1, 6, generator=source),
    }


@pytest.mark.parametrize("kind", weights())
def test_the_two_parts_add_up_to_the_weight(kind):
    weight = weights()[kind]
    full = min(weight.shape)
    for rank in {0, 1, full // 2, full}:
        parts = split_weight(weight, rank)
        assert parts["u_low"].shape == (weight.shape[0], rank)
        assert parts["v_high"].shape == (weight.shape[1], full - rank)
        torch.testing.assert_close(join_weight(parts), weight, rtol=0, atol=1e-5)
        exact = join_weight(split_weight(weight.double(), rank))
        torch.testing.assert_close(exact, weight.double(), rtol=0, atol=1e-13)
        for x in "uv":
            basis = parts[f"{x}_high"]
            torch.testing.assert_close(basis.mT @ basis, torch.eye(full - rank), rtol=0, atol=1e-6)
            assert overlap(basis, parts[f"{x}_low"]) < 1e-6


def test_the_low_part_is_what_the_best_approximation_leaves():
    """Eckart and Young: no matrix of the high part's rank is nearer to the weight."""
    weight = weights()["tall"].double()
    parts = split_weight(weight, 5)
    low = join_weight({name: parts[name] for name in LOW})
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.matrix_norm(low, 2), values[-5])
    torch.testing.assert_close(low.norm(), values[-5:].norm())


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [((18, 30), 0.25, 4), ((30, 18), 0.5, 9), ((18, 18), 0.0, 0), ((18, 18), 1.0, 18),
     ((18, 18), 0.001, 1), ((18, 18), 0.999, 17), ((1, 9), 0.5, 0), ((1, 9), 1.0, 1)],
)  # fmt: skip
def test_ratio_is_the_share_of_directions_that_is_trained(shape, ratio, rank):
    assert low_rank(shape, ratio) == rank


# ---- a model ----------------------------------------------------------------------------------


def gpt2():
    """Its linear layers are `Conv1D`, with a bias and the weight transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                   initializer_range=0.2, bos_token_id=1, eos_token_id=1)
    )  # fmt: skip


def biased(make_model):
    model = make_model(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def trainer_of(model, samples=({"input_ids": [1, 2], "labels": [1, 2]},), **fields):
    made = Spy(config(**fields), model=model, samples=samples)
    made.setup()
    return made


@pytest.mark.parametrize("family", ["llama", "biased", "gpt2"])
def test_split_model_computes_what_the_plain_one_does(make_model, family):
    made = {"llama": make_model, "biased": lambda: biased(make_model), "gpt2": gpt2}
    plain = made[family]().eval()
    model = copy.deepcopy(plain)
    trainer_of(model)
    names = [name for name, _ in split_layers(model)]
    assert len(names) == (2 * 4 if family == "gpt2" else 2 * 7)
    assert not any("lm_head" in name or "embed" in name or "norm" in name for name in names)
    want = plain(INPUTS).logits
    torch.testing.assert_close(model.eval()(INPUTS).logits, want, rtol=1e-5, atol=2e-5)
    for name, layer in split_layers(model):
        weight = plain.get_submodule(name).weight
        torch.testing.assert_close(layer.weight, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bf16"},
        {"optimizer": "sgd", "lr": 0.1},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_training_stays_in_the_low_subspace(make_model, samples, fields):
    model = biased(make_model)
    trainer = trainer_of(model, samples, gradient_accumulation_steps=2, **fields)
    before, start = frozen(model), copy.deepcopy(model.state_dict())
    trainable = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    history = trainer.train()
    assert history[-1]["loss"] < history[0]["loss"]
    assert equal(frozen(model), before)
    assert len(trainer.gradients) == len(trainer.parameters) == 10
    assert max(trainer.gradients) < 1e-5
    assert max(trainer.parameters) < 1e-6
    for name, parameter in model.named_parameters():
        high = name.rpartition(".")[2] in HIGH
        assert (id(parameter) in trainable) is not high
        assert torch.equal(parameter, start[name]) is high, name


class NoGradientProjection(Spy):
    def project_gradients(self):
        pass


class NoParameterProjection(Spy):
    def project_parameters(self):
        pass


class WrongFactor(Spy):
    """Keeps U out of the low subspace's own span in place of the high one's."""

    def project_parameters(self):
        with torch.no_grad():
            for _, layer in split_layers(self.model):
                basis = torch.linalg.qr(layer.v_low).Q
                orthogonal.project_out(basis, layer.v_low.detach())


class DecaysAllOfTheWeight(Spy):
    """Decays what is frozen: AdamW's decay written by hand, on every matrix."""

    def step(self):
        super().step()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(1 - self.config.lr * self.config.weight_decay)


def test_each_projection_is_needed(make_model, samples):
    """The measures see what they are for: without a projection training leaves the subspace."""
    found = {}
    for kind in (NoGradientProjection, NoParameterProjection, WrongFactor, DecaysAllOfTheWeight):
        trainer = kind(config(), model=make_model(), samples=samples)
        trainer.setup()
        before = frozen(trainer.model)
        trainer.train()
        found[kind] = max(trainer.gradients), max(trainer.parameters), frozen(trainer.model)
        assert equal(frozen(trainer.model), before) is (kind is not DecaysAllOfTheWeight)
    assert found[NoGradientProjection][0] > 0.3
    assert found[NoParameterProjection][0] < 1e-5  # orthogonal gradients, and all the same:
    assert found[NoParameterProjection][1] > 0.1
    assert found[WrongFactor][1] > 0.1


def test_reported_norm_and_clipping_are_those_of_the_projected_gradient(make_model, samples):
    norms = []

    class Watching(Spy):
        def step(self):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
            super().step()

    fields = {"max_steps": 3, "optimizer": "sgd"}
    found = Watching(config(max_grad_norm=None, **fields), model=make_model(), samples=samples)
    assert norms == pytest.approx([record["grad_norm"] for record in found.train()], rel=1e-5)
    norms.clear()
    Watching(config(max_grad_norm=0.5, **fields), model=make_model(), samples=samples).train()
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_inputs_of_the_high_subspace_keep_their_outputs(make_model, samples):
    model = make_model()
    trainer = trainer_of(model, samples)
    inputs, outputs = {}, {}
    with torch.no_grad():
        for name, layer in split_layers(model):
            known = torch.randn(3, layer.v_high.shape[1]) @ layer.v_high.mT
            inputs[name] = known, torch.randn(3, layer.v_high.shape[0])
            outputs[name] = tuple(layer(x) for x in inputs[name])
    trainer.train()
    with torch.no_grad():
        for name, layer in split_layers(model):
            known, other = (layer(x) - y for x, y in zip(inputs[name], outputs[name], strict=True))
            assert known.norm() < 1e-5 * outputs[name][0].norm()
            assert other.norm() > 1e-2 * outputs[name][1].norm()


class TwoTasks(nn.Module):
    """Tokens 0 to 3 are the task it knows: their embeddings are what the layer's weight acts on."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.block = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 12)
        directions = torch.linalg.qr(torch.randn(8, 8)).Q
        self.embedding.weight.data[:4] = directions[:, :4].mT
        values = torch.tensor([4.0, 4, 4, 4, 0.1, 0.1, 0.1, 0.1])
        self.block.weight.data = (directions * values) @ directions.mT
        self.embedding.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.block(self.embedding(input_ids))))


def test_a_known_task_keeps_its_answers_while_another_is_learned():
    torch.manual_seed(0)
    plain, known = TwoTasks(), torch.arange(4)[None]
    before = plain(known).logits
    ids = [4, 9, 5, 10, 6, 11, 7, 8]
    samples = [{"input_ids": ids, "labels": ids}]
    drift = {}
    for ratio, targets in ((0.5, ("block",)), (None, None)):
        model = copy.deepcopy(plain)
        fields = {"orthogonal_rank_ratio": ratio, "orthogonal_targets": targets}
        history = Trainer(
            config(**fields, max_steps=60, weight_decay=0.0), model=model, samples=samples
        ).train()
        assert history[-1]["loss"] < 0.85 * history[0]["loss"]
        drift[ratio] = ((model(known).logits - before).norm() / before.norm()).item()
    assert drift[0.5] < 1e-5
    assert drift[None] > 0.1


def test_ratio_0_freezes_the_layers_and_ratio_1_frees_them(make_model, samples):
    for ratio in (0.0, 1.0):
        plain, model = make_model(), make_model()
        trainer = Trainer(config(orthogonal_rank_ratio=ratio), model=model, samples=samples)
        trainer.setup()
        gone = "low" if ratio == 0.0 else "high"
        kept = "high" if ratio == 0.0 else "low"
        for _, layer in split_layers(model):
            assert layer.factors().keys() == {f"{x}_{kept}" for x in "usv"}
            assert getattr(layer, f"u_{gone}") is None
        before, history = frozen(model), trainer.train()
        assert history[-1]["loss"] < history[0]["loss"]
        state, old = consolidated_state(model), plain.state_dict()
        for name, _ in split_layers(model):
            moved = (state[f"{name}.weight"] - old[f"{name}.weight"]).abs().max()
            assert moved < 1e-5 if ratio == 0.0 else moved > 1e-3
        assert equal(frozen(model), before)


def test_signs_of_singular_vectors_do_not_matter(make_model, samples):
    """Bit for bit: u s v^T is the same product for (-u) s (-v)^T, and so is each AdamW update."""

    class Flipped(Trainer):
        def split_weights(self):
            super().split_weights()
            with torch.no_grad():
                for _, layer in split_layers(self.model):
                    for part in ("low", "high"):
                        u, v = layer.factors()[f"u_{part}"], layer.factors()[f"v_{part}"]
                        signs = torch.ones(u.shape[1])
                        signs[::2] = -1
                        u.mul_(signs)
                        v.mul_(signs)

    states = []
    for kind in (Trainer, Flipped):
        model = make_model()
        kind(config(), model=model, samples=samples).train()
        states.append(consolidated_state(model))
    assert equal(*states)


# ---- ranks ------------------------------------------------------------------------------------

UNEVEN = {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1,
          "intermediate_size": 22, "vocab_size": 97, "num_hidden_layers": 1}  # fmt: skip
EXACT = {"optimizer": "sgd", "lr": 0.1, "max_steps": 2, "max_grad_norm": 1.0}
"""AdamW divides rounding noise by itself where a gradient is almost zero; SGD does not."""


class LocalOnly(Spy):
    """Projects each rank's rows by themselves."""

    def project_parameters(self):
        with torch.no_grad():
            for _, layer in split_layers(self.model):
                for x in "uv":
                    basis, low = (getattr(layer, f"{x}_{part}") for part in ("high", "low"))
                    orthogonal.project_out(basis.to_local(), low.detach().to_local())


def train_ranks(model, samples, jobs):
    """On every rank: begin from a model that differs, train each job; return what became of it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())
    results = []
    for kind, fields in jobs:
        trainer = kind(config(**fields), model=copy.deepcopy(model), samples=samples)
        trainer.setup()
        before = frozen(trainer.model)
        history = trainer.train()
        sharded = {
            name: tuple(factor.to_local().shape) if isinstance(factor, DTensor) else None
            for name, factor in trainer.model.model.layers[0].mlp.down_proj.factors().items()
        }
        results.append(
            {
                "state": consolidated_state(trainer.model),
                "frozen": frozen(trainer.model),
                "kept": equal(frozen(trainer.model), before),
                "losses": [record["loss"] for record in history],
                "norms": [record["grad_norm"] for record in history],
                "gradients": max(trainer.gradients),
                "parameters": max(trainer.parameters),
                "sharded": sharded,
            }
        )
    return results


@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4)], ids=str
)
def test_ranks_train_what_one_process_does(host, make_model, samples, strategy, world_size):
    """18, 22 and 97 rows, 4 trained directions: of every size some ranks hold fewer, or none."""
    model = make_model(**UNEVEN)
    whole = [EXACT, {"max_steps": 3, "eps": 1e-3}, {"precision": "bf16", "max_steps": 2}]
    split = {"strategy": strategy, "micro_batch": 12 // world_size}
    jobs = [(Spy, fields | split) for fields in whole]
    if strategy == "fsdp2":
        jobs.append((LocalOnly, {"max_steps": 2} | split))
    by_rank = host.run(train_ranks, world_size=world_size, args=(model, samples, jobs))
    for number, fields in enumerate(whole):
        trainer = trainer_of(copy.deepcopy(model), samples, micro_batch=12, **fields)
        history = trainer.train()
        want = consolidated_state(trainer.model)
        for rank in by_rank:
            found = rank[number]
            assert equal(found["state"], by_rank[0][number]["state"])
            assert equal(found["frozen"], frozen(trainer.model))
            assert found["kept"]
            assert found["gradients"] < 1e-5
            assert found["parameters"] < 1e-6
            if fields.get("precision") == "bf16":
                continue  # two computations in bf16 differ by their own rounding
            assert found["losses"] == pytest.approx([r["loss"] for r in history], rel=1e-5)
            assert found["norms"] == pytest.approx([r["grad_norm"] for r in history], rel=1e-4)
            for name, weight in want.items():
                torch.testing.assert_close(found["state"][name], weight, rtol=1e-4, atol=2e-5)
    if strategy == "fsdp2":
        assert all(rank[-1]["parameters"] > 1e-2 for rank in by_rank)
        shapes = [rank[0]["sharded"] for rank in by_rank]
        for name, rows in (("u_low", 18), ("v_low", 22), ("s_low", 4), ("v_high", 22)):
            held = [shape[name][0] for shape in shapes]
            assert sum(held) == rows
            assert (len(set(held)) > 1) is bool(rows % world_size)


# ---- files ------------------------------------------------------------------------------------


def test_export_is_a_plain_model_with_equal_logits(make_model, samples, tmp_path):
    for number, plain in enumerate((biased(make_model), gpt2())):
        model = copy.deepcopy(plain)
        trainer = trainer_of(model, samples, max_steps=3)
        trainer.train()
        folder = trainer.export(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.state_dict().keys() == plain.state_dict().keys()
        with torch.no_grad():
            want, found = model.eval()(INPUTS).logits, loaded(INPUTS).logits
            start = plain.eval()(INPUTS).logits
        torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5)
        assert (found - start).abs().max() > 0.1


def run(model, samples, **fields):
    trainer = Trainer(config(**fields), model=model, samples=samples)
    history = trainer.train()
    for record in history:
        del record["seconds"]
    return full_on_cpu(trainer.model.state_dict()), history


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(make_model, samples, tmp_path):
    """The frozen part too comes from the checkpoint: the model that is given may be another."""
    fields = {"max_steps": 4, "micro_batch": 2}
    whole, history = run(make_model(), samples, checkpoint_every=2, out_dir=tmp_path, **fields)
    fields["resume_from"] = tmp_path / "checkpoint-2.pt"
    resumed, tail = run(make_model(initializer_range=0.1), samples, **fields)
    assert equal(resumed, whole)
    assert tail == history[2:]
    with pytest.raises(BadInputError) as caught:
        run(make_model(), samples, **fields, orthogonal_rank_ratio=0.5)
    assert "was trained with orthogonal_rank_ratio=0.25, this run has " in str(caught.value)


def resume_ranks(model, samples, folder):
    """On every rank: train, and train again from the middle; return both ends."""
    fields = {"max_steps": 4, "micro_batch": 2, "strategy": "fsdp2"}
    whole = run(copy.deepcopy(model), samples, checkpoint_every=2, out_dir=folder, **fields)
    fields["resume_from"] = f"{folder}/checkpoint-2.pt"
    return whole, run(model, samples, **fields)


def test_resumed_ranks_are_the_uninterrupted_ones(host, make_model, samples, tmp_path):
    args = (make_model(**UNEVEN), samples, str(tmp_path))
    for (whole, history), (resumed, tail) in host.run(resume_ranks, world_size=2, args=args):
        assert equal(resumed, whole)
        assert tail == history[2:]


# ---- what is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"orthogonal_rank_ratio": 1.5}, "orthogonal_rank_ratio=1.5 is not a number from 0 to 1"),
        ({"orthogonal_rank_ratio": float("nan")}, "=nan is not a number from 0 to 1"),
        ({"orthogonal_rank_ratio": True}, "=True is not a number from 0 to 1"),
        ({"orthogonal_rank_ratio": "0.5"}, "='0.5' is not a number from 0 to 1; it is the share "),
        (
            {"orthogonal_rank_ratio": None, "orthogonal_targets": ("q_proj",)},
            "orthogonal_targets=('q_proj',) needs orthogonal_rank_ratio, the share of each",
        ),
        (
            {"orthogonal_targets": "q_proj"},
            "orthogonal_targets='q_proj' is not a tuple of patterns",
        ),
        ({"orthogonal_targets": ()}, "=() is not a tuple of patterns; expected one or more, such"),
        ({"orthogonal_targets": (1,)}, "=(1,) is not a tuple of patterns"),
    ],
)
def test_bad_field_is_one_clear_sentence(fields, text):
    with pytest.raises(BadInputError) as caught:
        config(**fields)
    assert text in str(caught.value)


def test_patterns_choose_the_layers(make_model):
    model = make_model()
    trainer_of(model, orthogonal_targets=("q_proj", "model.layers.1.mlp.*", "lm_head"))
    assert [name for name, _ in split_layers(model)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "lm_head",
    ]


def test_layers_that_are_frozen_stay_whole(make_model):
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    trainer_of(model)
    assert all(name.startswith("model.layers.1.") for name, _ in split_layers(model))


def test_a_layer_that_is_used_twice_is_split_once(make_model):
    model = make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    trainer_of(model)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert isinstance(model.model.layers[1].mlp.up_proj, orthogonal.OrthogonalLinear)
    assert len(list(split_layers(model))) == 4 + 3 + 4


@pytest.mark.parametrize(
    ("targets", "change", "text"),
    [
        (
            ("q_prj",),
            None,
            "orthogonal_targets: 'q_prj' names no linear layer that is trained; the model has "
            "'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', "
            "'lm_head'. Did you mean 'q_proj'?",
        ),
        (("embed_tokens",), None, "'embed_tokens' names no linear layer that is trained; the"),
        (("lm_head",), "tie", "the weight of 'lm_head' is shared with another layer, and a split"),
        (
            None,
            "blocks",
            "TwoTasks declares no block with a trained torch.nn.Linear; name the layers with ",
        ),
        (None, "meta", "'model.layers.0.self_attn.q_proj' is on the meta device, expected its"),
    ],
)
def test_layers_that_cannot_be_split_are_named(make_model, targets, change, text):
    model = make_model(tie_word_embeddings=change == "tie") if change != "blocks" else TwoTasks()
    if change == "meta":
        model.to("meta")
    with pytest.raises(BadInputError) as caught:
        orthogonal.split_model(
            model, rank_ratio=0.5, patterns=targets, world=trainer_world(make_model)
        )
    assert text in str(caught.value)


def trainer_world(make_model):
    return trainer_of(make_model()).world


def test_options_of_the_command_line(tmp_path):
    options = inspect.signature(train).parameters
    fields = {field.name for field in dataclasses.fields(TrainConfig)} | {"beta1", "beta2"}
    given = {name: option.default for name, option in options.items() if name in fields}
    given |= {"out_dir": tmp_path, "orthogonal_rank_ratio": 0.5}
    made = make_config(given | {"orthogonal_targets": ["q_proj", "mlp.*"]})
    assert made.orthogonal_targets == ("q_proj", "mlp.*")
    assert make_config(given | {"orthogonal_targets": []}).orthogonal_targets is None
