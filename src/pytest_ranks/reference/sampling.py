"""The order in which samples are drawn: the same on every rank, another one each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.errors import BadInputError

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


def check_same(state: dict[str, Any], own: dict[str, Any], *, what: str) -> None:
    """Refuse a state that was saved with other settings.

    Args:
        state: what `state_dict` returned.
        own: the settings that have to be equal in it.
        what: how messages call the owner.

    Raises:
        BadInputError: a setting is missing or another.
    """
    for name, value in own.items():
        if name not in state:
            found = ", ".join(map(repr, state)) or "nothing"
            raise BadInputError(
                f"this is no state of a {what}: {name!r} is missing; found {found}."
            )
        if state[name] != value:
            raise BadInputError(
                f"the state was saved by a {what} with {name}={state[name]!r}, this one has "
                f"{name}={value!r}; use the same value, or start anew."
            )


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
        self.drawn = 0
        """How many indices of this epoch were handed out; a loader that draws ahead counts itself."""
        self.start = 0
        """Where the next iteration begins."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration follows, from its start if it is another epoch."""
        if epoch != self.epoch:
            self.epoch, self.drawn, self.start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch and what its order depends on."""
        return {"epoch": self.epoch, "drawn": self.drawn} | self._settings()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration, and only that, begin at the place of a state.

        Raises:
            BadInputError: the state belongs to another order.
        """
        check_same(state, self._settings(), what="sampler")
        self.epoch, self.drawn = state["epoch"], state["drawn"]
        self.start = self.drawn

    def _settings(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.size, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        self.drawn, self.start = self.start, 0
        for index in order[self.drawn :]:
            self.drawn += 1
            yield index

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
        self.drawn = start
        """How many draws of the whole run were made."""

    @property
    def epoch(self) -> int:
        """The pass that the next draw belongs to."""
        return self.drawn // self.size if self.size else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the run and what its order depends on."""
        return {"drawn": self.drawn} | self._settings()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let iterations begin at the place of a state.

        Raises:
            BadInputError: the state belongs to another order.
        """
        check_same(state, self._settings(), what="sampler")
        self.start = self.drawn = state["drawn"]

    def _settings(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def __iter__(self) -> Iterator[int]:
        self.drawn = self.start
        while self.size:
            epoch, skipped = divmod(self.drawn, self.size)
            order = epoch_order(self.size, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            for index in order[skipped:]:
                self.drawn += 1
                yield index
