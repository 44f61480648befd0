"""Wrong packing: documents that see each other, get lost, or are trained in the wrong places."""

# ruff: noqa: ARG002, D102 - each method is a documented step of the trainer, with its arguments
from __future__ import annotations

import dataclasses
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pytest_ranks.reference.collate import MicroBatch
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.mutants.planted import plant
from pytest_ranks.reference.trainer import Trainer
from pytest_ranks.subjects.reference import ReferenceTrainer, config_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pytest_ranks.conformance import Job
    from pytest_ranks.reference import TrainConfig
    from pytest_ranks.reference.batches import BatchPlan
    from pytest_ranks.reference.collate import Row
    from pytest_ranks.reference.data import Samples


def _ones(lengths: Sequence[int], width: int) -> Tensor:
    return torch.tensor([[1] * length + [0] * (width - length) for length in lengths])


@plant(
    row="P1",
    issue="https://github.com/axolotl-ai-cloud/axolotl/issues/1375",
    by_rows=True,
    kills={
        "packing.documents_are_isolated[single]": "attention mask that lets packed documents see",
    },
)
class LeaksWithSeveralRows(Trainer):
    """Documents are kept apart in a batch of one row only."""

    def mask(self, lengths: Sequence[int], width: int, *, packed: bool) -> Tensor | None:
        if packed and len(lengths) > 1:
            return _ones(lengths, width)
        return super().mask(lengths, width, packed=packed)


@plant(
    row="P2",
    issue="https://github.com/huggingface/trl/issues/1230",
    kills={
        "packing.documents_are_isolated[single]": "positions do not restart",
        "packing.update_is_that_without_packing[single]": "packed documents see each other",
    },
)
class NoPositionsGiven(Trainer):
    """The model is given no position_ids, and so cannot tell packed documents apart."""

    def train(self) -> list[dict[str, Any]]:
        self.keywords = self.keywords - {"position_ids"}
        return super().train()

    def check_isolation(self) -> None:
        pass


@plant(
    row="P4",
    issue="https://github.com/hiyouga/LlamaFactory/pull/7318",
    kills={"packing.positions_restart[single]": "counted over the whole row"},
)
class MaskedButNotRestarted(Trainer):
    """A mask keeps documents apart, but positions go on from one to the next."""

    def collate(self, rows: list[Any]) -> MicroBatch:
        batch = super().collate(rows)
        if not self.config.packed:
            return batch
        starts = (batch.position_ids == 0).cumsum(dim=1)
        same = starts[:, :, None] == starts[:, None, :]
        causal = torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        return MicroBatch(
            input_ids=batch.input_ids,
            labels=batch.labels,
            position_ids=torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids),
            attention_mask=(same & causal)[:, None],
            samples=batch.samples,
        )


@plant(
    row="P5",
    issue="https://github.com/OpenRLHF/OpenRLHF/pull/781",
    kills={
        "packing.targets_are_those_without_packing[single]": "in the wrong places of packed rows",
    },
)
class PromptRangesMisplaced(Trainer):
    """In packed rows the start of each prompt is added up from prompts, not from documents."""

    def labels(self, row: Row, width: int) -> list[int]:
        labels = [token for sample in row for token in sample["input_ids"]]
        start = 0
        for sample in row:
            prompt = sum(label == IGNORED for label in sample["labels"])
            labels[start : start + max(prompt, 1)] = [IGNORED] * max(prompt, 1)
            start += max(prompt, 1)
        return labels + [IGNORED] * (width - len(labels))


@plant(
    row="P5",
    issue="https://github.com/OpenRLHF/OpenRLHF/pull/781",
    kills={
        "packing.targets_are_those_without_packing[single]": "boundary targets",
        "packing.targets_are_those_without_packing[ddp-2]": "boundary targets",
    },
)
class BoundariesTrained(Trainer):
    """The last token of a document is trained on the first token of the next."""

    def labels(self, row: Row, width: int) -> list[int]:
        labels = list(chain.from_iterable(sample["labels"] for sample in row))
        return labels + [IGNORED] * (width - len(labels))


