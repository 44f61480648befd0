from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.host import RankHost
from pytest_ranks.reference import TrainConfig, Trainer
from pytest_ranks.reference.checkpoint import full_on_cpu
from pytest_ranks.reference.model import load_model
from pytest_ranks.reference.parallel import find_device


@pytest.fixture(scope="module")
def host():
    with RankHost() as started:
        yield started


def config(**fields):
    base = {"optimizer": "sgd", "lr": 0.1, "max_steps": 2, "max_grad_norm": None, "device": "cpu"}
    return TrainConfig(**(base | fields))


class Spy(Trainer):
    """Keeps what a rank draws and what its gradients and parameters are at each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = []
        self.bf16_exact = []

    def sample(self, index, samples):
        self.drawn.append(index)
        return super().sample(index, samples)

    def step(self):
        gradients = [full_on_cpu(p.grad).flatten() for p in self.model.parameters()]
        values = torch.cat(gradients)
        values = values[values != 0]
        self.bf16_exact.append((values == values.bfloat16().float()).float().mean().item())
        super().step()


def train_all(jobs, samples, eval_samples=None):
    """On every rank: train each job in turn; return parameters, history and the draws."""
    results = []
    for model, fields in jobs:
        trainer = Spy(
            config(**fields), model=copy.deepcopy(model), samples=samples, eval_samples=eval_samples
        )
        history = trainer.train()
        for record in history:
            del record["seconds"]
        sharded = [isinstance(p, DTensor) for p in trainer.model.parameters()]
        assert all(sharded) if fields.get("strategy") == "fsdp2" else not any(sharded)
        parameters = {n: full_on_cpu(p.detach()) for n, p in trainer.model.named_parameters()}
        results.append((parameters, history, trainer.drawn))
    return results


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)], ids=str
)
def test_update_is_the_float64_oracles_on_every_world(
    host, make_model, samples, sgd_oracle, relative_error, strategy, world_size
):
    """Eleven samples in batches of eight: uneven counts, two forwards a step, idle ranks."""
    batch = {"micro_batch": 4 // world_size, "gradient_accumulation_steps": 2}
    model, tied = make_model(), make_model(tie_word_embeddings=True)
    jobs = [
        (model, {}),
        (model, {"max_grad_norm": 0.5, "lr": 2.0}),
        (model, {"max_tokens_per_rank": 31}),
        (tied, {"pack_length": 40, "activation_checkpointing": True}),
    ]
    jobs = [(model, batch | fields | {"strategy": strategy}) for model, fields in jobs]
    by_rank = host.run(train_all, world_size=world_size, args=(jobs, samples))
    for number, (model, fields) in enumerate(jobs):
        order = Trainer(
            config(**fields | {"strategy": "single"}), model=model, samples=samples
        ).order(0)
        windows = [[samples[i] for i in order[:8]], [samples[i] for i in order[8:]]]
        clip = {"max_grad_norm": fields.get("max_grad_norm"), "lr": fields.get("lr", 0.1)}
        oracle, losses, norms = sgd_oracle(model, windows, **clip)
        parameters, history, _ = by_rank[0][number]
        before = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert relative_error(before, parameters, oracle) < 1e-5
        assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-6)
        assert [record["grad_norm"] for record in history] == pytest.approx(norms, rel=1e-5)
        drawn = [index for rank in by_rank for index in rank[number][2]]
        assert sorted(drawn) == list(range(11))
        for rank in by_rank[1:]:
            assert equal(rank[number][0], parameters)
            assert rank[number][1] == history


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resumed_ranks_are_the_uninterrupted_ones_bit_for_bit(
    host, make_model, samples, tmp_path, strategy
):
    """With dropout: each rank's own random state must come back to it."""
    model = make_model(attention_dropout=0.3)
    fields = {"strategy": strategy, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    fields |= {"schedule": "cosine", "micro_batch": 2, "max_steps": 5, "max_grad_norm": 1.0}
    saving = fields | {"checkpoint_every": 1, "out_dir": str(tmp_path)}
    by_rank = host.run(train_all, world_size=2, args=([(model, saving)], samples))
    whole, history, drawn = by_rank[0][0]
    rates = [0.5 * (1 + math.cos(math.pi * step / 5)) * 1e-2 for step in range(5)]
    assert [record["lr"] for record in history] == pytest.approx(rates)
    resuming = [
        (model, fields | {"resume_from": str(tmp_path / f"checkpoint-{step}.pt")})
        for step in (1, 2, 3, 4)
    ]
    resumed = host.run(train_all, world_size=2, args=(resuming, samples))
    for step, (parameters, tail, rest) in enumerate(resumed[0], start=1):
        assert tail == history[step:]
        assert rest == drawn[len(drawn) - len(rest) :]
        assert equal(parameters, whole)
    with pytest.raises(BadInputError, match="written by 2 ranks and cannot be continued exactly"):
        Trainer(
            config(**resuming[0][1] | {"strategy": "single", "micro_batch": 4}),
            model=model,
            samples=samples,
        ).train()


def bf16_census(model, samples):
    """On every rank: one FSDP2 step in bfloat16; what is sharded, and in which dtypes."""
    trainer = Spy(
        config(strategy="fsdp2", precision="bf16", optimizer="adamw", max_steps=1, micro_batch=4),
        model=model,
        samples=samples,
    )
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    trainer.train()
    parameters = list(model.parameters())
    return {
        "computed": set(seen),
        "sharded": all(isinstance(p, DTensor) for p in parameters),
        "local": sum(p.to_local().numel() for p in parameters),
        "total": sum(p.numel() for p in parameters),
        "parameters": {p.dtype for p in parameters},
        "moments": {values["exp_avg"].dtype for values in trainer.optimizer.state.values()},
        "buffers": {buffer.dtype for buffer in model.buffers()},
        "bf16_exact": trainer.bf16_exact[0],
    }


def test_fsdp2_shards_computes_in_bf16_and_reduces_in_float32(host, make_model, samples):
    for found in host.run(bf16_census, world_size=2, args=(make_model(), samples)):
        assert found["sharded"]
        assert found["local"] == found["total"] / 2
        assert found["computed"] == {torch.bfloat16}
        assert found["parameters"] == found["moments"] == found["buffers"] == {torch.float32}
        # A sum of two bf16 values is seldom a bf16 value; after a bf16 reduction all are.
        assert found["bf16_exact"] < 0.8


def held_back(model, samples):
    """On every rank: this rank's gradient of one tensor after each micro-batch, under DDP."""
    seen = []

    class Watching(Trainer):
        def backward(self, scaled):
            super().backward(scaled)
            seen.append(self.model.lm_head.weight.grad.clone())

    settings = config(strategy="ddp", max_steps=1, gradient_accumulation_steps=2, micro_batch=2)
    Watching(settings, model=model, samples=samples).train()
    return seen


def test_ddp_reduces_once_a_step(host, make_model, samples):
    one, other = host.run(held_back, world_size=2, args=(make_model(), samples))
    assert len(one) == len(other) == 2
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def unequal_start(model, samples, strategy):
    """On every rank: begin with other parameters than the other ranks; return where that led."""
    rank = dist.get_rank()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(rank)
    Trainer(config(strategy=strategy), model=model, samples=samples).train()
    parameters = {n: full_on_cpu(p.detach()) for n, p in model.named_parameters()}
    return parameters, torch.rand(4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_start_from_rank_0_and_have_their_own_randomness(host, make_model, samples, strategy):
    results = host.run(unequal_start, world_size=2, args=(make_model(), samples, strategy))
    single = make_model()
    Trainer(config(micro_batch=2), model=single, samples=samples).train()
    for parameters, _ in results:
        for name, parameter in single.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.detach())
    assert not torch.equal(results[0][1], results[1][1])


def test_evaluation_is_the_same_on_every_world(host, make_model, samples):
    fields = {"micro_batch": 2, "eval_every": 1}
    job = [(make_model(), fields | {"strategy": "fsdp2"})]
    ranks = host.run(train_all, world_size=2, args=(job, samples, samples[:7]))
    alone = train_all([(make_model(), fields | {"micro_batch": 4})], samples, samples[:7])
    expected = [record["eval_loss"] for record in alone[0][1]]
    assert len(expected) == 2
    for rank in ranks:
        found = [record["eval_loss"] for record in rank[0][1]]
        assert found == pytest.approx(expected, rel=1e-6)
        for name, parameter in alone[0][0].items():
            torch.testing.assert_close(rank[0][0][name], parameter)


def export_after_training(model, samples, folder):
    """On every rank: train, export, and return the parameters."""
    trainer = Trainer(config(strategy="fsdp2"), model=model, samples=samples)
    trainer.train()
    trainer.export(folder)
    return {n: full_on_cpu(p.detach()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_model_is_exported_whole(host, make_model, samples, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    trained, _ = host.run(export_after_training, world_size=2, args=(model, samples, str(tmp_path)))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 - no mapping
    loaded, _ = load_model(tmp_path)
    assert equal(trained, {n: p.detach() for n, p in loaded.named_parameters()})
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def single_on_ranks(model, samples):
    """On every rank: ask for a strategy that cannot be."""
    with pytest.raises(BadInputError) as caught:
        Trainer(config(), model=model, samples=samples)
    return str(caught.value)


def test_single_strategy_on_several_ranks_is_refused(host, make_model, samples):
    for text in host.run(single_on_ranks, world_size=2, args=(make_model(), samples)):
        assert text == (
            "strategy='single' on 2 ranks would train as many separate models; "
            "use strategy='ddp' or 'fsdp2'."
        )


def test_several_devices_are_chosen_by_the_local_rank(monkeypatch):
    """The number among all ranks names no device of the second machine."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device("cuda") == torch.device("cuda", 3)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 3), torch.device("cuda", 1)]
