"""How often an epoch may draw each sample, by the declared tail policy, and why it drew it otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.conformance.reading import micro_batches

if TYPE_CHECKING:
    from collections import Counter

    from pytest_ranks.conformance.runner import Run
    from pytest_ranks.models.corpora import Corpus


def tail_violations(counts: Counter[int], count: int, run: Run, tail: str) -> str:
    """Return what an epoch's draws do that the declared tail policy does not allow; empty for nothing.

    Args:
        counts: draws of each sample.
        count: samples in the dataset.
        run: the epoch.
        tail: "partial", "pad", "drop" or "carry".
    """
    missing = [index for index in range(count) if not counts[index]]
    twice = {index: times for index, times in counts.items() if times > 1}
    if tail == "partial" and (missing or twice):
        return _said(missing, twice)
    if tail == "pad":
        # A wrapped-around epoch fills at most one global batch, and draws no sample a third time before all a second.
        extra = sum(counts.values()) - count
        uneven = count >= run.job.global_batch and max(counts.values()) > 2
        if missing or extra >= max(run.job.global_batch, 1) or uneven:
            return _said(missing, twice)
    if tail in ("drop", "carry") and (twice or len(missing) >= run.job.global_batch):
        return _said(missing, twice)
    return ""


def _said(missing: list[int], twice: dict[int, int]) -> str:
    parts = []
    if missing:
        parts.append(f"samples {missing[:6]} were never drawn")
    if twice:
        parts.append(f"draws of sample: {dict(sorted(twice.items())[:6])}")
    return "; ".join(parts) or "more padding than one global batch"


def draw_cause(run: Run, corpus: Corpus, counts: Counter[int]) -> str:
    """Return the likely cause of samples that were drawn another number of times than once."""
    world, count = run.job.world_size, len(corpus.samples)
    if world > 1 and all(counts[index] == world for index in range(count)):
        return "every rank iterates over all samples: there is no shard per rank"
    batches = micro_batches(run, corpus)
    by_rank = [[b.samples for b in batches if b.rank == rank] for rank in range(world)]
    if world > 1 and all(mine == by_rank[0] for mine in by_rank):
        return "ranks draw the same samples: each takes the same shard"
    if not all(counts[index] for index in range(count)):
        return "samples left over at the end of the epoch are dropped"
    return "the tail is filled by drawing samples again"
