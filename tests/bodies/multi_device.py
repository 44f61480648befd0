"""Training on several ranks: the run of one process, though no rank sees all samples."""

from __future__ import annotations

from typing import Any

from bodies.runs import (
    EXACT,
    Trained,
    descend,
    gradient_error,
    make_model,
    mean_loss,
    train,
    uneven_samples,
    update_error,
)
from pytest_ranks.conformance import oracle
from pytest_ranks.reference import Trainer


def train_on_ranks(rank: Any, **fields: Any) -> Trained:
    """Train three steps on the same eight samples; each rank draws its own share of them."""
    settings = {"strategy": "fsdp2", "micro_batch": 8 // rank.world_size}
    run = train(rank.device, **(settings | fields))
    drawn = rank.gather({*run.drawn})
    assert set.union(*drawn) == {*range(8)}
    assert sum(map(len, drawn)) == 8, f"two ranks drew the same sample: {drawn}"
    return run


def training_is_that_of_one_process(
    rank: Any, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """Losses and weights are those of gradient descent in one process, and the same on each rank."""
    run = train_on_ranks(rank, trainer=trainer, **fields)
    wanted = descend(make_model(), [uneven_samples()] * 3)
    exact = EXACT[rank.device.type]
    for found, loss in zip(run.losses, wanted.losses, strict=True):
        assert abs(found / loss - 1) < exact, f"found a loss of {found}, expected {loss}"
    error, name, worst = update_error(run, wanted)
    assert worst < 10 * exact, f"the weights' change is {error:.1e} off, {name} is {worst:.1e}"
    (first, *others) = rank.gather({n: value.tolist() for n, value in run.after.items()})
    assert all(other == first for other in others), "the ranks have different weights"


def gradients_are_synchronised(
    rank: Any, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """Each rank steps on the global batch's gradient, which its own samples alone do not give."""
    run = train_on_ranks(rank, trainer=trainer, **({"max_steps": 1} | fields))
    model, samples = make_model(), uneven_samples()
    (wanted,) = descend(model, [samples]).gradients
    (own,) = descend(model, [[samples[index] for index in run.drawn]]).gradients
    alone = oracle.relative_error(own, wanted)
    assert alone > 0.3, f"the rank's own samples have nearly the same gradient: {alone}"
    (found,) = run.gradients
    missing = wanted.keys() - found.keys()
    assert not missing, f"rank {rank.index}: no gradient for {sorted(missing)}"
    error = gradient_error(found, wanted)
    exact = 10 * EXACT[rank.device.type]
    assert error < exact, f"rank {rank.index}: gradients are {error:.1e} off the global batch's"


def losses_are_consistent(rank: Any, *, trainer: type[Trainer] = Trainer, **fields: Any) -> None:
    """Every rank reports the global batch's loss: not its own, and not a mean of means."""
    run = train_on_ranks(rank, trainer=trainer, **fields)
    samples, config = uneven_samples(), run.model.config
    wanted = mean_loss(run.before, config, samples)
    own = mean_loss(run.before, config, [samples[index] for index in {*run.drawn}])
    assert abs(own / wanted - 1) > 1e-3, f"the rank's own loss is nearly the same: {own}"
    of_means = sum(rank.gather(own)) / rank.world_size
    assert abs(of_means / wanted - 1) > 1e-3, f"the mean of means is nearly the same: {of_means}"
    exact = EXACT[rank.device.type]
    assert abs(run.losses[0] / wanted - 1) < exact, (
        f"rank {rank.index} reports {run.losses[0]}, the global batch has {wanted} (own: {own})"
    )
    reported = rank.gather(run.losses)
    assert all(losses == reported[0] for losses in reported), f"the ranks disagree: {reported}"
