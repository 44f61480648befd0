"""Jobs whose samples share rows, and what is wrong with the rows that a trainer made of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pytest_ranks.conformance.findings import Finding, Inconclusive, NotApplicable
from pytest_ranks.conformance.reading import micro_batches, samples_in_row
from pytest_ranks.models.corpora import UNEVEN_LENGTHS, unique_token_corpus
from pytest_ranks.models.ledger import LEDGER_VOCAB

if TYPE_CHECKING:
    from pytest_ranks.conformance.job import Job
    from pytest_ranks.conformance.runner import Bench, Run
    from pytest_ranks.observe.records import Forward

PACKED = unique_token_corpus(UNEVEN_LENGTHS, (0, 15, 0, 3, 0, 5, 0, 0), vocab_size=LEDGER_VOCAB)
"""Most samples keep their first label: wherever they are put, there is a border that must not be trained."""

CAPACITY = 40
"""Tokens a row: more than the longest sample (31), less than any two long ones (31 + 23), no multiple of anything."""


OVERLONG = unique_token_corpus([6, 50, 9, 7], [0, 2, 0, 1], vocab_size=LEDGER_VOCAB)
LONG = 1
"""The sample of it that fits into no row."""


def packed_job(bench: Bench, model: str, *, capacity: int = CAPACITY) -> Job:
    """Return a one-step job on the uneven corpus whose samples share rows.

    Raises:
        Inconclusive: for kinds of packing that cut documents, where documents are not kept by
            design.
    """
    if bench.capabilities.packing == "wrapped":
        raise NotApplicable("packing='wrapped' cuts documents by declaration")
    share = len(PACKED.samples) // bench.setting.world_size
    job = bench.job(model, PACKED, micro_batch=share)
    if bench.capabilities.packing == "rows":
        return dataclasses.replace(job, pack_length=capacity)
    return dataclasses.replace(job, max_tokens_per_rank=capacity)


def packed_run(bench: Bench, model: str) -> Run:
    """Train the packed job and make sure that documents did share rows.

    Raises:
        Finding: when packing was asked for and no row holds two documents.
    """
    run = bench.train(packed_job(bench, model))
    rows = [row for batch in micro_batches(run, PACKED) for row in batch.rows]
    if not rows:
        raise Inconclusive("no training forward of the job's model was seen")
    if max(len(row) for row in rows) < 2:
        raise Finding(
            "with packing on, samples MUST share rows",
            f"{len(rows)} rows of {len(PACKED.samples)} samples hold at most one each",
            cause="packing is accepted and switched off silently",
            reference="https://github.com/unslothai/unsloth/pull/7234",
            run=str(run.folder),
        )
    return run


def lost_cause(lost: list[int], *, whole: bool, twice: bool) -> str:
    """Return the likely cause of samples whose tokens were lost, or were in two rows."""
    if lost and twice:
        return "ranks made different plans: one left out what another was to take"
    if not lost:
        return "a sample is in two bins"
    if not whole:
        return "rows are truncated, or the ends of samples are"
    lengths = [len(sample["input_ids"]) for sample in PACKED.samples]
    kept = [length for index, length in enumerate(lengths) if index not in lost]
    if max(lengths[index] for index in lost) < min(kept):
        return f"the shortest samples, below {min(kept)} tokens, are filtered out"
    if min(lengths[index] for index in lost) > max(kept):
        return f"the longest samples, above {max(kept)} tokens, are filtered out"
    return "a bin was dropped: such as the last, incomplete one"


def leak_cause(forward: Forward) -> str:
    """Return why the documents of a forward see each other."""
    if forward.masked:
        return "the model was given an attention mask that lets packed documents see each other"
    borders = sum(len(samples_in_row(PACKED, row)) for row in forward.input_ids)
    restarts = sum(
        position == 0
        for row, positions in rows_with_positions(forward)
        for token, position in zip(row, positions, strict=True)
        if token in PACKED.positions()
    )
    if restarts > len(forward.input_ids):
        return (
            f"positions restart {restarts} times for {borders} documents: not every border is one"
        )
    return "positions do not restart, so the model cannot tell packed documents apart"


def rows_with_positions(forward: Forward) -> list[tuple[list[int], list[int]]]:
    """Return rows with the positions that the model uses: those given, else counted over the row."""
    given = forward.position_ids or [list(range(len(row))) for row in forward.input_ids]
    if len(given) == 1:
        given = given * len(forward.input_ids)  # one row of positions is broadcast
    return list(zip(forward.input_ids, given, strict=True))
