"""A torch `DataLoader` over packed global batches, for loops that are not `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference.collate import MaxTokensPerRankCollator
from pytest_ranks.reference.packing import PACKERS
from pytest_ranks.reference.sampling import EpochSampler

if TYPE_CHECKING:
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
) -> DataLoader[Any]:
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

    Raises:
        BadInputError: there are no samples, or a sample is too long (while iterating).
    """
    if len(samples) == 0:
        raise BadInputError("there are no samples to load.")
    collator = MaxTokensPerRankCollator(
        max_tokens_per_rank,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id,
        packer=PACKERS[packer],
    )
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=global_batch,
        sampler=EpochSampler(len(samples), seed=seed, shuffle=shuffle),
        collate_fn=collator,
        num_workers=workers,
    )
