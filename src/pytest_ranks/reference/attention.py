"""Which attention a model computes with, and torch's variable-length attention for packed rows.

Packed documents are told apart by `position_ids` that restart. SDPA and eager attention get a mask
made of them, T by T; flash-attn and the variable-length kernel get the documents' bounds and never
look across. Whatever is chosen is tried before it trains: against the attention that the model had,
and by `keeps_documents_apart` when documents are packed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor, nn

VARLEN = "pytest_ranks_varlen"
"""The name under which transformers knows our variable-length attention."""

CLOSE = 1e-4
"""Relative difference of two attentions' logits in float32 that rounding explains; seen: 1e-6."""

CLOSE_IN_HALF = 0.05
"""The same where the kernel computes in bfloat16, with its 8 bits."""


def choose_attention(
    model: Any, name: str, *, device: torch.device, precision: str, keywords: frozenset[str]
) -> str:
    """Let the model compute with an attention, after comparing it with the one that it had.

    Args:
        model: on its device, with values; may be sharded (then a collective).
        name: "auto" takes flash-attn where it is installed and can run, else keeps what the model
            was loaded with; others as they are called.
        device: where it computes.
        precision: "fp32" or "bf16".
        keywords: those that the model's forward accepts.

    Returns:
        transformers' name of what is used; "" for a model that is not one of transformers'.

    Raises:
        BadInputError: the attention is not there, or not for this model.
    """
    before = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if name == "auto":
        if missing_for_kernel("flash_attention_2", device, precision) or not getattr(
            model, "_supports_flash_attn", False
        ):
            return before
        name = "flash_attention_2"
    if not hasattr(model, "set_attn_implementation"):
        raise BadInputError(
            f"attention={name!r}: {type(model).__name__} is no transformers model and has one "
            "attention only; use attention='auto'."
        )
    if reason := missing_for_kernel(name, device, precision):
        raise BadInputError(f"attention={name!r} {reason}; use attention='sdpa'.")
    used = register_varlen() if name == "varlen" else name
    if used == before:
        return used
    with computing_for(used, device):
        wanted = _probe(model, keywords)
        try:
            model.set_attn_implementation(used)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BadInputError(
                f"attention={name!r} is not for {type(model).__name__}: {reason}"
            ) from error
        if model.config._attn_implementation != used:  # it only logs that it did nothing
            raise BadInputError(
                f"attention={name!r} is not for {type(model).__name__}: the family has an attention "
                f"of its own, {before!r}; use attention='auto'."
            )
        found = _probe(model, keywords)
    difference = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
    allowed = CLOSE if device.type == "cpu" or used in ("sdpa", "eager") else CLOSE_IN_HALF
    if not difference <= allowed:  # nan neither
        model.set_attn_implementation(before)
        raise BadInputError(
            f"attention={name!r} is not for {type(model).__name__}: its logits differ from those "
            f"with {before!r} by {difference:.1e} of the largest, expected at most {allowed:.0e}; "
            f"use attention={before!r}."
        )
    return used


def missing_for_kernel(name: str, device: torch.device, precision: str) -> str:
    """Return what keeps a kernel from running here; nothing if it can, or is none."""
    if name == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if device.type != "cuda":
            return f"needs a CUDA device, this process computes on {device.type!r}"
        if not is_flash_attn_2_available():
            return "needs flash-attn, which is not installed: pip install 'pytest-ranks[flash]'"
    kernel = name == "flash_attention_2" or (name == "varlen" and device.type != "cpu")
    if kernel and precision != "bf16":
        return f"computes in half precision on {device.type!r}, found precision={precision!r}"
    return ""


def computing_for(used: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which float32 weights can be tried with a half-precision kernel."""
    if device.type != "cpu" and used in ("flash_attention_2", VARLEN):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def register_varlen() -> str:
    """Make transformers know our variable-length attention; return the name it goes by."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    return VARLEN


def document_bounds(position_ids: Tensor) -> tuple[Tensor, int]:
    """Return where documents begin in rows that are laid end to end, and the longest's length.

    A document begins where a row does, and where a position does not follow the one before it.

    Args:
        position_ids: int64 [B, T].

    Returns:
        int32 [documents + 1], from 0 to B * T; a number of tokens.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max().item())


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each document, as transformers calls an attention function.

    Args:
        module: the attention layer.
        query: [B, H, T, D].
        key: [B, H or fewer, T, D].
        value: as key.
        attention_mask: none; documents are known by their positions.
        scaling: of the scores.
        dropout: none; the kernel has no dropout.
        position_ids: int64 [1 or B, T].
        sliding_window: how many tokens a token sees, itself included.
        **others: what else a layer passes; what would change the scores is refused.

    Returns:
        [B, T, H, D], and no weights.

    Raises:
        BadInputError: the layer asks for what the kernel cannot do.
    """
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
    ]
    unknown += ["dropout"] if dropout else []
    unknown += ["a mask"] if attention_mask is not None else []
    unknown += ["no position_ids"] if position_ids is None else []
    if unknown:
        raise BadInputError(
            f"attention='varlen': {type(module).__name__} asks for {', '.join(unknown)}, which "
            "variable-length attention does not have; use attention='sdpa' or 'eager'."
        )
    assert position_ids is not None
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave query and key in float32 there, and the kernel takes neither.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    rows, heads, length, _ = query.shape
    bounds, longest = document_bounds(position_ids.expand(rows, length))
    shared = heads // key.shape[1]  # torch 2.11's kernel has no grouped heads
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    attend = _attend_by_kernel if query.device.type != "cpu" else _attend_one_by_one
    window = -1 if sliding_window is None else sliding_window - 1
    causal = bool(getattr(module, "is_causal", True))
    found = attend(query, key, value, bounds, longest, scale=scaling, window=window, causal=causal)
    return found.view(rows, length, heads, found.shape[-1]), None


def _attend_by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: int,
    causal: bool,
) -> Tensor:
    """Attend with torch's kernel: [B * T, H, D], half precision, on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    found: Tensor = varlen_attn(  # type: ignore[assignment] # two tensors only if asked for
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(window, 0 if causal else window),
    )
    return found


def _attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,  # noqa: ARG001 - the kernel's argument
    *,
    scale: float | None,
    window: int,
    causal: bool,
) -> Tensor:
    """Attend where torch has no kernel for it: each document through SDPA by itself."""
    documents = []
    sizes = bounds.diff().tolist()
    split = [torch.split(each, sizes) for each in (query, key, value)]
    for q, k, v in zip(*split, strict=True):
        mask = None
        if 0 <= window < len(q) - 1:
            place = torch.arange(len(q), device=q.device)
            behind = place[:, None] - place
            mask = (behind <= window) & (behind >= (0 if causal else -window))
        found = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
        )
        documents.append(found[0].transpose(0, 1))
    return torch.cat(documents)


@torch.no_grad()
def _probe(model: Any, keywords: frozenset[str]) -> Tensor:
    """Return the logits of a row of documents of several lengths, [1, T, V]."""
    device = next(model.parameters()).device
    lengths = (1, 7, 12, 4)
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = {
        "input_ids": torch.arange(len(positions), device=device)[None] % 23,
        "position_ids": positions[None].to(device),
        "attention_mask": None,
        "use_cache": False,
    }
    training = model.training
    model.eval()
    output = model(**{name: value for name, value in inputs.items() if name in keywords})
    model.train(training)
    logits: Tensor = output.logits.float()
    return logits
