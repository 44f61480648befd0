"""The parts of a training step: the update, the metrics of a batch, the loss, the saved model, the world.

Each is held to the float64 gradient of `conformance/oracle.py`, which shares no code with the trainer.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from pytest_ranks import BadInputError
from pytest_ranks.conformance import oracle
from pytest_ranks.reference import TrainConfig, Trainer, loss, parallel
from pytest_ranks.reference.checkpoint import full_on_cpu
from pytest_ranks.reference.model import load_model

VOCABULARY = 300  # of the byte tokenizer that every tiny model has


@pytest.fixture
def samples():
    """Six samples of uneven lengths; one trains nothing, and every other one begins with a prompt."""
    source = random.Random(0)
    made = []
    for number in range(6):
        ids = [source.randrange(VOCABULARY) for _ in range(source.randint(3, 20))]
        prompt = source.randrange(1, len(ids) - 1) if number % 2 else 0
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    made[3]["labels"] = [-100] * len(made[3]["labels"])
    return made


@pytest.fixture
def train(tiny_model, samples):
    """Train a tiny Llama: `train(lr=1.0)` returns the trainer, and the parameters from before."""

    def run(*, trainer_class=Trainer, data=samples, strategy=None, **fields):
        model = tiny_model("llama", vocab_size=VOCABULARY)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        strategy = strategy or ("fsdp2" if dist.is_initialized() else "single")
        settings = {"optimizer": "sgd", "lr": 1.0, "max_steps": 1, "max_grad_norm": None}
        settings |= {"shuffle": False, "device": "cpu", "strategy": strategy}
        config = TrainConfig(**(settings | fields))
        trainer = trainer_class(config, model=model, samples=data)
        trainer.train()
        return trainer, before

    return run


def update_of(trainer, before):
    """Return what the run added to each parameter; whole, also where they are sharded."""
    after = {name: full_on_cpu(p.detach()) for name, p in trainer.model.named_parameters()}
    return oracle.difference(after, before)


def gradient_of(trainer, before, batch):
    """Return the float64 gradient and loss of a global batch at the parameters from before."""
    return oracle.gradient(before, trainer.model.config, batch)


def counted_targets(batch):
    """Count the labels that are trained: no sample's first one has a prediction."""
    return sum(label != -100 for one in batch for label in one["labels"][1:])


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class TestTakeGradientStep:
    """The update is minus the learning rate times the clipped gradient of the whole batch."""

    def check_clipping(self, train, samples):
        micro_batch = 4 // world_size()
        limit = 0.25
        trainer, before = train(micro_batch=micro_batch, max_grad_norm=limit)
        gradient, _ = gradient_of(trainer, before, samples[:4])
        wanted_norm = oracle.norm(gradient)
        assert wanted_norm > 2 * limit  # else nothing would be clipped
        (record,) = trainer.history
        assert record["grad_norm"] == pytest.approx(wanted_norm, rel=1e-5)
        update = update_of(trainer, before)
        assert oracle.norm(update) == pytest.approx(limit, rel=1e-4)
        wanted = {name: -value * limit / wanted_norm for name, value in gradient.items()}
        # A step of 1e-4 on a weight of 1.0 has four digits in float32.
        assert oracle.worst_tensor(update, wanted)[1] < 2e-3

    def test_gradients_are_clipped_to_the_limit(self, train, samples):
        self.check_clipping(train, samples)

    @pytest.mark.ranks(2)
    def test_gradients_of_all_shards_are_clipped_together(self, rank, train, samples):
        self.check_clipping(train, samples)

    @pytest.mark.parametrize("limit", [None, 1e6])
    def test_a_gradient_below_the_limit_is_not_scaled(self, train, samples, limit):
        trainer, before = train(micro_batch=4, max_grad_norm=limit)
        gradient, _ = gradient_of(trainer, before, samples[:4])
        wanted = {name: -value for name, value in gradient.items()}
        assert oracle.worst_tensor(update_of(trainer, before), wanted)[1] < 1e-4

    def test_steps_come_in_order(self, train):
        """Clip, step, schedule, zero: seen by what each finds, not by what was called."""
        seen = []

        class Watching(Trainer):
            def step(self):
                norms = [p.grad.norm().item() for p in self.model.parameters()]
                rate = self.optimizer.param_groups[0]["lr"]
                seen.append((sum(norm**2 for norm in norms) ** 0.5, rate))
                super().step()

            def zero(self):
                assert self.optimizer.param_groups[0]["lr"] != seen[-1][1]  # the schedule moved on
                assert any(p.grad is not None for p in self.model.parameters())
                super().zero()
                assert all(p.grad is None for p in self.model.parameters())

        fields = {"max_grad_norm": 0.25, "schedule": "linear", "max_steps": 3}
        trainer, _ = train(trainer_class=Watching, **fields)
        norms, rates = zip(*seen, strict=True)
        assert norms == pytest.approx([0.25] * 3, rel=1e-4)
        assert rates == pytest.approx([1.0, 2 / 3, 1 / 3])
        assert [record["lr"] for record in trainer.history] == pytest.approx(list(rates))

    def test_a_bf16_model_is_trained_in_float32(self, tiny_model, samples):
        """Parameters, gradients and both moments of every tensor, not of the first three."""
        seen = []

        class Watching(Trainer):
            def step(self):
                seen.extend(p.grad.dtype for p in self.model.parameters())
                super().step()

        model = tiny_model("llama", vocab_size=VOCABULARY).to(torch.bfloat16)
        config = TrainConfig(max_steps=1, lr=1e-5, device="cpu")
        before = [p.detach().clone() for p in model.parameters()]
        trainer = Watching(config, model=model, samples=samples)
        trainer.train()
        states = trainer.optimizer.state
        assert len(states) == len(before) == len(seen)
        moments = [
            state[name].dtype for state in states.values() for name in state if "exp" in name
        ]
        assert {*seen, *moments, *(p.dtype for p in model.parameters())} == {torch.float32}
        norms = [name for name, p in model.named_parameters() if (p == 1).all()]
        assert not norms  # 1.0 moved by 1e-5: bf16 would have rounded that away


