"""Spies on classes and on torch's global hooks: they see any trainer, without a change to it.

Nothing is attached to our model instance, since a trainer that calls `from_pretrained` never
touches it. Each spy is a context manager that leaves everything as it found it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_ranks.observe.records import Collective, Forward, Group, Observed, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

MAX_FORWARDS = 4000
"""Far above what a suite's job does; an endless trainer must not fill the memory before its deadline."""


@contextmanager
def watch(model_class: type, *, rank: int) -> Iterator[Observed]:
    """Record what happens in this process until the block ends.

    Args:
        model_class: the class whose forwards are recorded.
        rank: put into the record.
    """
    seen = Observed(rank=rank)
    with ExitStack() as stack:
        stack.enter_context(_forwards(model_class, seen))
        stack.enter_context(_layer_calls(seen))
        stack.enter_context(_optimizer_steps(seen))
        stack.enter_context(_clipping(seen))
        if torch.distributed.is_available():
            stack.enter_context(_collectives(seen))
        yield seen


@contextmanager
def _forwards(model_class: type, seen: Observed) -> Iterator[None]:
    original = model_class.__dict__["forward"]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(seen.forwards) < MAX_FORWARDS and not torch.compiler.is_compiling():
            seen.forwards.append(_forward_record(self, args, kwargs, len(seen.steps)))
        return original(self, *args, **kwargs)

    model_class.forward = forward  # type: ignore[attr-defined]
    try:
        yield
    finally:
        model_class.forward = original  # type: ignore[attr-defined]


@contextmanager
def _layer_calls(seen: Observed) -> Iterator[None]:
    from torch.nn.modules.module import register_module_forward_pre_hook

    def count(module: Any, args: Any) -> None:
        del args
        seen.layer_calls += isinstance(module, torch.nn.Linear) and torch.is_grad_enabled()

    handle = register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _forward_record(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: int
) -> Forward:
    ids = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    autocast = next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
    weights = (p for p in model.parameters() if p.is_floating_point())
    return Forward(
        step=step,
        input_ids=_nested(ids) or [],
        labels=_nested(kwargs.get("labels")),
        position_ids=_nested(kwargs.get("position_ids")),
        attention_mask=_mask(mask),
        masked=mask is not None,
        training=bool(model.training),
        grad=torch.is_grad_enabled(),
        autocast=str(torch.get_autocast_dtype(autocast)).removeprefix("torch.")
        if autocast
        else None,
        weight_dtype=_dtype(next(weights)),
        buffers={
            name: _dtype(buffer)
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point()
        },
    )


def _nested(value: Any) -> list[list[int]] | None:
    """Return a [B, T] tensor as lists; None for anything else, such as a 4-D mask."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    rows: list[list[int]] = value.detach().long().cpu().tolist()
    return rows


def _mask(value: Any) -> list[Any] | None:
    """Return a mask of 2 or 4 dimensions as lists; None for anything else, such as a kernel's own mask object."""
    if not isinstance(value, Tensor) or value.dim() not in (2, 4):
        return None
    plain = value.detach().cpu()
    rows: list[Any] = (plain.long() if value.dim() == 2 else plain).tolist()
    return rows


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _optimizer_steps(seen: Observed) -> Iterator[None]:
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        record = _step_record(optimizer)
        record.where = _caller()
        seen.steps.append(record)

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        record = seen.steps[-1]
        record.state_dtypes = sorted({*record.state_dtypes, *_state_dtypes(optimizer)})
        record.weight_hash = _digest([p.detach() for p in parameters])
        record.weight_census = _bf16_share([_local(p.detach()) for p in parameters])

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _step_record(optimizer: Any) -> Step:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    local = [_local(gradient) for gradient in gradients]
    squares = sum((g.double().pow(2).sum().item() for g in local), 0.0)
    return Step(
        optimizer=type(optimizer).__name__,
        groups=[
            Group(
                numbers={k: v for k, v in group.items() if isinstance(v, (int, float, tuple))},
                size=len(group["params"]),
            )
            for group in optimizer.param_groups
        ],
        sharded=sum(_is_sharded(p) for p in parameters),
        parameters=len(gradients),
        grad_norm=squares**0.5,
        grad_dtypes=sorted({_dtype(g) for g in local}),
        weight_dtypes=sorted({_dtype(p) for p in parameters}),
        state_dtypes=_state_dtypes(optimizer),
        grad_census=_bf16_share(local),
        weight_census_before=_bf16_share([_local(p.detach()) for p in parameters]),
        grad_hash=_digest(gradients),
    )


def _state_dtypes(optimizer: Any) -> list[str]:
    """Return the dtypes of the optimizer's floating state; a step counter, a scalar, says nothing of precision."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in states if isinstance(value, Tensor) and value.dim() > 0]
    return sorted({_dtype(value) for value in tensors if value.is_floating_point()})


def _is_sharded(tensor: Tensor) -> bool:
    placements = getattr(tensor, "placements", ())
    return any(placement.is_shard() for placement in placements)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def _bf16_share(tensors: list[Tensor]) -> float | None:
    """Return the share of non-zero entries that bf16 represents exactly."""
    exact = total = 0
    for tensor in tensors:
        if not tensor.is_floating_point():
            continue
        values = tensor[tensor != 0]
        exact += int((values.to(torch.bfloat16).to(values.dtype) == values).sum())
        total += values.numel()
    return exact / total if total else None


def _digest(tensors: list[Tensor]) -> str | None:
    """Return one digest of the tensors that are whole on this rank; None when there are none."""
    whole = [_local(tensor) for tensor in tensors if not _is_sharded(tensor)]
    if not whole:
        return None
    digest = hashlib.sha256()
    for tensor in whole:
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _caller() -> str:
    """Return file and line of the first frame outside torch and this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path and "/accelerate/" not in path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@contextmanager
def _clipping(seen: Observed) -> Iterator[None]:
    """Record the limit of each call to torch's clipping by norm that looks the function up in its module."""
    from torch.nn import utils

    originals = {
        (utils, "clip_grad_norm_"),
        (utils.clip_grad, "clip_grad_norm_"),
        (utils, "clip_grads_with_norm_"),
    }
    saved = [
        (module, name, getattr(module, name)) for module, name in originals if hasattr(module, name)
    ]

    def spying(original: Any) -> Any:
        @functools.wraps(original)
        def clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            seen.clips.append(float(max_norm))
            return original(parameters, max_norm, *args, **kwargs)

        return clip

    for module, name, original in saved:
        setattr(module, name, spying(original))
    try:
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


@contextmanager
def _collectives(seen: Observed) -> Iterator[None]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            if func.namespace in ("c10d", "_c10d_functional"):
                first = next(_tensors(args), None)
                name = func.name().partition("::")[2].partition(".")[0]
                seen.collectives.append(
                    Collective(
                        step=len(seen.steps),
                        op=name,
                        dtype=_dtype(first) if first is not None else "",
                        numel=first.numel() if first is not None else 0,
                    )
                )
            return func(*args, **(kwargs or {}))

    with Spy():  # type: ignore[no-untyped-call]
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
