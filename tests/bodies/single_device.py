"""Training on one device: each step is that of gradient descent in float64, however the batch is cut."""

from __future__ import annotations

from typing import Any

import torch

from bodies.runs import (
    EXACT,
    descend,
    gradient_error,
    make_model,
    plain_gradient,
    train,
    uneven_samples,
    update_error,
)
from pytest_ranks.conformance import oracle
from pytest_ranks.reference import Trainer


def training_is_gradient_descent(
    device: torch.device, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """Take six steps over two windows: each loss, each gradient and all weights are the oracle's."""
    samples = uneven_samples(9)  # the second window of an epoch is short
    run = train(
        device, samples=samples, trainer=trainer, **({"micro_batch": 5, "max_steps": 6} | fields)
    )
    wanted = descend(make_model(), [samples[:5], samples[5:]] * 3)
    exact = EXACT[device.type]
    assert len(run.history) == 6
    for step, (record, loss) in enumerate(zip(run.history, wanted.losses, strict=True)):
        found = record["loss"]
        assert abs(found / loss - 1) < exact, f"step {step + 1}: loss {found}, expected {loss}"
        norm = oracle.norm(wanted.gradients[step])
        found = record["grad_norm"]
        assert abs(found / norm - 1) < 10 * exact, f"step {step + 1}: norm {found}, expected {norm}"
    error, name, worst = update_error(run, wanted)
    assert worst < 10 * exact, f"all updates are {error:.1e} off, {name} is {worst:.1e}"


def loss_falls_at_each_step(device: torch.device, *, trainer: type[Trainer] = Trainer) -> None:
    """Descend on one batch in small steps: no step may climb, and eight take a tenth away."""
    run = train(device, trainer=trainer, micro_batch=8, max_steps=8, lr=0.05)
    pairs = zip(run.losses, run.losses[1:], strict=False)
    assert all(after < before for before, after in pairs), run.losses
    assert run.losses[-1] < 0.9 * run.losses[0], run.losses


LAYOUTS = ((8, 1), (4, 2), (2, 4), (1, 8))
"""Samples a micro-batch and micro-batches a step: the same eight samples, uneven in tokens."""


def accumulation_is_one_batch(
    device: torch.device, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """Cut the same samples into one, two, four and eight micro-batches: nothing may change."""
    wanted = descend(make_model(), [uneven_samples()] * 2)
    exact = EXACT[device.type]
    whole = plain_gradient(device, uneven_samples())
    for micro_batch, accumulation in LAYOUTS:
        layout = f"{accumulation} micro-batches of {micro_batch}"
        settings = {"micro_batch": micro_batch, "gradient_accumulation_steps": accumulation}
        run = train(device, trainer=trainer, max_steps=2, **(settings | fields))
        for found, loss in zip(run.losses, wanted.losses, strict=True):
            assert abs(found / loss - 1) < exact, f"{layout}: loss {found}, expected {loss}"
        error = gradient_error(run.gradients[0], whole)
        assert error < exact, f"{layout}: the first gradient is {error:.1e} off"
        error, name, worst = update_error(run, wanted)
        assert worst < 10 * exact, f"{layout}: all is {error:.1e} off, {name} is {worst:.1e}"
