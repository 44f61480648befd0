"""What a run in bf16 keeps in float32: seen tensor by tensor, and judged by values where dtypes cannot tell.

FSDP2 casts reduced gradients back to the parameters' dtype, so that all dtypes are right after a
reduction in bf16. What cannot be hidden is that every value then fits into bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bodies.runs import make_model, train
from pytest_ranks.observe.spies import watch
from pytest_ranks.reference import Trainer

LIMIT = 0.75
"""Largest share of bf16-exact values after a sum in float32: 0.5 is seen on 2 ranks, 0.25 on 4; in bf16, 1."""
SMALL = 1e-3
"""An update that float32 keeps and bf16 loses: next to 1.0 bf16 has steps of 0.0039 and 0.0078."""


@dataclass(slots=True, kw_only=True)
class Seen:
    """The dtypes of a run by tensor, and the shares of values that bf16 holds exactly."""

    parameters: dict[str, str]
    gradients: dict[str, str]
    moments: dict[str, str]
    buffers: dict[str, str]
    computed: set[str] = field(default_factory=set)
    gathered: set[str] = field(default_factory=set)
    reduced: set[str] = field(default_factory=set)
    census: list[float] = field(default_factory=list)
    buffers_changed: list[str] = field(default_factory=list)


def dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def spying(trainer: type[Trainer]) -> tuple[type[Trainer], Seen]:
    """Return the trainer with a look at every tensor as the optimizer steps on it, and what it saw."""
    seen = Seen(parameters={}, gradients={}, moments={}, buffers={})

    class Spying(trainer):  # type: ignore[valid-type,misc]
        def step(self) -> None:
            named = dict(self.model.named_parameters())
            seen.parameters |= {name: dtype_of(p) for name, p in named.items()}
            seen.gradients |= {n: dtype_of(p.grad) for n, p in named.items() if p.grad is not None}
            super().step()
            for name, parameter in named.items():
                for key, value in self.optimizer.state[parameter].items():
                    if value.dim():  # the step counter, a scalar, is no moment
                        seen.moments[f"{name}: {key}"] = dtype_of(value)

    return Spying, seen


def observe(device: torch.device, *, trainer: type[Trainer] = Trainer, **fields: Any) -> Seen:
    """Train two steps in bf16 with AdamW, and look."""
    model = make_model()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    spy, seen = spying(trainer)

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen.computed.add(dtype_of(output))

    hooks = [
        part.register_forward_hook(note)
        for part in model.modules()
        if isinstance(part, torch.nn.Linear)
    ]
    settings = {"optimizer": "adamw", "lr": SMALL, "precision": "bf16", "max_steps": 2}
    with watch(type(model), rank=0) as watched:
        train(device, trainer=spy, model=model, **(settings | fields))
    for hook in hooks:
        hook.remove()
    for forward in watched.forwards:
        seen.buffers |= forward.buffers
    for call in watched.collectives:
        if call.numel > 1 and "float" in call.dtype:  # not the reported loss and norm
            if "allgather" in call.op:
                seen.gathered.add(call.dtype)
            elif "reduce" in call.op:
                seen.reduced.add(call.dtype)
    seen.census = [step.grad_census or 0.0 for step in watched.steps]
    seen.buffers_changed = [
        name
        for name, value in model.named_buffers()
        if not torch.equal(value.cpu().to(buffers[name].dtype), buffers[name])
    ]
    return seen


def wrong_precision(seen: Seen, *, world_size: int, accumulates: bool = False) -> list[str]:
    """Return a sentence for each thing that is not in the precision it must have."""
    found = []
    kinds = {
        "master weights": seen.parameters,
        "gradients": seen.gradients,
        "optimizer moments": seen.moments,
        "buffers": seen.buffers,
    }
    for kind, dtypes in kinds.items():
        wrong = [name for name, dtype in dtypes.items() if dtype != "float32"]
        if wrong:
            found.append(f"{kind} MUST be float32: {len(wrong)} of {len(dtypes)} are not, {wrong}")
        if not dtypes:
            found.append(f"{kind} were not seen")
    if len(seen.gradients) < len(seen.parameters):
        found.append(f"gradients: {set(seen.parameters) - set(seen.gradients)} have none")
    if len(seen.moments) != 2 * len(seen.parameters):
        found.append(f"optimizer moments: found {len(seen.moments)}, expected two a parameter")
    if seen.buffers_changed:
        found.append(f"buffers MUST keep their values: {seen.buffers_changed} were rounded")
    if "bfloat16" not in seen.computed:
        found.append(f"computation MUST be in bfloat16: layers return {seen.computed}")
    if not seen.reduced <= {"float32"}:
        found.append(f"reductions MUST be in float32: collectives had {seen.reduced}")
    if world_size > 1 and not seen.reduced:
        found.append("reductions were not seen: no collective adds gradients up")
    if (world_size > 1 or accumulates) and max(seen.census) > LIMIT:
        how = "reduced over ranks" if world_size > 1 else "accumulated"
        found.append(
            f"gradients MUST be {how} in float32: {max(seen.census):.4f} of them are exact in bf16"
        )
    return found


def lost_updates(
    device: torch.device, *, trainer: type[Trainer] = Trainer, **fields: Any
) -> list[str]:
    """Return a sentence for each tensor that one small AdamW step does not move as it must.

    The first step of AdamW moves each entry by the learning rate, against its gradient's sign. The
    weights of the norms begin at 1.0, where bf16 has no number 0.001 away.
    """
    settings = {"optimizer": "adamw", "lr": SMALL, "precision": "bf16", "max_steps": 1}
    run = train(device, trainer=trainer, **(settings | {"eps": 1e-20} | fields))
    (gradients,) = run.gradients
    found = []
    for name, before in run.before.items():
        has = gradients[name].abs() > 1e-12
        moved = (run.after[name].double() - before.double())[has]
        wanted = -SMALL * gradients[name][has].sign().double()
        right = ((moved - wanted).abs() < 1e-2 * SMALL).double().mean().item()
        if not has.any() or right < 0.999:
            found.append(
                f"small updates MUST survive: {right:.2f} of {name} moved by {SMALL}, "
                f"{int((moved == 0).sum())} of {moved.numel()} not at all"
            )
    return found
