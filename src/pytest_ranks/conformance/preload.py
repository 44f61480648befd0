"""What ranks need imported before they are forked: each of these costs a fresh process up to seconds."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_ranks.conformance.subject import SubjectRef

PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "torch._dynamo",  # optimizers import it at their first step
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "pytest_ranks.conformance.warm:conversions",
    "pytest_ranks.conformance.rank_side",
    "pytest_ranks.models.ledger",
)


def modules_for(ref: SubjectRef) -> tuple[str, ...]:
    """Return what to import for a subject: `module`, or `module:name` for a name that is made on demand.

    A subject in a package is imported itself. One in a file is not run here: what its file imports
    is, wherever in the file that stands, since adapters import their trainers inside `train`.
    """
    own: tuple[str, ...] = () if ref.file is not None else (ref.module,)
    try:
        file = ref.file or getattr(importlib.util.find_spec(ref.module), "origin", None)
        tree = ast.parse(Path(file or "").read_text())
    except (OSError, SyntaxError, ValueError, ImportError):
        return PRELOAD + own  # the rank will meet the error and say it
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [
                node.module,
                *(f"{node.module}:{alias.name}" for alias in node.names if alias.name != "*"),
            ]
    return PRELOAD + own + tuple(dict.fromkeys(found))
