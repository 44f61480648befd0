"""What runs on each rank: the subject's `train` under the spies, and its result as files."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from pytest_ranks.conformance.subject import SubjectRef, Trained, validated
from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.rank_context import current_rank
from pytest_ranks.observe.draws import Augmented
from pytest_ranks.observe.spies import watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.conformance.job import Job
    from pytest_ranks.observe.records import Observed

PARAMETERS = "parameters.safetensors"
HISTORY = "history.json"
DRAWS = "draws.jsonl"


def train_on_rank(
    ref: SubjectRef, jobs: Sequence[Job], folders: Sequence[str]
) -> list[Observed] | str:
    """Train each job in turn in this process; rank 0 writes what came out.

    Args:
        ref: the subject.
        jobs: one after the other, as a process that trains twice would.
        folders: where the results of each go.

    Returns:
        What this rank's spies saw, for each job; or, when the subject returned something else than
        a `Trained`, one sentence about it.
    """
    torch.set_num_threads(1)  # also the fastest for models of this size, and deterministic
    rank = current_rank().index  # a process group may not be there yet: a subject may make its own
    _seed(rank)
    subject = ref.load()()
    observed = []
    for job, folder in zip(jobs, folders, strict=True):
        with watch(_model_class(job), rank=rank) as seen:
            result = subject.train(_augmented(job, Path(folder), rank) if job.augmented else job)
        observed.append(seen)
        if rank == 0:
            try:
                trained = validated(result, ref=str(ref))
            except BadInputError as error:
                return str(error)
            _write(trained, Path(folder), str(ref))
    return observed


def _seed(rank: int) -> None:
    """Give each rank random numbers of its own, as processes that nobody seeds have; a subject may seed them again."""
    random.seed(rank)
    numpy.random.seed(rank)
    torch.manual_seed(rank)


def _augmented(job: Job, folder: Path, rank: int) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(job, samples=Augmented(job.samples, folder / DRAWS, rank=rank))


def _model_class(job: Job) -> type:
    if job.model == "ledger_table":
        from pytest_ranks.models.ledger import LedgerTable

        return LedgerTable
    from transformers import LlamaForCausalLM

    found: type = LlamaForCausalLM
    return found


def _write(trained: Trained, folder: Path, ref: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parameters = (
        _read_model_dir(Path(trained.model_dir))
        if trained.model_dir is not None
        else trained.parameters
    )
    plain: dict[str, Any] = {
        name: value.detach().cpu().contiguous() for name, value in (parameters or {}).items()
    }
    save_file(plain, folder / PARAMETERS, metadata={"subject": ref})
    history = [{key: _plain(value) for key, value in row.items()} for row in trained.history]
    (folder / HISTORY).write_text(json.dumps(history))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _read_model_dir(directory: Path) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        parameters.update(load_file(file))
    return parameters
