"""A small, complete trainer for causal language models, to read and to copy from.

Start in `trainer.py`: `Trainer.train` is the run, `Trainer.train_step` the step. The other modules
hold one subject each, in the order in which a run meets them: `config`, `data` (with `lines`,
`records`, `chat` and `pretraining`), `sampling`, `packing`, `collate`, `model`, `parallel`,
`optimization`, `loss`, `metrics`, `trackers`, `checkpoint` and `checkpoint_files`, `export`; the
trainer's own steps are in `batches`, `preparation`, `updates`, `evaluation` and `saving`; when a run
saves and ends is said by `cadence` and `preemption`. `cli` is the command line, `loader` a data
loader for other loops.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]

# Looked up on first use, so that the command line can say what is not installed.
_HOMES = {
    "TrainConfig": "pytest_ranks.reference.config",
    "Trainer": "pytest_ranks.reference.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
