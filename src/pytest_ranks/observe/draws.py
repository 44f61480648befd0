"""Samples that use randomness when they are read, as augmentation does, and remember what they drew."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch

Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One reading of a sample.

    Attributes:
        rank: the rank that read it, also when a loader process of the rank did.
        index: the sample.
        value: the number in [0, 1) that torch's default generator gave.
    """

    rank: int
    index: int
    value: float


class Augmented(Sequence[Sample]):
    """A sequence of samples each reading of which draws one number from torch's default generator.

    Readings are appended to a file, so that those of forked loader processes are seen too.

    Args:
        samples: the samples, handed on unchanged.
        path: the file, one for all ranks.
        rank: the reading rank.
    """

    def __init__(self, samples: Sequence[Sample], path: Path, *, rank: int) -> None:
        self._samples = samples
        self._path = path
        self._rank = rank

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        sample = self._samples[index]  # first, so that the end of an iteration draws nothing
        draw = {"rank": self._rank, "index": index % len(self), "value": float(torch.rand(()))}
        line = json.dumps(draw).encode() + b"\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, line)  # one write of less than a page: lines of ranks do not mix
        finally:
            os.close(handle)
        return sample


def read_draws(path: Path) -> list[Draw]:
    """Return the readings in the order in which they were made; none when there is no file."""
    if not path.exists():
        return []
    return [Draw(**json.loads(line)) for line in path.read_text().splitlines()]