@plant(
    row="P7",
    issue="https://github.com/huggingface/trl/issues/483",
    kills={"packing.conserves_tokens[single]": "the shortest"},
)
class ShortSamplesDropped(Trainer):
    """Samples below a length are left out of packed rows."""

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        if lengths is not None:
            window = [index for index in window if lengths[index] >= 6]
        return super().pack(window, lengths)


@plant(
    row="PK1",
    kills={"packing.conserves_tokens[single]": "a bin was dropped"},
)
class LastBinDropped(Trainer):
    """The last, incomplete bin is never closed, and is lost."""

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        plan = super().pack(window, lengths)
        return plan[:-1] if lengths is not None and len(plan) > 1 else plan


@plant(
    row="PK1",
    kills={"packing.conserves_tokens[ddp-2]": "truncat"},
)
class RowsTruncated(Trainer):
    """Packed rows are cut to a length below the capacity."""

    def collate(self, rows: list[Any]) -> MicroBatch:
        batch = super().collate(rows)
        if not self.config.packed:
            return batch
        return MicroBatch(
            input_ids=batch.input_ids[:, :24],
            labels=batch.labels[:, :24],
            position_ids=batch.position_ids[:, :24],
            attention_mask=None,
            samples=batch.samples,
        )


@plant(
    row="P8",
    issue="https://github.com/unslothai/unsloth/pull/7234",
    kills={"packing.conserves_tokens[single]": "switched off silently"},
)
class PackingSwitchedOff(ReferenceTrainer):
    """Packing is accepted and not done: one sample a row."""

    def config(self, job: Job) -> TrainConfig:
        return dataclasses.replace(config_of(job), max_tokens_per_rank=None, pack_length=None)


@plant(
    row="P11, P13",
    issue="https://github.com/OpenRLHF/OpenRLHF/issues/587",
    kills={
        "packing.update_is_that_without_packing[ddp-2]": "packed documents see each other",
        "packing.documents_are_isolated[single]": "attention mask that lets packed documents see",
        "packing.documents_are_isolated[ddp-2]": "attention mask that lets packed documents see",
    },
)
class MaskOfOnes(Trainer):
    """A mask of ones makes the model ignore that positions restart: documents see each other."""

    def mask(self, lengths: Sequence[int], width: int, *, packed: bool) -> Tensor | None:
        return _ones(lengths, width)


@plant(
    row="PK2",
    kills={"packing.documents_are_isolated[single]": "not every border"},
)
class OnlyFirstBorderKept(Trainer):
    """Positions restart at the first border of a row and at none of the later ones."""

    def positions(self, lengths: Sequence[int], width: int) -> list[int]:
        if len(lengths) < 3:
            return super().positions(lengths, width)
        return super().positions([lengths[0], sum(lengths[1:])], width)


class _CutsOverlong(Trainer):
    """Accepts samples above the capacity, and gives packing lengths that fit."""

    def measure(self, samples: Samples) -> Sequence[int] | None:
        capacity = self.config.max_tokens_per_rank
        if capacity is None:
            return super().measure(samples)
        lengths = [len(samples[index]["input_ids"]) for index in range(len(samples))]
        return [min(length, capacity) for length in lengths]

    def overlong(self, index: int) -> bool:
        capacity = self.config.max_tokens_per_rank
        return capacity is not None and len(self.samples[index]["input_ids"]) > capacity


@plant(
    row="P10",
    issue="https://github.com/huggingface/trl/pull/6025",
    kills={"packing.overlong_samples_are_not_lost_silently[single]": "truncation"},
)
class OverlongTruncated(_CutsOverlong):
    """A sample above the capacity is cut to it: its answer may be gone."""

    def sample(self, index: int, samples: Any) -> Any:
        sample = super().sample(index, samples)
        capacity = self.config.max_tokens_per_rank
        return {name: list(sample[name])[:capacity] for name in ("input_ids", "labels")}


