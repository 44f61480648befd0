from __future__ import annotations

import pytest
import torch

from pytest_ranks.reference import TrainConfig
from pytest_ranks.reference.loss import counted_targets, shifted_cross_entropy_sum
from pytest_ranks.reference.optimization import (
    clip_gradients,
    decay_groups,
    global_grad_norm,
    learning_rate_factor,
    make_optimizer,
    make_scheduler,
)


def test_loss_is_the_float32_sum_over_next_tokens():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 1, -100, 2], [0, -100, -100, 6]])
    expected = sum(
        -torch.log_softmax(logits[row, place - 1], dim=-1)[labels[row, place]]
        for row, place in ((0, 1), (0, 3), (1, 3))
    )
    found = shifted_cross_entropy_sum(logits.bfloat16().float(), labels)
    torch.testing.assert_close(shifted_cross_entropy_sum(logits, labels), expected)
    torch.testing.assert_close(shifted_cross_entropy_sum(logits.bfloat16(), labels), found)
    assert shifted_cross_entropy_sum(logits.bfloat16(), labels).dtype == torch.float32
    assert counted_targets(labels).item() == 3


@pytest.mark.parametrize("width", [1, 3])
def test_loss_without_targets_is_zero_with_a_zero_gradient(width):
    logits = torch.randn(1, width, 5, requires_grad=True)
    loss = shifted_cross_entropy_sum(logits, torch.full((1, width), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_matrices_decay_and_vectors_do_not(make_model):
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if "norm" in n}
    every = {names[id(p)] for p in decayed["params"] + kept["params"]}
    assert every == set(names.values()) - {"model.embed_tokens.weight"}


def test_adamw_gets_what_the_config_says():
    groups = [{"params": [torch.zeros(2, 2, requires_grad=True)], "weight_decay": 0.3}]
    config = TrainConfig(max_steps=1, lr=0.5, betas=(0.7, 0.8), eps=1e-3)
    optimizer = make_optimizer(groups, config)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3)
    assert group["weight_decay"] == 0.3


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule):
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    config = TrainConfig(max_steps=9, schedule=schedule, warmup_steps=3, lr=2.0)
    rates = []
    for build in (
        lambda optimizer: make_scheduler(optimizer, config, 9),
        lambda optimizer: get_scheduler(name, optimizer, 3, 9),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler = build(optimizer)
        rates.append([])
        for _ in range(9):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], abs=1e-12)


def test_learning_rate_stays_at_zero_after_the_end():
    config = TrainConfig(max_steps=4, schedule="linear")
    factors = [learning_rate_factor(s, config=config, total_steps=4) for s in (0, 2, 4, 9)]
    assert factors == [1.0, 0.5, 0.0, 0.0]


def test_clipping_scales_all_gradients_by_one_factor():
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    parameters[0].grad = torch.tensor([3.0, 0.0, 0.0])
    parameters[1].grad = torch.tensor([0.0, 4.0])
    norm = global_grad_norm(parameters).item()
    assert norm == pytest.approx(5.0)
    clip_gradients(parameters, norm, 2.5)
    assert global_grad_norm(parameters).item() == pytest.approx(2.5, rel=1e-5)
    assert parameters[0].grad[0].item() == pytest.approx(1.5, rel=1e-5)
    clip_gradients(parameters, 2.5, 99.0)
    assert parameters[0].grad[0].item() == pytest.approx(1.5, rel=1e-5)
