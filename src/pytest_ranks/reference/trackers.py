"""Where a run can be watched besides its metrics file: TensorBoard, Weights & Biases, or your own."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_ranks.reference.config import TrainConfig

log = logging.getLogger("pytest_ranks.reference")

Record = dict[str, Any]


class Tracker(Protocol):
    """What rank 0 shows its records to."""

    def log(self, record: Record) -> None:
        """Take a step's record; it may not be changed."""
        ...

    def close(self) -> None:
        """Be done: what was logged is to be kept."""
        ...


class Trackers:
    """Several trackers as one, none of which can end the training.

    One that raises is told once, by the logger `pytest_ranks.reference`, and gets no further record.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, record: Record) -> None:
        """Show a record to all."""
        for tracker in [*self._trackers]:
            self._try(tracker, "log", record)

    def close(self) -> None:
        """Close all."""
        for tracker in [*self._trackers]:
            self._try(tracker, "close")

    def _try(self, tracker: Tracker, action: str, *arguments: Any) -> None:
        try:
            getattr(tracker, action)(*arguments)
        except Exception as error:
            self._trackers.remove(tracker)
            log.warning(
                "%s failed in %s() and gets no further records; training goes on: %s: %s",
                *(type(tracker).__name__, action, type(error).__name__, error),
            )


class TensorBoard:
    """Event files in `out_dir/tensorboard`, a scalar for each number of a record."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        """Begin an event file.

        Args:
            folder: where it goes.
            resumed_at: the step that the run continues from: TensorBoard hides what an interrupted run
                wrote after it.

        """
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, record: Record) -> None:
        """Write each number under its name; a loss that is not finite too."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with files in `out_dir/wandb`.

    Project, mode and key are the environment's (`WANDB_PROJECT`, `WANDB_MODE=offline`, ...). A run that
    goes on in the same folder is the same run there.
    """

    def __init__(self, folder: Path, *, config: Record) -> None:
        """Begin or go on.

        Args:
            folder: where its files go, and its id, in `wandb_id`.
            config: shown beside the run.
        """
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb_id"
        known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        self._run = wandb.init(dir=str(folder), id=known, resume="allow", config=config)
        kept.write_text(self._run.id, encoding="utf-8")

    def log(self, record: Record) -> None:
        """Log each number under its name."""
        self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def numbers(record: Record) -> dict[str, float]:
    """Return a record's numbers, and the throughput that they make."""
    found = {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }
    speed = throughput(record)
    return found if speed is None else found | {"tokens_per_second": speed}


def throughput(record: Record) -> float | None:
    """Return the trained tokens a second, over all ranks; None where that makes no sense."""
    seconds, tokens = record.get("seconds", 0.0), record.get("tokens")
    if tokens is None or not seconds > 0 or not math.isfinite(seconds):
        return None
    return float(tokens / seconds)


def check_installed(config: TrainConfig) -> None:
    """Refuse trackers whose package is missing; on every rank, before one waits for another.

    Raises:
        BadInputError: one is.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise BadInputError(f"{name}=True needs the package {name}: pip install {name}")


def make_trackers(config: TrainConfig, *, resumed_at: int | None) -> list[Tracker]:
    """Return the trackers that the configuration asks for; for rank 0.

    One that cannot begin (no key, no disk) is told and left out.
    """
    assert config.out_dir is not None
    folder = Path(config.out_dir)
    shown = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", resumed_at=resumed_at),
        "wandb": lambda: WeightsAndBiases(folder, config=shown),
    }
    made = []
    for name, make in makers.items():
        try:
            if getattr(config, name):
                made.append(make())
        except Exception as error:
            log.warning(
                "%s could not begin and gets no records; training goes on: %s: %s",
                *(name, type(error).__name__, error),
            )
    return made
