"""A torch `DataLoader` over packed global batches, for loops that are not `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.collate import MaxTokensPerRankCollator
from pytest_ranks.reference.data import measure
from pytest_ranks.reference.packing import PACKERS
from pytest_ranks.reference.sampling import EpochSampler, check_same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_ranks.reference.collate import MicroBatch
    from pytest_ranks.reference.data import Samples


def data_loader(
    samples: Samples,
    *,
    global_batch: int,
    max_tokens_per_rank: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    packer: str = "lpt",
    pad_id: int = 0,
    workers: int = 0,
    overlong: str = "error",
    elastic: bool = False,
) -> StatefulLoader:
    """Load an epoch of global batches, each as this rank's list of packed micro-batches.

    Every rank reads every sample of a global batch, because packing needs all lengths; call
    `loader.sampler.set_epoch(epoch)` before each pass. `Trainer` itself reads only what its rank
    trains on.

    Args:
        samples: what to load; must go through pickle if there are workers.
        global_batch: samples of one optimizer step, over all ranks.
        max_tokens_per_rank: tokens of one rank in one micro-batch.
        rank: this process.
        world_size: how many there are.
        seed: of the order.
        shuffle: another order each epoch.
        packer: "level", "lpt" or "greedy".
        pad_id: the token of the row that a rank without a sample runs.
        workers: loading processes.
        overlong: a sample of more tokens is an "error", is left out with a warning ("drop"), or gets
            its "own" micro-batch.
        elastic: whether a state may be loaded that another number of ranks saved.

    Raises:
        BadInputError: there are no samples, or a sample is too long (before the first batch if the
            samples know their `lengths`, else while iterating).
    """
    if len(samples) == 0:
        raise BadInputError("there are no samples to load.")
    if overlong == "error" and hasattr(samples, "lengths"):
        measure(samples, max_tokens_per_rank)
    collator = MaxTokensPerRankCollator(
        max_tokens_per_rank,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id,
        packer=PACKERS[packer],
        overlong=overlong,
    )
    sampler = EpochSampler(len(samples), seed=seed, shuffle=shuffle)
    return StatefulLoader(
        samples, collator, sampler, global_batch=global_batch, workers=workers, elastic=elastic
    )


class StatefulLoader(DataLoader["list[MicroBatch]"]):
    """Global batches of an epoch, and the place among them at which a resumed run goes on.

    What was handed out counts, not what loading processes have drawn ahead. The order of global batches
    depends on seed and epoch alone, so that the state is a few numbers, equal on all ranks, and holds
    for any number of loading processes; with `elastic` also for any number of ranks: the batches that
    are left are the same, and only their layout is another.
    """

    def __init__(
        self,
        samples: Samples,
        collator: MaxTokensPerRankCollator,
        sampler: EpochSampler,
        *,
        global_batch: int,
        workers: int,
        elastic: bool,
    ) -> None:
        super().__init__(
            samples,  # type: ignore[arg-type]
            batch_size=global_batch,
            sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
        )
        self._order = sampler
        self._data = getattr(samples, "fingerprint", None)
        self._world_size = collator.world_size
        self._global_batch = global_batch
        self._elastic = elastic
        self._place = (0, 0)  # an epoch, and how many of its samples were handed out

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; another one than the present begins at its start."""
        self._order.set_epoch(epoch)

    @property
    def epoch(self) -> int:
        """The pass that the next iteration goes over, or goes on with."""
        return self._order.epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:  # type: ignore[override]
        epoch, done = self.epoch, self._order.start
        self._place = (epoch, done)
        for micro_batches in super().__iter__():
            done = min(done + self._global_batch, self._order.size)
            self._place = (epoch, done)
            yield micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch that was handed out: JSON, equal on all ranks."""
        epoch, done = self._place
        place = {"epoch": self.epoch, "drawn": done if epoch == self.epoch else 0}
        return place | self._settings() | {"world_size": self._world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at the place of a state; the ones after it are whole.

        Raises:
            BadInputError: the state belongs to other data, another order, another global batch, or,
                unless `elastic`, to another number of ranks.
        """
        check_same(state, self._settings(), what="loader")
        if state["world_size"] != self._world_size and not self._elastic:
            raise BadInputError(
                f"the state was saved by a loader for {state['world_size']} ranks, this one is for "
                f"{self._world_size}; give elastic=True if the batches that are left may be laid "
                "out anew."
            )
        self._order.load_state_dict(state)
        self._place = (state["epoch"], state["drawn"])

    def _settings(self) -> dict[str, Any]:
        order = {name: getattr(self._order, name) for name in ("size", "seed", "shuffle")}
        return order | {"global_batch": self._global_batch, "data": self._data}
