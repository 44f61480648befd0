"""A small, complete trainer for causal language models, to read and to copy from.

Start in `trainer.py`: `Trainer.train` is the run, `Trainer.train_step` the step. The other modules
hold one subject each, in the order in which a run meets them: `config`, `data`, `sampling`,
`packing`, `collate`, `batches`, `model`, `parallel`, `optimization`, `loss`, `metrics`,
`checkpoint`, `export`; `cli` is the command line.
"""

from __future__ import annotations

from pytest_ranks.reference.config import TrainConfig
from pytest_ranks.reference.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
