"""Liger's Triton kernels in one model: RMSNorm, SwiGLU and GeGLU, RoPE, and the loss.

liger-kernel's own `apply_liger_kernel_to_*` functions change the modelling module of transformers
and, for the loss, `torch.nn.functional.cross_entropy`, also where they are given a model: every
other model of the process then computes something else. Here only instances change: a layer gets
a `forward` of its own, and that only after it gave what the plain one gives.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.loss import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Forward = Callable[..., Any]

AGREES = 1e-3
"""Relative difference up to which a kernel computes what the layer does: on GPUs torch may multiply
float32 matrices in TF32, which has 10 bits of mantissa."""

ROPE = "apply_rotary_pos_emb"
"""What transformers calls the function that every attention with Llama's RoPE uses."""

INSTALL = "install it with: pip install 'pytest-ranks[liger]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Which layers compute with Liger's kernels, and which were left as they are.

    Attributes:
        used: how many layers, by kernel: "rms_norm", "swiglu", "geglu", "rope".
        left: why layers for which there is a kernel stay plain, by kernel.
    """

    used: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        used = ", ".join(f"{name} in {count} layers" for name, count in self.used.items())
        left = "".join(f"; {name} left plain: {reason}" for name, reason in self.left.items())
        return f"Liger kernels: {used or 'no layer'}, and the loss{left}"


def functions() -> Any:
    """Return liger-kernel's functions; imported where they are needed, since triton comes along."""
    return importlib.import_module("liger_kernel.transformers.functional")


def check_available(device: torch.device, *, precision: str = "fp32") -> None:
    """Refuse to go on where the kernels cannot run, found by running one.

    Args:
        device: where they would.
        precision: what the run computes in.

    Raises:
        BadInputError: the package is missing, or there is neither a GPU nor Triton's interpreter,
            which reads the bits of bfloat16 as whole numbers.
    """
    try:
        functions()
    except ImportError as error:
        raise BadInputError(
            f"liger=True cannot import liger-kernel ({error}); {INSTALL}"
        ) from error
    logits = torch.zeros(1, 2, 2, device=device)
    try:
        shifted_cross_entropy_sum(logits, torch.zeros(1, 2, dtype=torch.int64, device=device))
    except Exception as error:
        if device.type != "cpu":
            raise
        raise BadInputError(
            f"liger=True needs a GPU, found device={device.type!r}; on the CPU the kernels run in "
            "Triton's interpreter, slowly and not all of them: set TRITON_INTERPRET=1 before the "
            f"process starts ({type(error).__name__})."
        ) from error
    if device.type == "cpu" and precision == "bf16":
        raise BadInputError(
            "liger=True with precision='bf16' needs a GPU, found device='cpu': Triton's interpreter "
            "computes nonsense in bfloat16; use precision='fp32' there."
        )


def apply_kernels(model: nn.Module) -> KernelReport:
    """Let the model's layers compute with Liger's kernels; no other model is touched.

    A layer is recognised by what it is made of, and its kernel must give what the layer gives on
    random input: an RMSNorm that adds 1 to its weight, an MLP with another activation or a RoPE
    of another layout is found out. In Triton's interpreter a kernel that does not run there leaves
    its layers plain; on a GPU its error is raised.

    Args:
        model: on its device, not yet split, wrapped or sharded; in place.
    """
    report = KernelReport()
    for module in model.modules():
        candidates = _candidates(module)
        reasons = {}
        for name, forward, trial in candidates:
            reason = _reason_against(module, forward, trial)
            if reason is None:
                module.forward = MethodType(forward, module)
                report.used[name] = report.used.get(name, 0) + 1
                break
            reasons[name] = reason
        else:
            report.left.update(reasons)
    return report


