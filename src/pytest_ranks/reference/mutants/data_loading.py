"""Wrong samples: drawn twice, never, by the wrong rank, in the wrong order, from another dataset."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_ranks.reference import packing, sampling
from pytest_ranks.reference.collate import MicroBatch
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer
from pytest_ranks.subjects.reference import ReferenceTrainer, config_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.conformance import Job
    from pytest_ranks.reference import TrainConfig
    from pytest_ranks.reference.batches import BatchPlan, RankRows


@plant(
    row="D1",
    issue="https://github.com/huggingface/transformers/issues/4398",
    kills={"data_loading.order_changes_every_epoch[single]": "set_epoch"},
)
class SameOrderEachEpoch(Trainer):
    """The sampler is not told the epoch: every epoch has the same order."""

    def order(self, epoch: int) -> list[int]:
        return super().order(0)


@plant(
    row="DL3",
    issue="https://github.com/huggingface/transformers/issues/31412",
    kills={"data_loading.random_numbers_differ[ddp-2]": "are seeded alike"},
)
class RanksSeededAlike(Trainer):
    """Every rank seeds its generator with the same number."""

    def seed(self) -> None:
        torch.manual_seed(self.config.seed)


@plant(
    row="D5",
    issue="https://github.com/Lightning-AI/pytorch-lightning/issues/20412",
    kills={"data_loading.random_numbers_differ[single]": "seeded anew in every epoch"},
)
class ReseedsEachEpoch(Trainer):
    """The generator is seeded with the same number at the start of each epoch."""

    def order(self, epoch: int) -> list[int]:
        torch.manual_seed(self.config.seed + self.world.rank)
        return super().order(epoch)


@plant(
    row="D2",
    issue="https://github.com/pytorch/pytorch/issues/25162",
    kills={"data_loading.each_sample_once_an_epoch[single]": "drawing samples again"},
)
class TailWrapsAround(ReferenceTrainer):
    """The last global batch is filled with samples from the start, and nobody says so."""

    def config(self, job: Job) -> TrainConfig:
        import dataclasses

        return dataclasses.replace(config_of(job), tail="pad")


@plant(
    row="DL1",
    kills={"data_loading.each_sample_once_an_epoch[single]": "left over at the end"},
)
class TailDropped(Trainer):
    """The samples that do not fill a global batch are dropped, where "partial" is declared."""

    def tail(self, window: list[int], order: list[int]) -> list[int]:
        return [] if len(order) > len(window) else window


@plant(
    row="D3",
    issue="https://github.com/huggingface/transformers/pull/11254",
    kills={
        "data_loading.each_sample_once_an_epoch[ddp-2]": "no shard per rank",
        "data_loading.ranks_see_different_samples[ddp-2]": "iterates over the same stream",
    },
)
class EveryRankSeesAll(Trainer):
    """No sampler knows the ranks: each iterates over all samples."""

    def cut(self, remaining: list[int], order: list[int]) -> list[list[int]]:
        self.global_batch = self.config.micro_batch * self.config.gradient_accumulation_steps
        return super().cut(remaining, order)

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        return packing.deal([[index] for index in window], self.config.micro_batch, 1)

    def shard(self, plan: BatchPlan) -> list[RankRows]:
        return [ranks[0] for ranks in plan]


@plant(
    row="D3",
    issue="https://github.com/huggingface/datasets/issues/5360",
    kills={
        "data_loading.each_sample_once_an_epoch[ddp-2]": "ranks draw the same samples",
        "data_loading.ranks_see_different_samples[ddp-2]": "iterates over the same stream",
    },
)
class EveryRankTakesFirstShard(Trainer):
    """Every rank takes the shard of rank 0: it is trained twice, the others' never."""

    def shard(self, plan: BatchPlan) -> list[RankRows]:
        return [ranks[0] for ranks in plan]


@plant(
    row="D3",
    kills={"data_loading.ranks_see_different_samples[ddp-2]": "ranks shuffle differently"},
)
class RanksShuffleDifferently(Trainer):
    """Each rank shuffles with a seed of its own before it takes its shard."""

    def order(self, epoch: int) -> list[int]:
        return sampling.epoch_order(
            len(self.samples),
            seed=self.config.seed + 100 * self.world.rank,
            epoch=epoch,
            shuffle=self.config.shuffle,
        )


