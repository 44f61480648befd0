"""Whether a step's gradients arrived: what was not reduced over the ranks must not be stepped on.

FSDP2 hangs its hooks on the tensors that a forward returns. Where it finds none, in an object that
is no registered pytree, no hook runs: each rank keeps gradients of its own on parameters that the
optimizer does not hold, and a run goes on that trains nothing. DDP waits for every parameter; what
is left out keeps its whole bucket from being reduced, and DDP says so no sooner than one step later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.tensor import DTensor

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from torch import nn


def check_arrived(model: nn.Module, strategy: str) -> None:
    """Refuse gradients that were not reduced over the ranks; no collective, nothing is read from a device.

    Under FSDP2 a parameter that no rank uses may have no gradient, as in a single process.

    Args:
        model: after the backward passes of a step, before its update.
        strategy: "single", "ddp" or "fsdp2".

    Raises:
        BadInputError: parameters were not reduced.
    """
    if strategy == "single":
        return
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    kind = type(model).__name__
    if strategy == "ddp":
        if missing:
            raise BadInputError(
                f"strategy='ddp': {_named(missing)} got no gradient, and DDP reduces none of a "
                f"bucket that one is missing from; freeze what {kind} does not use "
                "(requires_grad_(False)), or use strategy='fsdp2'."
            )
        return
    kind = kind.removeprefix("FSDP")  # which `fully_shard` puts before a class's name
    whole = [name for name, parameter in trained.items() if not isinstance(parameter, DTensor)]
    if whole:
        raise BadInputError(
            f"strategy='fsdp2': the gradient of {_named(whole)} was not reduced: FSDP2 found no "
            f"tensor in what a forward of {kind} returns, or its hooks were left out; return a "
            "tensor, a tuple, a dict or one of transformers' ModelOutput classes, or use "
            "strategy='ddp'."
        )
    if trained and len(missing) == len(trained):
        raise BadInputError(
            f"strategy='fsdp2': {_named(missing)} got no gradient, no parameter of {kind} did: the "
            "backward pass was left out, or gradient synchronisation is turned off; use "
            "strategy='ddp' to see whether the model can be trained."
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
