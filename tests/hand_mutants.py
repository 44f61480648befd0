"""Twenty-four bugs planted by hand, and the tests of the named modules that have to see each.

They are the classes of bug that were planted in a trainer of the same shape to learn what its 391
tests were worth: those killed 1 of the 12 between data and optimizer, and 10 of the 12 in packing and
sampling. As a pytest plugin (`-p hand_mutants`) this module plants the one that HAND_MUTANT names,
in the controller and, since the variable is inherited, in every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

VARIABLE = "HAND_MUTANT"
COMPONENTS = "test_training_components.py::"
PRECISION = "test_mixed_precision_on_ranks.py::"
LOADER = "test_data_loader.py::"
PACKING = "test_batch_lengths_to_minibatches.py::"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandMutant:
    """One planted bug.

    Attributes:
        name: what HAND_MUTANT says.
        summary: what is wrong.
        plant: puts the bug in, for as long as the process lives.
        killed_by: the tests that fail with it, each of which passes without it.
    """

    name: str
    summary: str
    plant: Callable[[], None]
    killed_by: tuple[str, ...]


MUTANTS: dict[str, HandMutant] = {}


def mutant(*killed_by: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that plants a bug; its docstring says which."""

    def register(plant: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[plant.__name__] = HandMutant(
            name=plant.__name__,
            summary=(plant.__doc__ or "").strip(),
            plant=plant,
            killed_by=killed_by,
        )
        return plant

    return register


def pytest_configure(config: pytest.Config) -> None:
    """Plant the bug that the environment names."""
    if name := os.environ.get(VARIABLE):
        MUTANTS[name].plant()


def change(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(what is there)` in the place of what is there."""
    setattr(owner, name, make(getattr(owner, name)))


# ---- between data and optimizer -----------------------------------------------------------------


@mutant(
    COMPONENTS + "TestTakeGradientStep::test_gradients_are_clipped_to_the_limit",
    COMPONENTS + "TestTakeGradientStep::test_gradients_of_all_shards_are_clipped_together",
)
def clips_to_another_value() -> None:
    """Gradients are clipped to ten times the limit."""
    from pytest_ranks.reference import optimization

    change(
        optimization,
        "clip_gradients",
        lambda clip: lambda parameters, norm, limit: clip(parameters, norm, 10 * limit),
    )


@mutant(PRECISION + "TestMixedPrecisionDtypes::test_fsdp2_mixed_precision_dtypes[ws=2]")
def reduces_in_bf16() -> None:
    """FSDP2 adds up gradients over ranks in bfloat16."""
    plant_policy(reduce_dtype="bfloat16")


@mutant(PRECISION + "TestMixedPrecisionDtypes::test_fsdp2_mixed_precision_dtypes[ws=2]")
def computes_in_float32() -> None:
    """FSDP2 computes in float32 where bfloat16 was asked for."""
    plant_policy(param_dtype="float32")


def plant_policy(**dtypes: str) -> None:
    """Make FSDP2's policy under bf16 another one."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from pytest_ranks.reference import parallel

    said = {"param_dtype": "bfloat16", "reduce_dtype": "float32"} | dtypes
    policy = MixedPrecisionPolicy(**{name: getattr(torch, dtype) for name, dtype in said.items()})
    change(
        parallel,
        "precision_policy",
        lambda right: lambda precision: policy if precision == "bf16" else right(precision),
    )


@mutant(PRECISION + "TestMixedPrecisionDtypes::test_fsdp2_mixed_precision_dtypes[ws=2]")
def leaves_the_root_without_a_policy() -> None:
    """The blocks are sharded with the policy, the root (embedding, head) without one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from pytest_ranks.reference import parallel

    def shards_wrongly(shard: Any) -> Any:
        def fully_shard(module: Any, **options: Any) -> Any:
            if hasattr(module, "config") and hasattr(module, "get_input_embeddings"):
                options["mp_policy"] = MixedPrecisionPolicy()
            return shard(module, **options)

        return fully_shard

    change(parallel, "fully_shard", shards_wrongly)


@mutant(
    COMPONENTS + "TestTrainingIntegration::test_update_is_the_oracles_on_ranks[micro_batch-ddp]",
    COMPONENTS + "TestTrainingIntegration::test_update_is_the_oracles_on_ranks[micro_batch-fsdp2]",
)
def forgets_the_world_size() -> None:
    """Gradients that DDP and FSDP2 average are not multiplied by the number of ranks."""
    from pytest_ranks.reference import Trainer

    Trainer.scale = lambda self, cross_entropy, tokens: cross_entropy / tokens


@mutant(
    COMPONENTS + "TestTrainingIntegration::"
    "test_update_is_the_oracles[micro_batch-gradient_accumulation_steps]",
)
def divides_by_the_micro_batch() -> None:
    """Each micro-batch is divided by its own tokens, so that the step trains a mean of means."""
    from pytest_ranks.reference import Trainer
    from pytest_ranks.reference.loss import counted_targets

    def cross_entropy(
        self: Any, logits: Any, labels: Any, right: Any = Trainer.cross_entropy
    ) -> Any:
        self.own_tokens = max(1, int(counted_targets(labels)))
        return right(self, logits, labels)

    Trainer.cross_entropy = cross_entropy
    Trainer.scale = lambda self, loss, tokens: loss * self.world.size / self.own_tokens


@mutant(COMPONENTS + "TestTrainingIntegration::test_update_is_the_oracles[micro_batch]")
def makes_no_backward_pass() -> None:
    """`backward` is not called; nothing is trained."""
    from pytest_ranks.reference import Trainer

    Trainer.backward = lambda self, scaled: None


@mutant(COMPONENTS + "TestBatchMetrics::test_ranks_are_added_up[ddp]")
def logs_its_own_loss() -> None:
    """The logged loss leaves out what the other ranks trained on."""
    from pytest_ranks.reference import Trainer

    Trainer.mean_loss = lambda self, cross_entropy, tokens: float(cross_entropy) / tokens


@mutant(COMPONENTS + "TestTakeGradientStep::test_a_bf16_model_is_trained_in_float32")
def trains_bf16_weights() -> None:
    """Nothing holds the dtypes: a bfloat16 folder is trained as bfloat16."""
    from pytest_ranks.reference import Trainer

    Trainer.masters = lambda self: None


@mutant(
    LOADER + "TestTrainerData::test_a_resumed_run_draws_what_is_left_of_its_epoch[1]",
    LOADER + "TestTrainerData::test_a_resumed_run_draws_what_is_left_of_its_epoch[5]",
)
def resumes_one_sample_early() -> None:
    """A resumed epoch draws the last trained sample again (`<=` for `<`)."""
    from pytest_ranks.reference import Trainer

    Trainer.skip = lambda self, order, cursor: order[max(0, cursor - 1) :]


@mutant(COMPONENTS + "TestBatchMetrics::test_ranks_are_added_up[ddp]")
def takes_the_largest_rank_for_the_sum() -> None:
    """Counts and losses of the ranks are reduced to their maximum, not added up."""
    import torch.distributed as dist

    from pytest_ranks.reference import parallel

    def largest(self: Any, value: Any) -> Any:
        value = value.clone()
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    parallel.World.sum = largest


@mutant(COMPONENTS + "TestPatchTargetModule::test_the_loss_is_a_sum_of_tokens")
def returns_a_mean_loss() -> None:
    """The loss that should be a sum over tokens is their mean."""
    from pytest_ranks.reference import loss

    def mean(right: Any) -> Any:
        return lambda logits, labels: right(logits, labels) / max(1, loss.counted_targets(labels))

    change(loss, "shifted_cross_entropy_sum", mean)


# ---- packing and sampling -----------------------------------------------------------------------


def replan(change_plan: Callable[[list[list[list[int]]]], None]) -> None:
    """Change the plans of all packers in place, as nested lists: micro-batch, rank, index."""
    from pytest_ranks.reference import packing

    def around(make: Any) -> Any:
        def plan(micro_batches: Any) -> Any:
            copied = [[list(indices) for indices in ranks] for ranks in micro_batches]
            if copied:
                change_plan(copied)
            return make(copied)

        return plan

    change(packing, "_plan", around)


@mutant(
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[level]",
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[lpt]",
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[greedy]",
)
def puts_a_sample_on_two_ranks() -> None:
    """The first sample of a plan is run by the last rank as well."""
    replan(lambda plan: plan[-1][-1].append(plan[0][0][0] if plan[0][0] else plan[0][-1][0]))


@mutant(
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[level]",
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[lpt]",
    PACKING + "TestEveryPacker::test_no_sample_is_lost_or_repeated_and_ranks_run_as_often[greedy]",
)
def loses_the_last_sample() -> None:
    """The last sample of the last micro-batch is in no plan."""
    replan(lambda plan: max(plan[-1], key=len).pop())


@mutant(
    PACKING
    + "TestEveryPacker::test_the_token_limit_holds_and_no_micro_batch_is_without_samples[level]",
    PACKING
    + "TestEveryPacker::test_the_token_limit_holds_and_no_micro_batch_is_without_samples[lpt]",
)
def packs_above_the_capacity() -> None:
    """A rank takes one token more than it may."""
    from pytest_ranks.reference import packing

    change(
        packing,
        "_spread",
        lambda right: (
            lambda order, lengths, capacity, bins: right(order, lengths, capacity + 1, bins)
        ),
    )
    change(
        packing,
        "pack_by_level",
        lambda right: (
            lambda lengths, capacity, ranks, **more: right(lengths, capacity + 1, ranks, **more)
        ),
    )


@mutant(
    PACKING
    + "TestEveryPacker::test_a_single_sequence_leaves_the_other_ranks_an_empty_micro_batch[level]",
    PACKING
    + "TestEveryPacker::test_a_single_sequence_leaves_the_other_ranks_an_empty_micro_batch[lpt]",
    PACKING
    + "TestEveryPacker::test_a_single_sequence_leaves_the_other_ranks_an_empty_micro_batch[greedy]",
)
def gives_ranks_unequal_numbers_of_micro_batches() -> None:
    """A rank without a sample leaves the micro-batch out, and the others wait for it forever."""
    from pytest_ranks.reference.packing import Plan

    Plan.for_rank = lambda self, rank: [ranks[rank] for ranks in self.micro_batches if ranks[rank]]


@mutant(
    PACKING + "TestQuality::test_long_and_short_share_a_micro_batch",
)
def packs_in_arrival_order() -> None:
    """Samples are placed as they come, not longest first."""
    from pytest_ranks.reference import packing

    packing.pack_lpt = packing.PACKERS["lpt"] = packing.pack_greedy


@mutant(
    COMPONENTS + "TestTrainingIntegration::"
    "test_update_is_the_oracles_on_ranks[micro_batch-max_tokens_per_rank-ddp]",
)
def plans_differently_on_each_rank() -> None:
    """Odd ranks number the ranks of a plan the other way round: some samples run twice, some never."""
    from pytest_ranks.reference import Trainer

    def pack(self: Any, window: Any, lengths: Any, right: Any = Trainer.pack) -> Any:
        plan = right(self, window, lengths)
        return [ranks[::-1] for ranks in plan] if self.world.rank % 2 else plan

    Trainer.pack = pack


@mutant(
    LOADER + "TestEpochTracking::test_an_epoch_is_a_permutation_of_its_seed_and_number",
    LOADER + "TestInfiniteSampler::test_same_seed_same_order_on_every_rank_and_its_own_for_another",
)
def draws_the_same_order_for_every_seed() -> None:
    """The sampler's seed does nothing."""
    plant_order(lambda right, size, seed, epoch, shuffle: right(size, 0, epoch, shuffle))


@mutant(
    LOADER + "TestEpochTracking::test_an_epoch_is_a_permutation_of_its_seed_and_number",
    LOADER + "TestInfiniteSampler::test_it_never_ends_and_each_cycle_is_a_permutation_of_its_own",
)
def draws_the_same_order_in_every_epoch() -> None:
    """`set_epoch` does nothing."""
    plant_order(lambda right, size, seed, epoch, shuffle: right(size, seed, 0, shuffle))


def plant_order(order: Callable[..., list[int]]) -> None:
    """Change the order of an epoch."""
    from pytest_ranks.reference import sampling

    original = sampling.epoch_order

    def right(size: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
        return original(size, seed=seed, epoch=epoch, shuffle=shuffle)

    def epoch_order(size: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        return order(right, size, seed, epoch, shuffle)

    sampling.epoch_order = epoch_order


@mutant(
    LOADER
    + "TestJsonlDataset::test_missing_loss_counted_tokens_are_counted_without_the_first_label",
    COMPONENTS + "TestPatchTargetModule::test_the_loss_is_a_sum_of_tokens",
)
def counts_first_labels() -> None:
    """Each row's first label counts as trained, though it has no prediction."""
    from pytest_ranks.reference import collate, data, loss

    loss.counted_targets = lambda labels: (labels != loss.IGNORED).sum()
    for module in (data, collate):
        module.count_targets = lambda sample: sum(one != loss.IGNORED for one in sample["labels"])


@mutant(
    LOADER + "TestMbCollateFn::test_no_document_trains_the_end_of_the_one_before",
    COMPONENTS
    + "TestTrainingIntegration::test_update_is_the_oracles[micro_batch-max_tokens_per_rank]",
)
def trains_across_documents() -> None:
    """The first label of a packed document trains the last token of the one before it."""
    from pytest_ranks.reference import collate

    def next_token_labels(row: Any, width: int) -> list[int]:
        labels = [label for sample in row for label in sample["labels"]]
        return labels + [collate.IGNORED] * (width - len(labels))

    collate.next_token_labels = next_token_labels
    collate.PlainLayout.labels = staticmethod(next_token_labels)


@mutant(
    LOADER + "TestMbCollateFn::test_samples_are_joined_and_positions_restart",
    COMPONENTS
    + "TestTrainingIntegration::test_update_is_the_oracles[micro_batch-max_tokens_per_rank]",
)
def counts_positions_through_the_row() -> None:
    """Positions do not restart with each packed document, so that documents attend to each other."""
    from pytest_ranks.reference import collate

    def positions(lengths: Any, width: int) -> list[int]:
        return list(range(width))

    collate.restarting_positions = positions
    collate.PlainLayout.positions = staticmethod(positions)


@mutant(
    LOADER + "TestMaxTokensPerRankCollator::test_filtered_samples_are_told_and_do_not_count",
)
def counts_what_was_dropped() -> None:
    """The count of a batch includes the samples that were left out as too long."""
    from pytest_ranks.reference.collate import MaxTokensPerRankCollator
    from pytest_ranks.reference.data import count_targets

    def call(self: Any, batch: Any, right: Any = MaxTokensPerRankCollator.__call__) -> Any:
        everything = sum(map(count_targets, batch))
        return [replace(one, batch_targets=everything) for one in right(self, batch)]

    MaxTokensPerRankCollator.__call__ = call