def shifted_cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross entropy of each next token, as `loss.shifted_cross_entropy_sum` does.

    The kernel is given float32: what it is given in bfloat16 it adds up in bfloat16 (its `loss_1d`
    takes the input's dtype). It writes the gradient over its input: where one row of float32 is
    given, that is the logits themselves.

    Args:
        logits: [B, T, V], any float dtype; position t predicts token t + 1.
        labels: int64 [B, T], unshifted, `IGNORED` where nothing is trained.

    Returns:
        float32 scalar.
    """
    predictions = logits[:, :-1].float().flatten(0, 1).contiguous()
    targets = labels[:, 1:].flatten()
    total: Tensor = functions().liger_cross_entropy(
        predictions, targets, ignore_index=IGNORED, reduction="sum"
    )
    return total


def _candidates(module: nn.Module) -> list[tuple[str, Forward, Callable[[Forward], Tensor]]]:
    """Return a layer's possible kernels: name, a `forward` that uses it, a trial of a `forward`."""
    if type(module).__name__.endswith("RMSNorm"):
        return [("rms_norm", _norm(offset, casting), _try_on_hidden(module, "weight"))
                for offset, casting in ((0.0, "llama"), (1.0, "gemma"))]  # fmt: skip
    if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj")):
        trial = _try_on_hidden(module, "gate_proj.weight")
        return [("swiglu", _gated("liger_swiglu"), trial), ("geglu", _gated("liger_geglu"), trial)]
    plain = inspect.unwrap(type(module).forward)
    if isinstance(plain, FunctionType) and ROPE in plain.__code__.co_names:
        return [("rope", _rotating(plain), _try_rope(module))]
    return []


def _norm(offset: float, casting: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Any:
        eps = getattr(self, "variance_epsilon", None) or getattr(self, "eps", None)
        return functions().liger_rms_norm(hidden_states, self.weight, eps, offset, casting, False)

    return forward


def _gated(kernel: str) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        return self.down_proj(getattr(functions(), kernel)(self.gate_proj(x), self.up_proj(x)))

    return forward


def _rotating(plain: FunctionType) -> Forward:
    """Return the attention's own forward, which finds Liger's function where RoPE's was."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return functions().liger_rope(q, k, cos, sin, None, unsqueeze_dim)

    names = {**plain.__globals__, ROPE: rotate}
    made = FunctionType(
        plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__
    )
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


def _try_on_hidden(module: nn.Module, weight: str) -> Callable[[Forward], Tensor]:
    """Return a trial that calls a forward with hidden states, as wide as a weight's last side."""
    owner, _, name = weight.rpartition(".")
    like: Tensor = getattr(module.get_submodule(owner), name)

    def trial(forward: Forward) -> Tensor:
        x = torch.linspace(-2, 2, 2 * like.shape[-1], device=like.device, dtype=like.dtype)
        result: Tensor = forward(module, x.reshape(1, 2, -1).clone())
        return result

    return trial


def _try_rope(module: nn.Module) -> Callable[[Forward], Tensor]:
    """Return a trial that calls the RoPE function which an attention's forward finds."""
    weight = next(module.parameters())
    width = int(getattr(module, "head_dim", 0)) or 2

    def trial(forward: Any) -> Tensor:
        made = torch.linspace(-2, 2, 5 * 3 * width, device=weight.device).reshape(5, 1, 3, width)
        angles = torch.cat([made[4, :, :, : width // 2]] * 2, dim=-1)
        q, k = made[:2].transpose(0, 1).clone(), made[2:4].transpose(0, 1).clone()
        rotated = forward.__globals__[ROPE](q, k, angles.cos(), angles.sin())
        return torch.cat([part.flatten() for part in rotated])

    return trial


@torch.no_grad()
def _reason_against(
    module: nn.Module, forward: Forward, trial: Callable[[Forward], Tensor]
) -> str | None:
    """Try a kernel beside the layer's own forward; return why it cannot take its place."""
    was_training = module.training
    module.eval()  # dropout, which adapters may have, would draw another mask for each
    want = trial(inspect.unwrap(type(module).forward))
    try:
        found = trial(forward)
    except Exception as error:
        if want.device.type != "cpu":
            raise
        first = str(error).splitlines()[0] if str(error) else ""
        return f"its kernel does not run in Triton's interpreter ({type(error).__name__}: {first})"
    finally:
        module.train(was_training)
    difference = (found - want).abs().max() / want.abs().max().clamp(min=1e-12)
    if found.shape != want.shape or not difference <= AGREES:
        return f"its kernel computes something else than {type(module).__name__}"
    return None