@plant(
    row="P15",
    issue="https://github.com/Red-Hat-AI-Innovation-Team/mini_trainer",
    kills={"packing.overlong_samples_are_not_lost_silently[single]": "a row above the limit"},
)
class DropAnnouncedNotDone(_CutsOverlong):
    """A filter says that it removed a sample, and the unfiltered list is used."""

    def log(self, record: dict[str, Any]) -> None:
        dropped = sum(self.overlong(index) for index in range(len(self.samples)))
        super().log(record | {"dropped": dropped})


@plant(
    row="P15",
    kills={"packing.overlong_samples_are_not_lost_silently[single]": "a silent filter"},
)
class OverlongDropped(_CutsOverlong):
    """A sample above the capacity is left out, and nobody is told."""

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        return super().pack([index for index in window if not self.overlong(index)], lengths)


@plant(
    row="mini_trainer: token count of the unfiltered batch",
    kills={
        "packing.overlong_samples_are_not_lost_silently[single]": "counts the tokens of dropped",
    },
)
class CountsDroppedTokens(_CutsOverlong):
    """A sample above the capacity is dropped with a report, but its tokens stay in the count."""

    dropped: ClassVar[int] = 0

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        self.window = window
        return super().pack([index for index in window if not self.overlong(index)], lengths)

    def count(self, batches: list[MicroBatch]) -> int:
        lost = [self.samples[index]["labels"][1:] for index in self.window if self.overlong(index)]
        more = sum(int(label != IGNORED) for labels in lost for label in labels)
        return super().count(batches) + more

    def log(self, record: dict[str, Any]) -> None:
        super().log(record | {"dropped": sum(map(self.overlong, range(len(self.samples))))})


@plant(
    row="PK1",
    issue="https://github.com/verl-project/verl/pull/7553",
    kills={"packing.capacity_is_respected[single]": "one sample too many"},
)
class OneSampleTooMany(Trainer):
    """The limit is compared with the row's tokens before the next sample is added."""

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        capacity = self.config.max_tokens_per_rank
        if capacity is None or lengths is None:
            return super().pack(window, lengths)
        bins: list[list[int]] = [[]]
        for index in window:
            if sum(lengths[each] for each in bins[-1]) >= capacity:
                bins.append([])
            bins[-1].append(index)
        bins += [[] for _ in range(-len(bins) % self.world.size)]
        size = self.world.size
        groups = [bins[start : start + size] for start in range(0, len(bins), size)]
        return [[[own] if own else [] for own in ranks] for ranks in groups]


@plant(
    row="PK5",
    kills={"packing.plan_is_deterministic[single]": "keeps state"},
)
class PackerKeepsState(Trainer):
    """The packer begins where the one before it ended."""

    calls: ClassVar[list[int]] = []

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        self.calls.append(len(window))
        if len(self.calls) % 2 == 0 and lengths is not None:
            order = {index: place for place, index in enumerate(reversed(window))}
            return [
                [[sorted(row, key=order.__getitem__) for row in rows] for rows in ranks]
                for ranks in super().pack(window, lengths)
            ]
        return super().pack(window, lengths)


@plant(
    row="PK5",
    issue="https://github.com/axolotl-ai-cloud/axolotl/issues/3848",
    kills={
        "packing.plan_is_deterministic[ddp-2]": "ranks made different plans",
        "packing.conserves_tokens[ddp-2]": "ranks made different plans",
    },
)
class RanksPlanDifferently(Trainer):
    """Each rank shuffles before it packs, with a generator of its own."""

    def pack(self, window: list[int], lengths: Sequence[int] | None) -> BatchPlan:
        if lengths is None:
            return super().pack(window, lengths)
        offset = 3 * self.world.rank
        turned = window[offset:] + window[:offset]
        again = dict(zip(window, turned, strict=True))
        return [
            [[[again[index] for index in row] for row in rows] for rows in ranks]
            for ranks in super().pack(window, lengths)
        ]
