"""What is told of the teardowns of wide fixtures: runs written by hand."""

from __future__ import annotations

import pytest

from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.reporting.wide_teardowns import errors_of
from pytest_ranks.launch.wire import Finished, Raised


def finished(rank, *errors):
    return RankRun(rank=rank, messages=[Finished(errors=errors)], done=True)


RAISED = Raised(headline="KeyboardInterrupt", traceback="the traceback", at=0.0)


@pytest.mark.parametrize(
    ("runs", "errors"),
    [
        ([finished(0), finished(1)], []),
        (
            [finished(0, "E at 0x1", "F"), finished(1, "E at 0x2")],
            ["ranks 0 and 1: E at 0x1", "rank 0: F"],
        ),
        (
            [finished(0), RankRun(rank=1, messages=[RAISED], done=True)],
            ["rank 1: the traceback"],
        ),
        (
            [RankRun(rank=0, stopped="collateral"), RankRun(rank=1, crashed=True, status=-11)],
            ["rank 1: died of SIGSEGV without a report"],
        ),
        (
            [RankRun(rank=0, stopped="deadline"), RankRun(rank=1, stopped="deadline")],
            ["not over after 5 s: ranks 0 and 1 were in a place that its stacks do not show"],
        ),
    ],
)
def test_nothing_that_went_wrong_is_left_out(runs, errors):
    assert errors_of(runs, seconds=5) == errors
