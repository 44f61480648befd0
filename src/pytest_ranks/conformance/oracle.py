"""The float64, single-process answer that checks compare with.

Shape letters: T positions of one sample, V vocabulary, D hidden size, H query heads, K key/value
heads, C head size.

The model is written out here and not taken from the library under test: transformers' RMSNorm
computes in float32 whatever its input, so a "float64" run of it has float32 islands. Samples are
run one by one, without padding or packing; that is what batching must be equal to.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu, softmax

from pytest_ranks.models.corpora import IGNORE, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Weights = dict[str, Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: for tensors of this size more of them only wait for each other.

    On two busy cores the same check took twenty times the processor time with two threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rotary(x_THC: Tensor, *, theta: float) -> Tensor:
    """Rotate pairs (i, i + C/2) of each head by position (RoPE, arXiv 2104.09864, in Llama's layout)."""
    length, _, size = x_THC.shape
    inverse = theta ** -(torch.arange(0, size, 2, dtype=x_THC.dtype) / size)
    angles = torch.outer(torch.arange(length, dtype=x_THC.dtype), inverse)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    first, second = x_THC.chunk(2, dim=-1)
    return x_THC * cos + torch.cat((-second, first), dim=-1) * sin


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scale rows to a root mean square of 1 (arXiv 1910.07467)."""
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama_logits(weights: Mapping[str, Tensor], config: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits of one sample.

    Args:
        weights: parameters by their transformers names, all of one dtype.
        config: a `LlamaConfig` (dense, without biases or RoPE scaling).
        ids: the sample's token ids.

    Returns:
        [T, V], in the weights' dtype.
    """
    embedding = weights["model.embed_tokens.weight"]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    x = embedding[torch.tensor(list(ids))]
    length = len(ids)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for index in range(config.num_hidden_layers):
        w = {name: weights[f"model.layers.{index}.{name}.weight"] for name in _LAYER}
        h = rms_norm(x, w["input_layernorm"], eps=eps)
        q = rotary((h @ w["self_attn.q_proj"].T).view(length, heads, size), theta=theta)
        k = rotary((h @ w["self_attn.k_proj"].T).view(length, kv_heads, size), theta=theta)
        v = (h @ w["self_attn.v_proj"].T).view(length, kv_heads, size)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhc,khc->hqk", q, k) / size**0.5
        attention = softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        mixed = torch.einsum("hqk,khc->qhc", attention, v).reshape(length, heads * size)
        x = x + mixed @ w["self_attn.o_proj"].T
        h = rms_norm(x, w["post_attention_layernorm"], eps=eps)
        x = x + (silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return (
        rms_norm(x, weights["model.norm.weight"], eps=eps)
        @ weights.get("lm_head.weight", embedding).T
    )


_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def sample_loss_sum(
    weights: Mapping[str, Tensor], config: Any, sample: Sample
) -> tuple[Tensor, int]:
    """Return the sum of a sample's token cross entropies, and how many tokens were counted."""
    targets = torch.tensor(sample["labels"][1:])
    logits = llama_logits(weights, config, sample["input_ids"])[:-1]
    return cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), int(
        (targets != IGNORE).sum()
    )


def summed_gradient(weights: Mapping[str, Tensor], config: Any, sample: Sample) -> Weights:
    """Return the float64 gradient of the sum of a sample's token cross entropies; zero without targets."""
    leaves = {name: value.double().clone().requires_grad_() for name, value in weights.items()}
    total, _ = sample_loss_sum(leaves, config, sample)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad.nan_to_num()
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def gradient(
    weights: Mapping[str, Tensor], config: Any, batch: Iterable[Sample], *, weighting: str = "token"
) -> tuple[Weights, float]:
    """Return the gradient of a global batch's loss, and the loss.

    Args:
        weights: parameters by name; computed in float64.
        config: the model's configuration.
        batch: the samples of the step, with multiplicity.
        weighting: "token" (the mean over all counted tokens) or "sequence" (the mean over samples
            of their means).

    Returns:
        The gradient by name (float64) and the loss.
    """
    leaves = {name: value.double().clone().requires_grad_() for name, value in weights.items()}
    parts = [sample_loss_sum(leaves, config, sample) for sample in batch]
    if weighting == "sequence":
        counted = [(loss / count) for loss, count in parts if count]
        total = torch.stack(counted).mean()
    else:
        total = torch.stack([loss for loss, _ in parts]).sum() / sum(count for _, count in parts)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {
        n: torch.zeros_like(w) if g is None else g
        for (n, w), g in zip(leaves.items(), grads, strict=True)
    }
    return named, float(total.detach())


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all tensors together."""
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Weights:
    """Return `after - before` in float64, for the names of `before`.

    Raises:
        KeyError: naming a parameter that `after` lacks.
    """
    return {name: after[name].double() - value.double() for name, value in before.items()}


def relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return `|found - wanted| / |wanted|` over all tensors together."""
    return norm(
        {name: found[name].double() - value.double() for name, value in wanted.items()}
    ) / norm(wanted)


def tensor_errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each tensor.

    A tensor whose wanted norm is below 1e-3 of the largest is measured against that, so that noise
    has no say.
    """
    floor = 1e-3 * max(float(value.norm()) for value in wanted.values())
    return {
        name: float((found[name].double() - value.double()).norm())
        / max(float(value.norm()), floor)
        for name, value in wanted.items()
    }


def worst_tensor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the name and relative error of the tensor that is furthest from what it should be."""
    errors = tensor_errors(found, wanted)
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


def best_factor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the factor f that makes `found` nearest to `f * wanted`, and the relative error left."""
    dot = sum(
        float((found[name].double() * value.double()).sum()) for name, value in wanted.items()
    )
    factor = dot / norm(wanted) ** 2
    left = norm(
        {name: found[name].double() - factor * value.double() for name, value in wanted.items()}
    )
    return factor, left / max(norm(found), 1e-300)


def multiset(indices: Iterable[int]) -> dict[int, int]:
    """Return how often each index occurs."""
    return dict(Counter(indices))