class TestBatchMetrics:
    """What a step reports is of the global batch: all ranks, all micro-batches, once."""

    def check_record(self, trainer, before, batch):
        _, wanted = gradient_of(trainer, before, batch)
        (record,) = trainer.history
        assert record["loss"] == pytest.approx(wanted, rel=1e-6)
        assert (record["tokens"], record["samples"]) == (counted_targets(batch), len(batch))

    def test_micro_batches_are_added_up(self, train, samples):
        trainer, before = train(micro_batch=2, gradient_accumulation_steps=3)
        self.check_record(trainer, before, samples)

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_ranks_are_added_up(self, rank, train, samples, strategy):
        """Uneven counts, so that neither a mean of ranks nor a maximum is the sum."""
        trainer, before = train(gradient_accumulation_steps=3, strategy=strategy)
        self.check_record(trainer, before, samples)
        records = rank.gather({**trainer.history[0], "seconds": 0})
        assert records[0] == records[1]

    def test_nothing_is_carried_over_to_the_next_step(self, train, samples):
        whole, _ = train(micro_batch=3, max_steps=2)
        second, _ = train(micro_batch=3, max_steps=2, lr=0.0)
        first_half, before = train(micro_batch=3, lr=0.0)
        tokens = [record["tokens"] for record in whole.history]
        assert tokens[0] == first_half.history[0]["tokens"]
        assert tokens[1] == counted_targets(samples[3:])
        _, wanted = gradient_of(second, before, samples[3:])
        assert second.history[1]["loss"] == pytest.approx(wanted, rel=1e-6)

    def test_a_batch_that_trains_nothing_is_no_step(self, train, samples):
        trainer, before = train(data=[samples[3]])
        (record,) = trainer.history
        assert record["note"] == "no token of this batch is trained: no step was made"
        assert (record["tokens"], record["loss"]) == (0, 0.0)
        assert oracle.norm(update_of(trainer, before)) == 0


class TestSaveModel:
    """The exported folder is the trained model."""

    @staticmethod
    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(40)[None]).logits

    def test_exported_model_has_the_trained_logits(self, train, tmp_path):
        trainer, before = train()
        loaded, _ = load_model(trainer.export(tmp_path / "model"))
        assert oracle.norm(update_of(trainer, before)) > 0.01  # it is not the model from before
        assert torch.equal(self.logits(loaded), self.logits(trainer.model))

    @pytest.mark.ranks(2)
    def test_sharded_model_is_exported_whole(self, rank, train, samples):
        trainer, before = train()
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        loaded, _ = load_model(trainer.export(rank.shared_tmp_path / "model"))
        trained = {name: full_on_cpu(p.detach()) for name, p in trainer.model.named_parameters()}
        assert trained.keys() == before.keys() == dict(loaded.named_parameters()).keys()
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, trained[name]), name

    def test_dtype_is_of_the_weights_and_of_the_config(self, train, tmp_path):
        trainer, _ = train()
        folder = trainer.export(tmp_path / "model", dtype=torch.bfloat16)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        loaded, _ = load_model(folder)
        for name, parameter in trainer.model.named_parameters():
            assert parameter.dtype == torch.float32
            rounded = parameter.detach().bfloat16().float()
            assert torch.equal(loaded.get_parameter(name), rounded), name


