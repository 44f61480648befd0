"""Small training runs of the reference, what they left behind, and the same runs by definition.

`train` runs any trainer class on any device and rank. `descend` is gradient descent in float64 with
the model written out by hand, one sample at a time: it shares nothing with the trainer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

# Imported here, so that ranks are forked from a process that has it.
import transformers.models.llama.modeling_llama  # noqa: F401

from pytest_ranks.conformance import oracle
from pytest_ranks.models import tiny_model
from pytest_ranks.reference import TrainConfig, Trainer, mutants
from pytest_ranks.reference.checkpoint import full_on_cpu

VOCABULARY = 320
EXACT = {"cpu": 1e-6, "cuda": 1e-4}
"""How far float32 may be from float64, relative: kernels on CUDA may compute products in parts of TF32.
Losses are 1e-7 off on the CPU, gradients and updates of all tensors together 1e-6, the worst tensor's update 5e-6
(a weight next to 1.0 rounds a step of 0.01 to five digits): those have ten times this limit."""


def uneven_samples(count: int = 8, *, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of 3 to 30 tokens of which prompts take a random part; the second trains nothing."""
    source = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [source.randrange(VOCABULARY) for _ in range(source.randint(3, 30))]
        prompt = source.randrange(len(ids) - 1)
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    samples[1]["labels"] = [-100] * len(samples[1]["labels"])
    return samples


def make_model(**overrides: Any) -> Any:
    """Build the same tiny Llama each time, with logits that differ from the first step on."""
    return tiny_model("llama", **({"initializer_range": 0.1} | overrides))


def planted(name: str) -> type[Trainer]:
    """Return the trainer with the planted bug of this name."""
    found: type[Trainer] = getattr(mutants, name).trainer_class()
    return found


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter, whole and on the CPU (a collective under FSDP2)."""
    return {name: full_on_cpu(p.detach()).clone() for name, p in model.named_parameters()}


class Recording(Trainer):
    """What a run is remembered by: the samples it drew and the gradients it stepped on."""

    drawn: list[int]
    gradients: list[dict[str, torch.Tensor]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn = []
        self.gradients = []

    def sample(self, index: int, samples: Any) -> Any:
        self.drawn.append(index)
        return super().sample(index, samples)

    def step(self) -> None:
        named = self.model.named_parameters()
        self.gradients.append({n: full_on_cpu(p.grad) for n, p in named if p.grad is not None})
        super().step()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run left behind: records, parameters before and after, draws and gradients a step."""

    history: list[dict[str, Any]]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    drawn: list[int]
    gradients: list[dict[str, torch.Tensor]]
    model: Any

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.history]


def train(
    device: torch.device,
    *,
    samples: Any = None,
    trainer: type[Trainer] = Trainer,
    model: Any = None,
    **fields: Any,
) -> Trained:
    """Train on this device; every other choice is the config's."""
    model = make_model() if model is None else model
    before = parameters_of(model)
    settings = {"optimizer": "sgd", "lr": 0.5, "max_grad_norm": None, "shuffle": False}
    config = TrainConfig(**(settings | {"max_steps": 3, "device": str(device)} | fields))
    # The recorder comes first, so that it sees what the trainer under test steps on.
    recorder = type("Recorded", (Recording, trainer), {}) if trainer is not Trainer else Recording
    running = recorder(
        config,
        model=model,
        samples=uneven_samples() if samples is None else samples,
        tokenizer=getattr(model, "tokenizer", None),
    )
    history = running.train()
    return Trained(
        history=history,
        before=before,
        after=parameters_of(model),
        drawn=running.drawn,
        gradients=running.gradients,
        model=model,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Gradient descent by definition: float64 weights at the end, and each step's loss and gradient."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


def descend(model: Any, windows: list[list[Any]], *, lr: float = 0.5) -> Descent:
    """Take a step of plain gradient descent on each window's mean loss a token.

    Args:
        model: a Llama from before training; it is only read.
        windows: the samples of each step.
        lr: the learning rate.
    """
    weights = {name: value.double() for name, value in parameters_of(model).items()}
    losses, gradients = [], []
    for window in windows:
        gradient, loss = oracle.gradient(weights, model.config, window)
        weights = {name: value - lr * gradient[name] for name, value in weights.items()}
        losses.append(loss)
        gradients.append(gradient)
    return Descent(weights=weights, losses=losses, gradients=gradients)


def mean_loss(weights: dict[str, torch.Tensor], config: Any, samples: Any) -> float:
    """Return the mean loss a token of some samples, in float64 and by definition."""
    parts = [
        oracle.sample_loss_sum({n: w.double() for n, w in weights.items()}, config, sample)
        for sample in samples
    ]
    return float(sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts))


def padded(samples: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad samples on the right, by hand."""
    width = max(len(sample["input_ids"]) for sample in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for sample in samples:
        length, missing = len(sample["input_ids"]), width - len(sample["input_ids"])
        rows["input_ids"].append(sample["input_ids"] + [256] * missing)
        rows["labels"].append(sample["labels"] + [-100] * missing)
        rows["attention_mask"].append([1] * length + [0] * missing)
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def plain_gradient(device: torch.device, samples: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of the model's own mean loss over one batch: one process, no trainer, float32."""
    model = make_model().to(device)
    model(**padded(samples, device)).loss.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters()}


def gradient_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all gradients together; one that is missing counts as zero."""
    zero = {name: torch.zeros_like(value) for name, value in wanted.items()}
    return oracle.relative_error({**zero, **found}, wanted)


def update_error(run: Trained, descent: Descent) -> tuple[float, str, float]:
    """Return the relative error of the whole update, and the tensor that is furthest off, with its own."""
    before = {name: value.double() for name, value in run.before.items()}
    found = oracle.difference(run.after, before)
    wanted = oracle.difference(descent.weights, before)
    name, error = oracle.worst_tensor(found, wanted)
    return oracle.relative_error(found, wanted), name, error
