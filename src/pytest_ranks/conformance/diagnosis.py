"""Why does my model not learn: the few checks that answer it, in an order that points at the cause.

`pytest --pyargs pytest_ranks.conformance --ranks-subject=... -k diagnostic -x`. One process comes
first, then ranks; in each, what a later step relies on comes before it. So the first failure names the
cause, and what passed before it is ruled out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_ranks.conformance.check import Setting

KEYWORD = "diagnostic"
"""What `-k` selects these checks by."""

RANKS = 2
"""A sum over two ranks shows every wrong factor; more only take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One question, and what a "no" points at.

    Attributes:
        check: the id of the check that answers it.
        question: answered by "yes" when the check passes.
        look: where the cause is when it is the first to fail.
    """

    check: str
    question: str
    look: str


STEPS = (
    Step(
        check="subject.honours_job",
        question="does the optimizer get the settings and the samples that it was given?",
        look="learning rate, schedule, warm-up and decay as the optimizer sees them; the way from your "
        "settings to the trainer",
    ),
    Step(
        check="overfitting.single_sample",
        question="can it learn one sample by heart?",
        look="whether the optimizer holds the parameters that are trained, and whether targets are "
        "those of the next token",
    ),
    Step(
        check="gradient_sync.world_invariance",
        question="is the update independent of the number of ranks?",
        look="the factor world_size, which DDP and FSDP2 divide by, the token count, which is summed over "
        "ranks, and whether gradients are reduced at all",
    ),
    Step(
        check="loss.trained_positions",
        question="are exactly the unmasked tokens trained?",
        look="the collator: label masks, padding, the end-of-sequence token",
    ),
    Step(
        check="loss.targets",
        question="is each of them trained on the next token?",
        look="the shift of labels: once, in the collator or in the loss",
    ),
    Step(
        check="loss.token_weights",
        question="does every token weigh 1/N, however the batch is cut into micro-batches?",
        look="what each micro-batch's loss is divided by: the global batch's token count, once; and "
        "whether gradients of all micro-batches are added up",
    ),
    Step(
        check="gradient_sync.every_tensor",
        question="is every parameter trained?",
        look="requires_grad, the optimizer's parameter groups, layers that are left out of the graph",
    ),
    Step(
        check="loss.split_invariance",
        question="is the whole update the oracle's, however the batch is cut into micro-batches?",
        look="what a forward leaves behind for the next one: dropout, buffers, gradients that are not "
        "cleared",
    ),
)
"""In the order of a diagnosis within one world size."""

_PLACES = {step.check: place for place, step in enumerate(STEPS)}


def is_step(check: str, setting: Setting | None) -> bool:
    """Whether a check in a setting belongs to the diagnosis: one process, or two ranks."""
    if check not in _PLACES or setting is None:
        return False
    return setting.strategy == "single" or setting.world_size == RANKS


def place_of(check: str, setting: Setting | None) -> tuple[int, int, str]:
    """Return where a check stands in the diagnosis; what does not belong comes last."""
    if setting is None or not is_step(check, setting):
        return RANKS + 1, 0, ""
    return setting.world_size, _PLACES[check], setting.strategy


def advice(check: str) -> str:
    """Return what the failure of a step means, for its report."""
    place = _PLACES[check]
    return (
        f"  diagnostic: step {place + 1} of {len(STEPS)}: {STEPS[place].question} No. "
        f"If no step before it failed, look at {STEPS[place].look}."
    )
