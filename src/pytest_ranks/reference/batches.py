"""From samples to tensors: which samples a step trains on, on which rank, in which rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError
from pytest_ranks.reference import cadence, collate, data, packing, sampling
from pytest_ranks.reference.cadence import Counter
from pytest_ranks.reference.packing import PACKERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from pytest_ranks.reference.cadence import Progress
    from pytest_ranks.reference.collate import MicroBatch, Row
    from pytest_ranks.reference.config import TrainConfig
    from pytest_ranks.reference.data import Sample, Samples
    from pytest_ranks.reference.parallel import World

    RankRows = list[list[int]]
    """The rows of one rank in one micro-batch; a row is the indices of its documents."""
    BatchPlan = list[list[RankRows]]
    """A global batch: for each micro-batch, for each rank, its rows. Equal on all ranks."""


class BatchSteps:
    """The steps of `Trainer` that make batches; each can be overridden there."""

    config: TrainConfig
    world: World
    model: nn.Module
    samples: Samples
    keywords: frozenset[str]
    pad_id: int
    global_batch: int
    progress: Progress
    stopping: bool
    steps_taken = Counter("step", "optimizer steps taken")
    epoch = Counter("epoch", "passes over the samples that are complete")
    cursor = Counter("cursor", "samples of this epoch that are already trained")
    tokens_trained = Counter("tokens", "trained tokens of the whole run")
    samples_trained = Counter("samples", "samples of the whole run")

    # ---- which samples, when ----------------------------------------------------------------

    def windows(self) -> Iterator[tuple[list[int], bool]]:
        """Yield each global batch, and whether it is its epoch's last, to the end of the run.

        The cursor moves before the yield: it is what a checkpoint after this step holds.
        """
        while not (self.stopping or self.finished()):
            tokens = self.tokens_trained if self.cursor == 0 else -1
            order = self.order(self.epoch)
            remaining = self.cut(self.skip(order, self.cursor), order)
            for number, window in enumerate(remaining, start=1):
                self.cursor = min(len(order), self.cursor + self.global_batch)
                yield window, number == len(remaining)
                if self.stopping or self.finished():
                    return
            self.check_progress(tokens)
            self.epoch, self.cursor = self.epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """Return the order in which an epoch draws the samples; the same on every rank."""
        sampler = sampling.EpochSampler(
            len(self.samples), seed=self.config.seed, shuffle=self.config.shuffle
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    def skip(self, order: list[int], cursor: int) -> list[int]:
        """Leave out what a resumed epoch has already trained; no sample is read for it."""
        return order[cursor:]

    def cut(self, remaining: list[int], order: list[int]) -> list[list[int]]:
        """Cut an order into global batches."""
        size = self.global_batch
        windows = [remaining[start : start + size] for start in range(0, len(remaining), size)]
        if windows and len(windows[-1]) < size:
            windows[-1] = self.tail(windows[-1], order)
        return [window for window in windows if window]

    def tail(self, window: list[int], order: list[int]) -> list[int]:
        """Return what is trained of an epoch's short last batch; nothing if it is dropped."""
        match self.config.tail:
            case "drop":
                return []
            case "pad":
                missing = self.global_batch - len(window)
                return window + [order[index % len(order)] for index in range(missing)]
            case _:
                return window

    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return cadence.is_finished(self.config, self.progress)

    def check_progress(self, tokens: int) -> None:
        """Refuse to begin another epoch towards a number of tokens after one that had none.

        Raises:
            BadInputError: the run has as many trained tokens as before the epoch.
        """
        if self.config.max_tokens is not None and self.tokens_trained == tokens:
            raise BadInputError(
                f"max_tokens={self.config.max_tokens!r} cannot be reached: an epoch of "
                f"{len(self.samples)} samples trained no token; give labels other than -100."
            )

    def total_steps(self) -> int | None:
        """Count the steps of the whole run, resumed or not; None where that cannot be known.

        A run to `max_tokens` is counted through if the samples have an attribute `counted` (the
        trained tokens of each), as those of `JsonlDataset` do.

        Raises:
            BadInputError: an epoch has no step, so that the run would never end or do nothing.
        """
        order = list(range(len(self.samples)))
        steps_per_epoch = len(self.cut(order, order))
        if steps_per_epoch == 0:
            raise BadInputError(
                f"{len(self.samples)} samples make no global batch of {self.global_batch} with "
                f"tail={self.config.tail!r}; give more samples, smaller batches or tail='partial'."
            )
        if self.config.max_steps is not None:
            return self.config.max_steps
        if self.config.epochs is not None:
            return self.config.epochs * steps_per_epoch
        counted = getattr(self.samples, "counted", None)
        if self.config.max_tokens is None or counted is None:
            return None
        return self.steps_to_tokens(self.config.max_tokens, counted)

    def steps_to_tokens(self, tokens: int, counted: Sequence[int]) -> int:
        """Count the steps in which so many tokens are trained, by walking through the epochs."""
        steps = reached = epoch = 0
        while True:
            before, order = reached, self.order(epoch)
            for window in self.cut(order, order):
                steps, reached = steps + 1, reached + sum(counted[index] for index in window)
                if reached >= tokens:
                    return steps
            epoch += 1
            if reached == before:
                return steps  # and `check_progress` says why the run ends there

    # ---- from samples to tensors ------------------------------------------------------------

    def measure(self, samples: Samples) -> Sequence[int] | None:
        """Return the samples' lengths if packing needs them.

        Raises:
            BadInputError: a sample is too long to be packed.
        """
        capacity = self.config.max_tokens_per_rank or self.config.pack_length
        if capacity is None:
            return None
        return data.measure(samples, capacity)

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        """Lay a global batch out in micro-batches, ranks and rows; the same on every rank."""
        packer, capacity = PACKERS[self.config.packer], self.config.max_tokens_per_rank
        if capacity is not None:
            assert lengths is not None
            plan = packer([lengths[index] for index in window], capacity, self.world.size)
            return [
                [[[window[place] for place in row]] if row else [] for row in ranks]
                for ranks in plan.micro_batches
            ]
        rows = [[index] for index in window]
        if self.config.pack_length is not None:
            assert lengths is not None
            plan = packer([lengths[index] for index in window], self.config.pack_length, 1)
            rows = [[window[place] for place in row] for row in plan.for_rank(0)]
        return packing.deal(rows, self.config.micro_batch, self.world.size)

    def shard(self, plan: BatchPlan) -> list[RankRows]:
        """Keep this rank's part: as many micro-batches as every rank has, some perhaps empty."""
        return [ranks[self.world.rank] for ranks in plan]

    def draw(self, rows: RankRows, samples: Samples) -> list[Row]:
        """Read the samples of one micro-batch."""
        return [[self.sample(index, samples) for index in row] for row in rows]

    def sample(self, index: int, samples: Samples) -> Sample:
        """Read one sample."""
        return data.check_sample(samples[index], where=f"sample {index}")

    def collate(self, rows: list[Row]) -> MicroBatch:
        """Make the tensors of one micro-batch."""
        packed = self.config.packed
        batch = collate.collate(rows, pad_id=self.pad_id, packed=packed, layout=self)
        return batch.to(self.world.device)

    def positions(self, lengths: Sequence[int], width: int) -> list[int]:
        """Count positions from 0 in each document of a row."""
        return collate.restarting_positions(lengths, width)

    def labels(self, row: Row, width: int) -> list[int]:
        """Return a row's labels: no document's first token, no padding."""
        return collate.next_token_labels(row, width)

    def mask(self, lengths: Sequence[int], width: int, *, packed: bool) -> Tensor | None:
        """Return the attention_mask keyword: none for packed rows, else by length."""
        return collate.padding_mask(lengths, width, packed=packed)
