"""Correct trainers that are written otherwise than ours: nothing is said of them, and their bugs are named."""

from __future__ import annotations

import contextlib
import itertools
import os

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pytest_ranks.conformance import Capabilities, Trained, full_parameters
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.preload import PRELOAD
from pytest_ranks.conformance.runner import run_check
from pytest_ranks.conformance.self_check import SharedRanks
from pytest_ranks.launch.host import RankHost


def padded(rows, value, *, left=False):
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])


class PadsLeft:
    """A plain loop: left padding, positions of its own, targets shifted by the collator, loss from logits."""

    capabilities = Capabilities(
        world_sizes={1, 2},
        strategies={"single", "ddp"},
        gradient_accumulation=True,
        tail="pad",
    )
    world, rank = 1, 0

    def collate(self, rows):
        mask = padded([[1] * len(row["input_ids"]) for row in rows], 0, left=True)
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad, left=True),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "targets": padded([[*row["labels"][1:], -100] for row in rows], -100, left=True),
        }

    def count(self, batch):
        return (batch["targets"] != -100).sum()

    def loss(self, logits, targets):
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def windows(self, job):
        sampler = DistributedSampler(
            job.samples, self.world, self.rank, shuffle=job.shuffle, seed=job.seed
        )
        loader = DataLoader(
            job.samples, batch_size=job.micro_batch, sampler=sampler, collate_fn=self.collate
        )
        for epoch in itertools.count() if job.epochs is None else range(job.epochs):
            sampler.set_epoch(epoch)
            batches = iter(loader)
            while window := list(itertools.islice(batches, job.gradient_accumulation_steps)):
                yield window

    def train(self, job):
        self.pad = job.pad_token_id
        if job.strategy != "single":
            self.world, self.rank = job.world_size, torch.distributed.get_rank()
        model = job.build_model().train()
        if self.world > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=job.optimizer.lr)
        history = []
        for window in itertools.islice(self.windows(job), job.max_steps):
            history.append({"loss": self.step(model, window)})
            optimizer.step()
            self.clear(optimizer)
        return Trained(parameters=full_parameters(model), history=history)

    def step(self, model, window):
        count = sum(self.count(batch) for batch in window)
        if self.world > 1:
            torch.distributed.all_reduce(count)
        for index, batch in enumerate(window):
            inputs = {name: value for name, value in batch.items() if name != "targets"}
            last = self.world == 1 or index == len(window) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = self.loss(model(**inputs).logits, batch["targets"])
                (loss * self.world / count.clamp(min=1)).backward()
        return float(loss)

    def clear(self, optimizer):
        optimizer.zero_grad()


class ShiftsFirst(PadsLeft):
    """The last token is a target only: it is not in the row at all, and padding on the right needs no mask."""

    def collate(self, rows):
        return {
            "input_ids": padded([row["input_ids"][:-1] for row in rows], self.pad),
            "targets": padded([row["labels"][1:] for row in rows], -100),
        }


class StartsTwice(ShiftsFirst):
    """A start token is put before each sample, and its target shifted with it."""

    def collate(self, rows):
        return super().collate(
            [
                {"input_ids": [1, *row["input_ids"]], "labels": [-100, *row["labels"]]}
                for row in rows
            ]
        )


class StartsTwiceOnTheLeft(PadsLeft):
    """The same where the mask covers the start token, so that nothing else tells it from padding."""

    def collate(self, rows):
        return super().collate(
            [
                {"input_ids": [1, *row["input_ids"]], "labels": [-100, *row["labels"]]}
                for row in rows
            ]
        )


class MeanOfSequences(PadsLeft):
    """Each sequence weighs the same, in short windows too."""

    capabilities = Capabilities(
        world_sizes={1, 2},
        strategies={"single", "ddp"},
        gradient_accumulation=True,
        tail="pad",
        weighting="sequence",
    )

    def count(self, batch):
        return (batch["targets"] != -100).any(dim=1).sum()

    def loss(self, logits, targets):
        each = cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=1)
        return (each / (targets != -100).sum(dim=1).clamp(min=1)).sum()


class FullWindowCount(MeanOfSequences):
    """Divides by the job's global batch, also where the window is short."""

    def step(self, model, window):
        self.window = window
        return super().step(model, window)

    def count(self, batch):
        return torch.tensor(4) if batch is self.window[0] else torch.tensor(0)