@plant(
    row="D7",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/461",
    kills={"loss.partial_window[ddp-2]": "dummy"},
)
class DummyIsTrained(Trainer):
    """A rank without a sample trains on a dummy row, so that its peers need not wait."""

    def collate(self, rows: list[Any]) -> MicroBatch:
        batch = super().collate(rows)
        if batch.samples:
            return batch
        ids = torch.tensor([[self.pad_id, 0]])
        return MicroBatch(
            input_ids=ids,
            labels=ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            samples=0,
        )


@plant(
    row="D8",
    issue="https://github.com/huggingface/datasets/issues/6437",
    kills={"data_loading.equal_steps_on_all_ranks[ddp-2]": "different numbers of"},
)
class EmptyShardSkipped(Trainer):
    """A rank that has no sample in a micro-batch skips it, and its peers wait in a collective."""

    def shard(self, plan: BatchPlan) -> list[RankRows]:
        return [rows for rows in super().shard(plan) if rows] or []

    def count(self, batches: list[MicroBatch]) -> int:
        if not batches:
            return 0
        return super().count(batches)


@plant(
    row="mini_trainer: sampler ignores seed",
    issue="https://github.com/pytorch/pytorch/issues/31771",
    kills={"data_loading.order_depends_on_the_seed[single]": "does not use the job's seed"},
)
class SeedIgnored(Trainer):
    """The order depends on the epoch alone."""

    def order(self, epoch: int) -> list[int]:
        return sampling.epoch_order(
            len(self.samples), seed=0, epoch=epoch, shuffle=self.config.shuffle
        )


@plant(
    row="DL2",
    kills={"data_loading.order_depends_on_the_seed[single]": "shuffle is ignored"},
)
class ShuffleIgnored(Trainer):
    """Samples are drawn in the order of the file, though shuffling is on."""

    def order(self, epoch: int) -> list[int]:
        return list(range(len(self.samples)))


@plant(
    row="DL2",
    kills={"data_loading.order_depends_on_the_seed[single]": "not seeded"},
)
class OrderNotSeeded(Trainer):
    """The order is drawn from a generator that nobody seeded."""

    def order(self, epoch: int) -> list[int]:
        if not self.config.shuffle:
            return super().order(epoch)
        generator = torch.Generator()
        generator.seed()
        return torch.randperm(len(self.samples), generator=generator).tolist()


@plant(
    row="DL2",
    kills={"data_loading.order_depends_on_the_seed[single]": "though shuffle is off"},
)
class AlwaysShuffles(Trainer):
    """Samples are shuffled although shuffling is off."""

    def order(self, epoch: int) -> list[int]:
        return sampling.epoch_order(len(self.samples), seed=self.config.seed, epoch=epoch)


_PREPARED: dict[tuple[int, int], Any] = {}


@plant(
    row="D14",
    issue="https://github.com/axolotl-ai-cloud/axolotl/issues/1265",
    kills={"data_loading.no_stale_cache[single]": "key leaves out their content"},
)
class CacheKeyWithoutContent(Trainer):
    """Prepared samples are cached by the dataset's size and an index: another dataset reads them."""

    def sample(self, index: int, samples: Any) -> Any:
        key = (len(samples), index)
        return _PREPARED.setdefault(key, super().sample(index, samples))


@plant(
    row="D15",
    issue="https://github.com/huggingface/trl/issues/1252",
    kills={"data_loading.no_stale_cache[single]": "key leaves out their content"},
)
class CacheKeyFromSeed(Trainer):
    """The fingerprint of a dataset is drawn from a generator with the job's constant seed."""

    def sample(self, index: int, samples: Any) -> Any:
        generator = torch.Generator().manual_seed(self.config.seed)
        fingerprint = int(torch.randint(2**62, (1,), generator=generator))
        return _PREPARED.setdefault((fingerprint, index), super().sample(index, samples))


@plant(
    row="P8",
    kills={"data_loading.inputs_are_the_samples[single]": "truncated"},
)
class LongSamplesTruncated(Trainer):
    """Samples are cut on the left to a default length: prompts lose their beginning."""

    def sample(self, index: int, samples: Any) -> Any:
        sample = super().sample(index, samples)
        return {"input_ids": sample["input_ids"][-12:], "labels": sample["labels"][-12:]}
