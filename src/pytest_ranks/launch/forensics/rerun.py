"""A failed item run once more under torch's detailed debug mode, to name collectives that differ.

gloo ends a rank that receives more than it asked for with an abort, and takes the rank's flight
recorder along. Under TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares each collective between the
ranks before it starts, which makes one 3 to 12 times slower: too much for every test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import UnavailableError
from pytest_ranks.launch import deadline
from pytest_ranks.launch.reporting.folding import fold, ranks_text
from pytest_ranks.launch.wire import Finished, Injected, Phase, Raised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_ranks.launch.rank_run import RankRun
    from pytest_ranks.launch.requests import ItemRequest
    from pytest_ranks.launch.service import ItemRun, RankService

MOST_SECONDS = 20.0
SHARE = 0.1  # of what pytest-timeout allows the test: its clock goes on
MODE = "TORCH_DISTRIBUTED_DEBUG=DETAIL"

_ABORTED = re.compile(r"op\.preamble\.length <= op\.nbytes")
# torch/csrc/distributed/c10d/ProcessGroupWrapper.cpp; the comma after the number is not always
# there, and what a rank says of another one is not always true, so only its own is taken.
_FINGERPRINT = re.compile(
    r"Rank (\d+) is running collective: CollectiveFingerPrint\(SequenceNumber=(\d+),? ?"
    r"OpType=(\w+)(?:, TensorShape=\[([^\]]*)\], TensorDtypes=(\w+))?"
)
_MISSING = re.compile(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier")
_OPERATIONS = {
    "ALLREDUCE": "all_reduce",
    "ALLGATHER": "all_gather",
    "_ALLGATHER_BASE": "all_gather_into_tensor",
    "REDUCE_SCATTER": "reduce_scatter",
    "_REDUCE_SCATTER_BASE": "reduce_scatter_tensor",
    "ALLTOALL": "all_to_all",
    "ALLTOALL_BASE": "all_to_all_single",
}
_DTYPES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Int": "int32",
    "Long": "int64",
    "Bool": "bool",
}


def is_needed(done: ItemRun) -> bool:
    """Return whether the collectives of a failed run may differ and nothing names them yet.

    Never after a death of another kind, a fault that the test injected, or a deadline at which
    the flight recorder told who waits for whom.
    """
    said = [message for run in done.runs for message in run.messages]
    if any(isinstance(message, Injected) for message in said):
        return False
    if any(run.crashed and _ABORTED.search(run.output + run.captured) for run in done.runs):
        return True
    if any(run.crashed for run in done.runs):
        return False
    stopped = [run for run in done.runs if run.stopped in ("deadline", "deadlock", "abandoned")]
    is_blind = any(run.sight is not None and run.sight.recorder for run in stopped)
    return is_blind and any(run.where is not None and run.where.collective for run in stopped)


def explain_again(
    service: RankService, request: ItemRequest, done: ItemRun, *, allowed: float | None
) -> list[str]:
    """Run an item once more in detail, on ranks of its own; return what that says.

    Args:
        service: runs it.
        request: as it was.
        done: how it failed.
        allowed: seconds that pytest-timeout gives the test, None where it gives all.
    """
    if not is_needed(done) or request.spec.backend != "gloo" or request.spec.fidelity != "gloo":
        return []
    again = replace(
        request,
        spec=replace(request.spec, isolate=True),
        seconds=MOST_SECONDS if allowed is None else min(MOST_SECONDS, SHARE * allowed),
        following=None,
        hold=False,
        is_detailed=True,
    )
    try:
        pool = service.take(again.spec, again.key, owner=again.node_id)
        found = service.run(again, pool)
        service.settle(again, found, is_clean=False)
    except UnavailableError as error:
        return [f"it could not be run once more under {MODE}: {error}"]
    return [describe(found.runs)]


def describe(runs: list[RankRun]) -> str:
    """Return in a sentence what the second run says of the ranks' collectives."""
    own = [(run.rank, text) for run in runs for text in _own_collectives(run)]
    if own:
        parts = [f"{ranks_text(ranks)} called {text}" for ranks, text in fold(own)]
        return f"run once more under {MODE}, the collectives differ: {'; '.join(parts)}"
    for run in runs:
        for text, place in _errors(run):
            if found := _MISSING.search(text):
                ranks = ranks_text(map(int, re.findall(r"\d+", found[1])))
                return f"run once more under {MODE}: {ranks} did not come to {place}"
    return f"run once more under {MODE}, no collective was found to differ"


def _own_collectives(run: RankRun) -> Iterator[str]:
    for text, place in _errors(run):
        for rank, number, kind, shape, dtype in _FINGERPRINT.findall(text):
            if int(rank) == run.rank:
                name = _OPERATIONS.get(kind, kind.lower())
                sizes = ", ".join(shape.split())
                tensor = f" of {_DTYPES.get(dtype, dtype)} [{sizes}]" if dtype else ""
                # torch counts from 0 here, its flight recorder from 1
                yield f"{name} #{int(number) + 1}{tensor}{place and f', {place}'}"
                return


def _errors(run: RankRun) -> Iterator[tuple[str, str]]:
    """Yield the text of each failure of a rank, and the line of the user's that it came out of."""
    for message in run.messages:
        if isinstance(message, Raised):
            yield message.traceback, ""
            continue
        phases = message.phases if isinstance(message, Finished) else (message,)
        for phase in phases:
            if isinstance(phase, Phase) and phase.outcome == "failed":
                longrepr = phase.report.get("longrepr")
                yield str(longrepr), _place(longrepr)


def _place(longrepr: Any) -> str:
    """Return `file:line` of the innermost frame of the user's in a serialised traceback."""
    if not isinstance(longrepr, dict):
        return ""
    entries = longrepr.get("reprtraceback", {}).get("reprentries", ())
    places = [
        (location["path"], location["lineno"])
        for entry in entries
        if (location := entry.get("data", {}).get("reprfileloc")) is not None
    ]
    own = [f"{path}:{line}" for path, line in places if not deadline.is_library(path)]
    return own[-1] if own else ""
