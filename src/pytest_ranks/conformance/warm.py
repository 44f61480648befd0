"""Tables that a library builds at its first use, so that ranks are forked with them: ask for `conversions`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Build what is asked for; a library that has no such table has nothing to build."""
    if name != "conversions":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        # transformers 5 compiles 889 patterns at a process's first from_pretrained: 0.1 to 0.4 s a rank.
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return None
    return get_checkpoint_conversion_mapping("llama")
