"""Samples held out for evaluation: drawn once, by the seed alone, and never trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.packing import sample_number
from pytest_ranks.reference.records import check_sample, count_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.reference.data import Samples

# Added to the seed, so that who is held out and the order of epoch 0 are drawn apart.
OWN_SEED = 0x5EED


class Part:
    """Some of the samples, with what is known of them: lengths, counts and names."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        self._samples = samples

    def __getattr__(self, name: str) -> Any:
        """Return what the samples know, when it is asked for: blocks read all documents to count."""
        if name not in ("lengths", "counted", "fingerprint"):
            raise AttributeError(name)
        known = getattr(self._samples, name)
        return known if name == "fingerprint" else [known[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        return self._samples[self.indices[index]]

    def name(self, index: int) -> str:
        """Return what messages call a sample: what the whole calls it."""
        naming = getattr(self._samples, "name", sample_number)
        return str(naming(self.indices[index]))


def split(samples: Samples, share: float, *, seed: int) -> tuple[Part, Part]:
    """Split the samples into those to train on and those to evaluate on.

    Args:
        samples: all of them.
        share: of the samples to hold out, rounded to whole samples, at least one.
        seed: with the number of samples, it alone decides; every rank and every resumed run
            finds the same parts.

    Returns:
        The two parts, each in the order of the samples.

    Raises:
        BadInputError: nothing would be left to train on, or one part has no trained token.
    """
    size = len(samples)
    held = max(1, math.floor(size * share + 0.5))
    if held >= size:
        raise BadInputError(
            f"validation_split={share!r} of {size} samples leaves none to train on; "
            "give more samples or a smaller share."
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + OWN_SEED)).tolist()
    parts = Part(samples, sorted(order[held:])), Part(samples, sorted(order[:held]))
    for part, purpose in zip(parts, ("train", "evaluate"), strict=True):
        drawn = (check_sample(part[index], where=part.name(index)) for index in range(len(part)))
        if not any(map(count_targets, drawn)):  # most often the first one ends this
            raise BadInputError(
                f"validation_split={share!r} leaves {len(part)} samples to {purpose} on, none of "
                "which has a label other than -100 behind its first; use another share or seed."
            )
    return parts
