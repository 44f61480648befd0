"""The order in which samples are drawn: the same on every rank, another one each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def epoch_order(size: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """Return the indices `0 .. size - 1` in the order of one epoch.

    The order depends on `seed + epoch` and on nothing else: not on the rank (ranks take their
    parts of one common order) and not on the global random state (a resumed run finds it again).
    """
    if not shuffle:
        return list(range(size))
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(size, generator=generator).tolist()


class EpochSampler:
    """Yield each index once; `set_epoch` chooses the pass.

    A loop that forgets `set_epoch` trains on the same order every epoch
    (https://github.com/huggingface/transformers/issues/4398).
    """

    def __init__(self, size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.size, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle))

    def __len__(self) -> int:
        return self.size


class InfiniteSampler:
    """Yield epoch after epoch without an end, for runs that count steps alone.

    It has no length on purpose: nothing that never ends should claim one.
    """

    def __init__(self, size: int, *, seed: int = 0, shuffle: bool = True, start: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.start = start
        """How many draws of the whole run to leave out: the cursor of a resumed run."""

    def __iter__(self) -> Iterator[int]:
        epoch, skipped = divmod(self.start, self.size) if self.size else (0, 0)
        while self.size:
            order = epoch_order(self.size, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            yield from order[skipped:]
            epoch, skipped = epoch + 1, 0
