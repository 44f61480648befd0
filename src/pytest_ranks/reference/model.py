"""A model and its tokenizer from a folder; what its forward takes, and whether documents stay apart."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.alignment import align
from pytest_ranks.reference.initialization import empty_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


__all__ = [
    "accepted_keywords",
    "align",
    "float32_masters",
    "keeps_documents_apart",
    "load_model",
    "padding_id",
]

LEAK = 1e-5
"""Relative change of logits that counts as a leak. Seen on tiny models of transformers 5.23: at most
3e-7 without one (mixtures of experts add up in another order), at least 3e-3 with one (Bloom)."""


def load_model(directory: str | Path, *, empty: bool = False) -> tuple[nn.Module, Any]:
    """Load model and tokenizer; parameters are float32 whatever the files hold.

    Args:
        directory: what `save_pretrained` wrote; nothing is downloaded.
        empty: read no parameters; they are shapes on the meta device, to be filled when sharded.

    Returns:
        The model, and the tokenizer or None if the folder has none.

    Raises:
        BadInputError: the folder holds no loadable model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{folder} has no config.json; expected a folder that save_pretrained wrote."
        )
    try:
        if empty:
            model = empty_model(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInputError(_cannot_be_loaded(folder, error)) from error
    return model, load_tokenizer(folder)


def load_tokenizer(directory: str | Path) -> Any:
    """Load the tokenizer that lies beside a model; None if there is none.

    Raises:
        BadInputError: there is one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(directory)
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(_cannot_be_loaded(folder, error)) from error


def _cannot_be_loaded(folder: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{folder} cannot be loaded: {reason}"


def padding_id(model: Any, tokenizer: Any) -> int:
    """Return the token that fills rows: the tokenizer's, else the model's, else 0.

    Any id that the embedding has a row for serves: padding is neither attended to nor trained.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embedding, "weight", None), "shape", [math.inf])[0]
    for owner in (tokenizer, getattr(model, "config", None)):
        found = getattr(owner, "pad_token_id", None)
        if found is not None and 0 <= found < rows:
            return int(found)
    return 0


def accepted_keywords(forward: Callable[..., Any], names: tuple[str, ...]) -> frozenset[str]:
    """Return those of the keywords that a forward can be called with."""
    parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset(names)
    return frozenset(names) & {parameter.name for parameter in parameters}


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, keywords: frozenset[str], *, rows: int = 1) -> bool:
    """Whether packed documents do not see each other: a property of the model, found by trying.

    Two documents share a row; when the first one changes, the logits of the second must stay. Many
    models accept position_ids and let documents leak all the same: state space models, ALiBi,
    positions counted from the mask. With flash-attn transformers looks for documents in batches of
    one row only.

    Args:
        model: on its device, not yet sharded; its mode is put back.
        keywords: those that its forward accepts.
        rows: how many rows of two documents go through one forward.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = []
    for first in (0, 1):
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[first, 1, 0, 1, 0, 1, 0, 1]] * rows, device=device),
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * rows, device=device),
            "attention_mask": None,
            "use_cache": False,
        }
        output = model(**{name: value for name, value in inputs.items() if name in keywords})
        logits.append(output.logits)
    model.train(was_training)
    difference = (logits[0] - logits[1])[:, 4:].abs().max() / logits[0].abs().max()
    return not difference > LEAK  # logits that are all zero have nothing to compare: nan


def float32_masters(model: nn.Module) -> int:
    """Give half-precision parameters float32 values to train.

    A bfloat16 parameter of 1.0 does not move by a step of 1e-3: it has 8 bits of mantissa.

    Returns:
        How many parameters were converted.
    """
    half = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in half:
        parameter.data = parameter.data.float()
    return len(half)