class NeverClears(MeanOfSequences):
    def clear(self, optimizer):
        """Keep the gradients."""


class DropsTheRest(PadsLeft):
    capabilities = Capabilities(
        world_sizes={4}, strategies={"ddp"}, gradient_accumulation=True, tail="drop"
    )

    def windows(self, job):
        each = job.micro_batch * job.gradient_accumulation_steps
        epoch = list(job.samples)
        for start in range(0, len(epoch) - job.global_batch + 1, job.global_batch):
            mine = epoch[start + self.rank * each :][:each]
            yield [self.collate(mine[at : at + 2]) for at in range(0, each, 2)]


class OwnGroup(PadsLeft):
    """Initialises the process group itself, and says what came out on rank 0 only."""

    capabilities = Capabilities(
        process_group="theirs", world_sizes={2}, strategies={"ddp"}, tail="pad"
    )

    def train(self, job):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        trained = super().train(job)
        return trained if os.environ["RANK"] == "0" else None


class OwnGroupSameShard(OwnGroup):
    def windows(self, job):
        self.world, self.rank = 2, 0
        return super().windows(job)


class StartsItself(PadsLeft):
    """No spy sees it: what is judged is read from its parameters."""

    capabilities = Capabilities(launch="self", gradient_accumulation=True, tail="pad")


class StartsItselfUnshifted(StartsItself):
    def collate(self, rows):
        return super().collate([{**row, "labels": [-100, *row["labels"][:-1]]} for row in rows])


@pytest.fixture(scope="module")
def ranks():
    with RankHost(preload=PRELOAD) as host:
        yield host


def judge(subject, tmp_path, ranks, name):
    session = SharedRanks(subject, tmp_path, ranks)
    return [
        run_check(session, check, setting, expected=reason)
        for check, setting, reason in plan_for(session.capabilities, [name])
    ]


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        (PadsLeft, "data_loading.inputs_are_the_samples[ddp-2]"),
        (PadsLeft, "loss.split_invariance[ddp-2]"),
        (ShiftsFirst, "data_loading.inputs_are_the_samples[single]"),
        (ShiftsFirst, "loss.targets[single]"),
        (MeanOfSequences, "loss.token_weights[ddp-2]"),
        (MeanOfSequences, "loss.partial_window[single]"),
        (MeanOfSequences, "loss.partial_window[ddp-2]"),
        (MeanOfSequences, "gradient_sync.gradients_are_cleared[ddp-2]"),
        (DropsTheRest, "data_loading.each_sample_once_an_epoch[ddp-4]"),
        (OwnGroup, "data_loading.ranks_see_different_samples[ddp-2]"),
        (StartsItself, "loss.token_weights[single]"),
        (StartsItself, "gradient_sync.every_tensor[single]"),
    ],
)
def test_a_correct_trainer_passes(tmp_path, ranks, subject, check):
    (result,) = judge(subject, tmp_path, ranks, check)
    assert result.outcome == "passed", result.text


@pytest.mark.parametrize(
    ("subject", "check", "cause"),
    [
        (
            StartsTwice,
            "data_loading.inputs_are_the_samples[single]",
            "1 ids are put before the sample",
        ),
        (
            StartsTwiceOnTheLeft,
            "data_loading.inputs_are_the_samples[single]",
            "1 ids are put before the sample",
        ),
        (
            FullWindowCount,
            "loss.partial_window[single]",
            "the loss is divided as if the window were full",
        ),
        (
            NeverClears,
            "gradient_sync.gradients_are_cleared[ddp-2]",
            "gradients are not cleared between steps",
        ),
        (
            OwnGroupSameShard,
            "data_loading.ranks_see_different_samples[ddp-2]",
            "every rank iterates over the same stream",
        ),
        (StartsItselfUnshifted, "loss.targets[single]", "shift"),
    ],
)
def test_its_bug_is_named(tmp_path, ranks, subject, check, cause):
    (result,) = judge(subject, tmp_path, ranks, check)
    assert result.outcome == "failed", result.text
    assert cause in result.finding.cause


@pytest.mark.parametrize(
    "check",
    ["subject.honours_job", "gradient_sync.one_step_a_window", "packing.documents_are_isolated"],
)
def test_what_no_spy_saw_is_not_applicable(tmp_path, ranks, check):
    (result,) = judge(StartsItself, tmp_path, ranks, check)
    assert result.outcome == "not applicable"
    assert result.text.startswith("launch='self': the spies are not in the processes")
