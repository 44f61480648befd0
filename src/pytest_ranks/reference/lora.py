"""LoRA through peft: small matrices beside frozen weights are what is trained.

The adapters are put into the model in place (`peft.inject_adapter_in_model`): it keeps its class,
its forward and its blocks, so that sharding, recomputing and packing go on as without.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import export
from pytest_ranks.reference.blocks import parameter_owners

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.parallel import World

ADAPTER = "default"
"""peft's name of the only adapter."""


def add_adapters(model: nn.Module, config: TrainConfig) -> Any:
    """Put adapters beside a model's linear layers and freeze everything else.

    A is drawn from `config.seed` alone, so that every world trains the same adapter; B is zero, so
    that the first loss is the base model's.

    Returns:
        peft's LoraConfig, with the targets resolved to names.

    Raises:
        BadInputError: peft is missing, or the targets are not there, not linear layers or tied to
            another layer while they are to be merged.
    """
    try:
        import peft
    except ImportError as error:
        raise BadInputError(
            f"lora_rank={config.lora_rank!r} needs peft ({error}); "
            "install it with: pip install 'pytest-ranks[lora]'"
        ) from error
    rank: Any = config.lora_rank
    alpha: Any = 2 * rank if config.lora_alpha is None else config.lora_alpha
    targets = list(config.lora_targets or linear_layers(model))
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=config.lora_dropout,
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(model, "name_or_path", None) or None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # It finds out by itself that GPT-2 stores its matrices the other way round.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(config.seed)
        try:
            peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
        except ValueError as error:
            named = {
                name.rpartition(".")[2] for name, part in model.named_modules() if _linear(part)
            }
            raise BadInputError(
                f"lora_targets={config.lora_targets!r}: {str(error).splitlines()[0]} The linear "
                f"layers of {type(model).__name__} are {', '.join(sorted(named))}."
            ) from error
    owners = parameter_owners(model)
    for name, layer in adapted_layers(model).items():
        if config.lora_export == "merged" and len(owners[id(layer.base_layer.weight)]) > 1:
            raise BadInputError(
                f"lora_targets={config.lora_targets!r}: the weight of {name!r} is shared with another "
                "layer, which merging would change too; leave it out, or use lora_export='adapter'."
            )
        if not _linear(layer.base_layer):
            raise BadInputError(
                f"lora_targets={config.lora_targets!r}: {name!r} is a "
                f"{type(layer.base_layer).__name__}; adapters go beside linear layers only."
            )
    return settings


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of a model's linear layers, its head left out.

    peft's own "all-linear" also wraps the fused experts of mixtures, which are no layers.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [n for n, part in model.named_modules() if _linear(part) and part is not head]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by the name of the layer they stand for."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is trained and not the base model's."""
    return ".lora_A." in name or ".lora_B." in name


def merged_state(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the base model's state with what the adapters learnt added in (a collective)."""
    state = export.consolidated_state(model)
    for name, layer in adapted_layers(model).items():
        a = state.pop(f"{name}.lora_A.{ADAPTER}.weight")
        b = state.pop(f"{name}.lora_B.{ADAPTER}.weight")
        learnt = layer.scaling[ADAPTER] * (b @ a)
        base = state.pop(f"{name}.base_layer.weight")
        state[f"{name}.weight"] = base + (learnt.T if layer.fan_in_fan_out else learnt)
        bias = state.pop(f"{name}.base_layer.bias", None)
        if bias is not None:
            state[f"{name}.bias"] = bias
    if dtype is None:
        return state
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def save_adapter(model: nn.Module, directory: Path, *, settings: Any, world: World) -> Path:
    """Write the adapter alone, as `PeftModel.from_pretrained` loads it (a collective)."""
    from safetensors.torch import save_file

    whole = export.consolidated_state(model)
    named = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for name, value in whole.items()
        if is_adapter(name)
    }
    if world.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        settings.inference_mode = True
        settings.save_pretrained(str(directory))
    world.barrier()
    return directory


def _linear(part: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, torch.nn.Linear | Conv1D)
