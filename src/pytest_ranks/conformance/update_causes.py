"""The table of hypotheses, applied to the update of a real model: each wrong formula predicts a whole update.

A formula gives every sample a weight; the gradient is linear in them. So the oracle's gradient of
each sample, weighted as a formula says, is the update that a trainer with exactly this bug makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.conformance import oracle
from pytest_ranks.conformance.causes import predictions
from pytest_ranks.conformance.findings import Hypothesis
from pytest_ranks.conformance.reading import Reading, micro_batches

if TYPE_CHECKING:
    from pytest_ranks.conformance.materials import Materials
    from pytest_ranks.conformance.runner import Run
    from pytest_ranks.models.corpora import Corpus


def update_hypotheses(
    run: Run, corpus: Corpus, materials: Materials, update: oracle.Weights
) -> list[Hypothesis]:
    """Return every known formula with how far the update that it predicts is from the one that was made.

    Args:
        run: a run of the small Llama, of one SGD step.
        corpus: its samples, each drawn once.
        materials: the models before training.
        update: what was subtracted from the parameters, divided by the learning rate.
    """
    import torch

    reading = Reading(
        run=run,
        corpus=corpus,
        weights=torch.zeros(0),
        wanted=corpus.targets(),
        batches=micro_batches(run, corpus, step=0),
    )
    gradients = materials.sample_gradients(corpus)
    size = max(oracle.norm(update), 1e-300)
    hypotheses = []
    for entry in predictions(reading):
        by_sample = {
            reading.sample_of(pair): weight / reading.count
            for pair, weight in entry.weights.items()
        }
        predicted = {
            name: sum(
                (
                    by_sample.get(index, 0.0) * gradient[name]
                    for index, gradient in enumerate(gradients)
                ),
                start=torch.zeros_like(value, dtype=torch.float64),
            )
            for name, value in update.items()
        }
        missed = oracle.norm({name: value - predicted[name] for name, value in update.items()})
        hypotheses.append(
            Hypothesis(cause=entry.cause, error=missed / size, reference=entry.reference)
        )
    return hypotheses
