"""Orthogonal subspace fine-tuning: learn in the directions that a weight uses least.

The singular value decomposition splits a weight: W = U_high S_high V_high^T + U_low S_low V_low^T.
The high part, which carries what the model knows, is frozen. The low part is trained, and its
vectors stay orthogonal to the high part's, so that an input in the span of V_high gives the output
that it always gave ("Sculpting Subspaces", https://arxiv.org/abs/2504.07097).

Two projections keep that so. Gradients are projected before the optimizer step. Parameters are
projected after it, since an optimizer's update is not its gradient: AdamW divides each element by
another number, and every step rounds.

The vectors are the columns of both factors, U [out, rank] and V [in, rank], and FSDP2 shards rows:
one formula projects either of them, sharded or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from pytest_ranks.reference.orthogonal_targets import find_targets, is_stored_transposed, replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from pytest_ranks.reference.parallel import World

FACTORS = ("u_high", "s_high", "v_high", "u_low", "s_low", "v_low")
"""The names of an `OrthogonalLinear`'s parameters that stand for its weight."""


class OrthogonalLinear(nn.Module):
    """A linear layer whose weight is a frozen high part and a trained low part.

    A part of rank 0 has no parameters. The bias, if there is one, is trained as ever.
    """

    u_high: nn.Parameter | None
    s_high: nn.Parameter
    v_high: nn.Parameter
    u_low: nn.Parameter | None
    s_low: nn.Parameter
    v_low: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, *, rank: int) -> None:
        """Make the layer, its factors still zero.

        Args:
            linear: a `torch.nn.Linear` or transformers' `Conv1D`.
            rank: how many singular directions are trained; the others are frozen.
        """
        super().__init__()
        weight = linear.get_parameter("weight").detach()
        self.transposed = is_stored_transposed(linear)
        rows, columns = reversed(weight.shape) if self.transposed else weight.shape
        ranks = {"high": min(rows, columns) - rank, "low": rank}
        for part, count in ranks.items():
            shapes = {"u": (rows, count), "s": (count,), "v": (columns, count)}
            for factor, shape in shapes.items():
                empty = nn.Parameter(weight.new_zeros(shape), requires_grad=part == "low")
                self.register_parameter(f"{factor}_{part}", empty if count else None)
        self.register_parameter("bias", getattr(linear, "bias", None))

    def factors(self) -> dict[str, nn.Parameter]:
        """Return the parameters that stand for the weight, by name."""
        named = {name: getattr(self, name) for name in FACTORS}
        return {name: factor for name, factor in named.items() if factor is not None}

    @property
    def weight(self) -> Tensor:
        """The weight that the factors stand for, as the layer that was replaced stored it."""
        return join_weight(self.factors(), transposed=self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, [..., in] -> [..., out], without making W."""
        parts = [
            ((x @ v) * s) @ u.mT
            for u, s, v in (
                (self.u_high, self.s_high, self.v_high),
                (self.u_low, self.s_low, self.v_low),
            )
            if u is not None
        ]
        out = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def split_weight(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Split a weight; the two parts add up to it.

    The decomposition is made in float64. The signs of singular vectors, and the vectors that belong
    to equal singular values, are not unique; any choice serves.

    Args:
        weight: [out, in].
        rank: how many of the smallest singular directions make the low part.

    Returns:
        The six factors by name: u_* [out, r], s_* [r], v_* [in, r], in the weight's dtype.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    high = len(s) - rank
    factors = {"u": u, "s": s, "v": vh.mT}
    return {
        f"{name}_{part}": factor[..., kept].to(weight.dtype).contiguous()
        for part, kept in (("high", slice(None, high)), ("low", slice(high, None)))
        for name, factor in factors.items()
    }


def join_weight(factors: Mapping[str, Tensor], *, transposed: bool = False) -> Tensor:
    """Return the weight that the factors of a high and a low part stand for.

    Args:
        factors: by name; a part that is missing counts as zero.
        transposed: return [in, out] in place of [out, in].
    """
    parts = [
        (factors[f"u_{part}"] * factors[f"s_{part}"]) @ factors[f"v_{part}"].mT
        for part in ("high", "low")
        if f"u_{part}" in factors
    ]
    weight = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return weight.mT if transposed else weight


def low_rank(shape: Sequence[int], rank_ratio: float) -> int:
    """Return how many singular directions of a matrix are trained.

    A ratio between 0 and 1 trains and freezes at least one each, where the matrix has two.
    """
    full = min(shape)
    rank = round(rank_ratio * full)
    if 0 < rank_ratio < 1 and full > 1:
        rank = min(max(rank, 1), full - 1)
    return rank


def split_model(
    model: nn.Module,
    *,
    rank_ratio: float,
    patterns: Sequence[str] | None,
    world: World,
    decompose: bool = True,
) -> list[str]:
    """Replace the model's linear layers by split ones; a collective, before anything is sharded.

    Rank 0's weights are decomposed, each on one rank; the ranks share the work and then tell each
    other the factors, so that all have the same.

    Args:
        model: on its device, whole.
        rank_ratio: the share of singular directions that is trained, 0 to 1.
        patterns: which layers, see `find_targets`.
        world: the ranks.
        decompose: False leaves the factors zero, for a checkpoint to fill.

    Returns:
        The names of the layers that were replaced.

    Raises:
        BadInputError: there is no such layer, or one that cannot be split.
    """
    targets = find_targets(model, patterns)
    if decompose and world.size > 1:
        for linear in targets.values():
            dist.broadcast(linear.get_parameter("weight").detach(), src=0)
    made = []
    for number, linear in enumerate(targets.values()):
        weight = linear.get_parameter("weight").detach()
        split = OrthogonalLinear(linear, rank=low_rank(weight.shape, rank_ratio))
        made.append(split)
        if decompose and number % world.size == world.rank:
            plain = weight.mT if split.transposed else weight
            rank = low_rank(weight.shape, rank_ratio)
            values = split_weight(plain, rank)
            for name, factor in split.factors().items():
                factor.data.copy_(values[name])
        replace(model, linear, split)
    if decompose and world.size > 1:
        for number, split in enumerate(made):
            for factor in split.factors().values():
                dist.broadcast(factor.detach(), src=number % world.size)
    return list(targets)


def split_layers(model: nn.Module) -> Iterator[tuple[str, OrthogonalLinear]]:
    """Return the model's split layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, OrthogonalLinear):
            yield name, module


@torch.no_grad()
def project_gradients(model: nn.Module) -> None:
    """Take out of each gradient what lies in the high subspace (a collective under FSDP2)."""
    for basis, low in _pairs(model):
        if low.grad is not None:
            project_out(basis, low.grad)


@torch.no_grad()
def project_parameters(model: nn.Module) -> None:
    """Take out of each low factor what lies in the high subspace (a collective under FSDP2)."""
    for basis, low in _pairs(model):
        project_out(basis, low.detach())


def project_out(basis: Tensor, vectors: Tensor) -> None:
    """Make columns orthogonal to the basis's, in place.

    Where rows are sharded, each rank's rows give a part of every inner product: the parts are added
    up over the ranks before anything is taken away.

    Args:
        basis: orthonormal columns, [rows, r].
        vectors: [rows, k]; sharded like the basis, or neither is.
    """
    overlap = basis.mT @ vectors
    if isinstance(overlap, DTensor):
        everywhere = [Replicate()] * overlap.device_mesh.ndim
        overlap = overlap.redistribute(placements=everywhere)
    vectors.sub_(basis @ overlap)


def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state with every split weight put together again, under its old name.

    Args:
        model: with split layers, or without.
        state: its whole tensors by name; the sum is made in float64 and rounded once.
    """
    plain = dict(state)
    for layer_name, layer in split_layers(model):
        held = {name: plain.pop(f"{layer_name}.{name}") for name in layer.factors()}
        dtype = next(iter(held.values())).dtype
        exact = {name: factor.double() for name, factor in held.items()}
        weight = join_weight(exact, transposed=layer.transposed).to(dtype).contiguous()
        plain[f"{layer_name}.weight"] = weight
    return plain


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """Return each low factor that is a set of vectors, with the high vectors that it must avoid."""
    for _, layer in split_layers(model):
        if layer.u_high is not None and layer.u_low is not None:
            yield layer.u_high.detach(), layer.u_low
            yield layer.v_high.detach(), layer.v_low
