"""Learning by heart, and the loss that says so: computed in five ways, and on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.loss import loss_utils

from bodies.runs import (
    EXACT,
    descend,
    gradient_error,
    make_model,
    mean_loss,
    padded,
    plain_gradient,
    train,
    uneven_samples,
    update_error,
)
from pytest_ranks.reference import Trainer
from pytest_ranks.reference.data import JsonlDataset

FINAL_LOSS = 0.1
"""Nats a token: the right one has a probability of 0.9, so that greedy decoding says it."""
TEXTS = (
    "Ranks add up gradients.",
    "A short one.",
    "The loss is a mean over tokens, not over samples.",
    "Packed documents do not see each other.",
    "Why?",
    "Masters stay in float32.",
)


def text_sample(tokenizer: Any, text: str, *, prompt: int = 3) -> dict[str, list[int]]:
    """Tokenise a text of which the first tokens are not trained."""
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def greedy(weights: dict[str, torch.Tensor], sample: dict[str, list[int]]) -> list[int]:
    """Let a fresh model with these weights say a sample, from its first trained token on."""
    model = make_model().eval()
    model.load_state_dict(weights)
    ids = sample["input_ids"]
    said = ids[: max(1, sum(label == -100 for label in sample["labels"]))]
    with torch.no_grad():
        while len(said) < len(ids):
            logits = model(input_ids=torch.tensor([said]), use_cache=False).logits
            said = [*said, int(logits[0, -1].argmax())]
    return said


def overfits_one_sample(
    device: torch.device, *, world_size: int = 1, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """Train on one sample until the model says it."""
    sample = text_sample(make_model().tokenizer, TEXTS[0])
    settings = {"optimizer": "adamw", "lr": 1e-2, "max_steps": 30, "max_grad_norm": 1.0}
    run = train(device, samples=[sample] * world_size, trainer=trainer, **(settings | fields))
    first, last = run.losses[0], run.losses[-1]
    assert last < FINAL_LOSS, f"the loss went from {first:.3f} to {last:.3f}"
    assert last < 0.5 * first, f"the loss went from {first:.3f} to {last:.3f}"
    # The last record is of the weights before the last step; of those after it the oracle speaks.
    after = mean_loss(run.after, run.model.config, [sample])
    assert after < FINAL_LOSS, f"reported {last:.3f}, but the saved weights have {after:.3f}"
    assert greedy(run.after, sample) == sample["input_ids"]


# ---- one loss, five ways ------------------------------------------------------------------------


@contextmanager
def losses_without_reduction() -> Iterator[None]:
    """Make every transformers model return a loss for each token, as patches for packing do."""
    original = loss_utils.fixed_cross_entropy

    def unreduced(source: Any, target: Any, *_: Any, **__: Any) -> torch.Tensor:
        return F.cross_entropy(source, target, ignore_index=-100, reduction="none")

    loss_utils.fixed_cross_entropy = unreduced
    try:
        yield
    finally:
        loss_utils.fixed_cross_entropy = original


def losses_by_method(device: torch.device, *, trainer: type[Trainer] = Trainer) -> dict[str, float]:
    """Return the loss of the same uneven samples, each time from a model built anew."""
    samples = uneven_samples()
    batch = padded(samples, device)
    count = int((batch["labels"][:, 1:] != -100).sum())

    def own_loss(model: Any) -> torch.Tensor:
        with torch.no_grad():
            loss: torch.Tensor = model.to(device)(**batch).loss
        return loss

    built_before = make_model()
    found = {"standard": own_loss(make_model())}
    with losses_without_reduction():
        each = own_loss(make_model())
        assert own_loss(built_before).shape == each.shape, "the patch is of all models"
    assert each.numel() > 1, "the patch had no effect"
    found["patched"] = each.sum() / count
    # Had the patch leaked, these would have a loss for each token.
    for late in (built_before, make_model()):
        assert own_loss(late).numel() == 1, "the patch is still there"
        assert torch.allclose(own_loss(late), found["standard"])
    with torch.no_grad():
        logits = make_model().to(device)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    targets = batch["labels"][:, 1:]
    tokens = F.cross_entropy(
        logits.logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    found["a token"] = tokens[targets != -100].mean()
    values = {name: float(loss) for name, loss in found.items()}
    values["trainer"] = train(device, trainer=trainer, micro_batch=8, max_steps=1).losses[0]
    model = make_model()
    values["oracle"] = mean_loss(model.state_dict(), model.config, samples)
    return values


def losses_agree(device: torch.device, *, trainer: type[Trainer] = Trainer) -> None:
    """Hold the five together."""
    values = losses_by_method(device, trainer=trainer)
    wanted = values.pop("oracle")
    for method, value in values.items():
        off = abs(value - wanted)
        assert off < 1e-3, f"{method}: the loss is {value}, the oracle's is {wanted}"
        assert off < wanted * EXACT[device.type], f"{method}: {value} is not exactly {wanted}"


# ---- world size ---------------------------------------------------------------------------------


def scales_with_the_world(rank: Any, *, trainer: type[Trainer] = Trainer, **fields: Any) -> None:
    """Train the same uneven global batch on this world: loss and update are those of one process."""
    share = 8 // rank.world_size
    settings = {"strategy": "ddp", "micro_batch": share, "max_steps": 2}
    run = train(rank.device, trainer=trainer, **(settings | fields))
    drawn = rank.gather(run.drawn)
    counts = [sum(_counted(index) for index in own) for own in drawn]
    assert len({*counts}) == rank.world_size, f"even tokens a rank prove nothing: {counts}"
    wanted = descend(make_model(), [uneven_samples()] * len(run.history))
    exact = EXACT[rank.device.type]
    for found, loss in zip(run.losses, wanted.losses, strict=True):
        assert abs(found / loss - 1) < exact, f"{rank.world_size} ranks: {found}, 1 process: {loss}"
    error = gradient_error(run.gradients[0], plain_gradient(rank.device, uneven_samples()))
    assert error < exact, f"{rank.world_size} ranks: the first gradient is {error:.1e} off"
    error, name, worst = update_error(run, wanted)
    assert worst < 10 * exact, f"{rank.world_size} ranks: {error:.1e} off, {name} {worst:.1e}"


def _counted(index: int) -> int:
    return sum(label != -100 for label in uneven_samples()[index]["labels"][1:])


# ---- the whole pipeline -------------------------------------------------------------------------


def pipeline_overfits(
    device: torch.device, folder: Path, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> None:
    """From text to a file, through packing in shuffled windows: each sample is learnt by heart."""
    tokenizer = make_model().tokenizer
    samples = [text_sample(tokenizer, text) for text in TEXTS]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    # Two windows an epoch, each packed into several micro-batches.
    settings = {
        "max_tokens_per_rank": 60,
        "micro_batch": 3,
        "epochs": 40,
        "max_steps": None,
        "schedule": "cosine",
    }
    settings |= {"optimizer": "adamw", "lr": 1e-2, "max_grad_norm": 1.0, "shuffle": True}
    run = train(device, samples=JsonlDataset(path), trainer=trainer, **(settings | fields))
    first, last = run.losses[0], run.losses[-1]
    assert last < 0.3 * first, f"the loss went from {first:.3f} to {last:.3f}"
    for text, sample in zip(TEXTS, samples, strict=True):
        before = mean_loss(run.before, run.model.config, [sample])
        after = mean_loss(run.after, run.model.config, [sample])
        assert after < 0.3 * before, f"{text!r} was not learnt: {before:.3f} to {after:.3f}"
        assert greedy(run.after, sample) == sample["input_ids"], f"{text!r} is not said"
