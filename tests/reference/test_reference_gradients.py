"""Gradients that were not reduced are refused on every rank, and what is merely unused is not."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import TrainConfig, Trainer

SAMPLES = [{"input_ids": [1, 2, 3, size], "labels": [-100, 2, 3, size]} for size in (4, 5, 6, 7)]


class Opaque:
    """What a forward returns where nobody thought of pytrees."""

    def __init__(self, logits):
        self.logits = logits


class Small(torch.nn.Module):
    """A table with a head; some of it is not used, or not trained."""

    def __init__(self, returns=CausalLMOutput):
        super().__init__()
        self.table = torch.nn.Embedding(16, 16)
        self.head = torch.nn.Linear(16, 16)
        self.returns = returns

    def forward(self, input_ids):
        return self.returns(logits=2 * self.head(self.table(input_ids)))


def train(model, strategy, *, trainer=Trainer, **fields):
    base = {"optimizer": "sgd", "lr": 0.1, "max_steps": 2, "micro_batch": 2, "device": "cpu"}
    made = trainer(TrainConfig(**(base | fields), strategy=strategy), model=model, samples=SAMPLES)
    return made.train()


HIDDEN = (
    "strategy='fsdp2': the gradient of 'table.weight' and 2 more was not reduced: FSDP2 found no "
    "tensor in what a forward of Small returns, or its hooks were left out; return a tensor, a "
    "tuple, a dict or one of transformers' ModelOutput classes, or use strategy='ddp'."
)
LEFT_OUT = (
    "strategy='fsdp2': 'table.weight' and 2 more got no gradient, no parameter of Small did: the "
    "backward pass was left out, or gradient synchronisation is turned off; use strategy='ddp' to "
    "see whether the model can be trained."
)
UNUSED = (
    "strategy='ddp': 'spare.weight' got no gradient, and DDP reduces none of a bucket that one is "
    "missing from; freeze what Small does not use (requires_grad_(False)), or use strategy='fsdp2'."
)


@pytest.mark.ranks(2)
class TestRefused:
    @pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
    def test_output_that_hides_its_tensors(self, rank, recompute):
        torch.manual_seed(0)
        with pytest.raises(BadInputError) as caught:
            train(Small(Opaque), "fsdp2", activation_checkpointing=recompute)
        assert str(caught.value) == HIDDEN

    def test_synchronisation_that_is_off(self, rank):
        class Off(Trainer):
            def parallelize(self):
                wrapped = super().parallelize()
                wrapped.set_requires_gradient_sync(False)
                return wrapped

        with pytest.raises(BadInputError) as caught:
            train(Small(), "fsdp2", trainer=Off)
        assert str(caught.value) == LEFT_OUT

    def test_unused_parameter_on_the_last_step_too(self, rank):
        """DDP itself raises in the next forward; the last step has none."""
        model = Small()
        model.spare = torch.nn.Linear(3, 3, bias=False)
        with pytest.raises(BadInputError) as caught:
            train(model, "ddp", max_steps=1)
        assert str(caught.value) == UNUSED


@pytest.mark.ranks(2)
class TestNotRefused:
    def test_output_that_hides_its_tensors_from_ddp(self, rank):
        torch.manual_seed(0)
        first, second = train(Small(Opaque), "ddp")
        assert second["loss"] < first["loss"]

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_frozen_parameters(self, rank, strategy):
        torch.manual_seed(0)
        model = Small()
        model.table.requires_grad_(False)
        first, second = train(model, strategy)
        assert second["loss"] < first["loss"]

    def test_unused_parameter_under_fsdp2(self, rank):
        torch.manual_seed(0)
        model = Small()
        model.spare = torch.nn.Linear(3, 3)
        first, second = train(model, "fsdp2")
        assert second["loss"] < first["loss"]

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_rank_without_targets(self, rank, strategy):
        torch.manual_seed(0)
        model = Small()
        samples = [dict(sample) for sample in SAMPLES[:2]]
        samples[1]["labels"] = [-100] * 4
        fields = {"optimizer": "sgd", "lr": 0.1, "max_steps": 1, "device": "cpu", "shuffle": False}
        config = TrainConfig(**fields, strategy=strategy)
        (record,) = Trainer(config, model=model, samples=samples).train()
        assert record["tokens"] == 3
        assert record["grad_norm"] > 0