class TestPatchTargetModule:
    """The trainer has a loss function of its own: nothing of torch or transformers is replaced."""

    def test_the_loss_is_a_sum_of_tokens(self):
        logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(14).view(2, 7) % 11
        labels[0, 3] = labels[1, 0] = -100
        each = [
            -logits[row, place - 1].log_softmax(-1)[labels[row, place]].item()
            for row in range(2)
            for place in range(1, 7)
            if labels[row, place] != -100
        ]
        assert len(each) == loss.counted_targets(labels) == 11
        found = loss.shifted_cross_entropy_sum(logits, labels)
        assert found.item() == pytest.approx(sum(each), rel=1e-6)

    def test_no_function_of_others_is_replaced(self, train, tiny_model):
        from transformers.loss import loss_utils

        watched = (F.cross_entropy, loss_utils.ForCausalLMLoss, loss_utils.fixed_cross_entropy)
        older = tiny_model("llama", vocab_size=VOCABULARY)
        inputs = {"input_ids": torch.arange(30)[None], "labels": torch.arange(30)[None]}
        wanted = older(**inputs).loss
        train()
        newer = tiny_model("llama", vocab_size=VOCABULARY)
        assert wanted.ndim == 0
        assert older(**inputs).loss == newer(**inputs).loss == wanted
        found = (F.cross_entropy, loss_utils.ForCausalLMLoss, loss_utils.fixed_cross_entropy)
        assert found == watched


class TestTrainingIntegration:
    """The whole step on every layout is one step of the oracle."""

    LAYOUTS = (
        {"micro_batch": 4},
        {"micro_batch": 1, "gradient_accumulation_steps": 4},
        {"micro_batch": 4, "max_tokens_per_rank": 60},
        {"micro_batch": 2, "gradient_accumulation_steps": 2, "pack_length": 40},
        {"micro_batch": 4, "activation_checkpointing": True},
    )

    def check_update(self, train, samples, layout, **fields):
        shared = {**layout, "micro_batch": max(1, layout["micro_batch"] // world_size())}
        size = shared["micro_batch"] * shared.get("gradient_accumulation_steps", 1) * world_size()
        trainer, before = train(**shared, **fields)
        gradient, _ = gradient_of(trainer, before, samples[:size])
        wanted = {name: -value for name, value in gradient.items()}
        assert oracle.worst_tensor(update_of(trainer, before), wanted)[1] < 1e-4

    @pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
    def test_update_is_the_oracles(self, train, samples, layout):
        self.check_update(train, samples, layout)

    @pytest.mark.ranks(2)
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    @pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
    def test_update_is_the_oracles_on_ranks(self, rank, train, samples, layout, strategy):
        self.check_update(train, samples, layout, strategy=strategy)


class TestDistributedUtils:
    """Who this process is among its peers, and what they add up."""

    @pytest.mark.ranks([2, 3])
    def test_the_world_is_the_process_group(self, rank):
        world = parallel.find_world(TrainConfig(max_steps=1, strategy="ddp"))
        assert (world.rank, world.size) == (dist.get_rank(), rank.world_size)
        assert world.device == torch.device("cpu")
        value = torch.tensor([1.0, 10.0]) * (rank.index + 1)
        triangle = sum(range(1, rank.world_size + 1))
        assert world.sum(value).tolist() == [triangle, 10 * triangle]
        assert value.tolist() == [rank.index + 1, 10 * (rank.index + 1)]  # the argument stays

    @pytest.mark.ranks(2)
    def test_a_single_process_strategy_is_refused_on_ranks(self, rank):
        with pytest.raises(BadInputError) as caught:
            parallel.find_world(TrainConfig(max_steps=1))
        assert str(caught.value) == (
            "strategy='single' on 2 ranks would train as many separate models; "
            "use strategy='ddp' or 'fsdp2'."
        )

    def test_ranks_are_needed_for_a_distributed_strategy(self):
        with pytest.raises(
            BadInputError, match="strategy='ddp' needs an initialised process group"
        ):
            parallel.find_world(TrainConfig(max_steps=1, strategy="ddp"))
