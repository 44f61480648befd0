"""Training with Liger's kernels beside training without: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pytest_ranks.reference import TrainConfig, Trainer


def kernels_in(output: torch.Tensor) -> set[str]:
    """Return the names of Liger's functions in the graph that made a tensor."""
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__.startswith("Liger"):
            found.add(type(node).__name__.removesuffix("Backward"))
        todo += [following for following, _ in node.next_functions]
    return found


class Watching(Trainer):
    """Keeps which of Liger's functions made the first loss."""

    kernels_seen: set[str] | None = None

    def backward(self, scaled: torch.Tensor) -> None:
        if self.kernels_seen is None:
            self.kernels_seen = kernels_in(scaled)
        super().backward(scaled)


def mean_loss_in_float64(model: torch.nn.Module, samples: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of all counted tokens by the definition, one sample at a time."""
    exact = copy.deepcopy(model).double().cpu()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            scores = exact(input_ids=torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
            for place, label in enumerate(sample["labels"][1:]):
                if label != -100:
                    total -= float(scores[place, label])
                    tokens += 1
    return total / tokens


def compare_liger_losses(
    model: torch.nn.Module, samples: list[dict[str, list[int]]], *, device: str, **fields: Any
) -> dict[str, Any]:
    """Train copies of a model with and without Liger's kernels, on all samples a step.

    Args:
        model: of transformers, on the CPU; stays as it is.
        samples: tokenised; each step trains on all of them.
        device: "cuda", or "cpu" in a process that was started with TRITON_INTERPRET=1.
        fields: of `TrainConfig`.

    Returns:
        `plain` and `liger`: the losses of each step; `oracle`: the first loss in float64; `kernels`:
        which of Liger's functions the loss went through, by run; `report`: what was patched;
        `update_error`: the relative difference of the two runs' updates.
    """
    base = {"micro_batch": len(samples), "max_steps": 3, "optimizer": "sgd", "lr": 0.1}
    runs: dict[str, Any] = {"oracle": mean_loss_in_float64(model, samples), "kernels": {}}
    updates = {}
    for name, liger in (("plain", False), ("liger", True)):
        trained = copy.deepcopy(model)
        config = TrainConfig(**(base | fields), liger=liger, device=device)
        trainer = Watching(config, model=trained, samples=samples)
        trainer.setup()
        start = {key: parameter.detach().clone() for key, parameter in trained.named_parameters()}
        runs[name] = [record["loss"] for record in trainer.train()]
        runs["kernels"][name] = sorted(trainer.kernels_seen or ())
        runs["report"] = trainer.kernels
        ends = dict(trained.named_parameters())
        updates[name] = torch.cat([(ends[key] - start[key]).detach().flatten() for key in start])
    difference = (updates["liger"] - updates["plain"]).norm() / updates["plain"].norm()
    return runs | {"update_error": difference.item()}


def assert_liger_losses_agree(found: dict[str, Any]) -> None:
    """Hold what `compare_liger_losses` found to the promise: 1e-3 of each other and the oracle."""
    assert found["kernels"]["plain"] == []
    assert "LigerCrossEntropyFunction" in found["kernels"]["liger"]
    for plain, liger in zip(found["plain"], found["liger"], strict=True):
        assert abs(liger - plain) < 1e-3, found
    assert abs(found["liger"][0] - found["oracle"]) < 1e-3, found
    assert found["liger"][-1] < found["liger"][0], found
