"""Tiny models of every transformers family, offline and seeded, with a byte-level tokenizer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_ranks.models.families import causal_lm_families, tiny_model
    from pytest_ranks.models.tokenizers import byte_tokenizer

__all__ = ["byte_tokenizer", "causal_lm_families", "tiny_model"]

# Where each public name lives; looked up on first use: importing this package costs nothing.
_HOMES = {
    "byte_tokenizer": "pytest_ranks.models.tokenizers",
    "causal_lm_families": "pytest_ranks.models.families",
    "tiny_model": "pytest_ranks.models.families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
