from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_ranks.launch.outcome import ExpectedEnd, RankResult, result_of, verdict
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Finished, Phase, Raised


def phase(when, outcome="passed", was_xfail=None, longrepr=None):
    return Phase(
        when=when, outcome=outcome, was_xfail=was_xfail, report={"longrepr": longrepr}, at=0.0
    )


def of_phases(*phases, **changes):
    return RankResult(rank=0, phases=phases, **changes)


SETUP, TEARDOWN = phase("setup"), phase("teardown")
PASSED = of_phases(SETUP, phase("call"), TEARDOWN)
FAILED = of_phases(SETUP, phase("call", "failed"), TEARDOWN)
SKIPPED = of_phases(SETUP, phase("call", "skipped"), TEARDOWN)
SKIPPED_IN_SETUP = of_phases(phase("setup", "skipped"), TEARDOWN)
XFAILED = of_phases(SETUP, phase("call", "skipped", was_xfail=""), TEARDOWN)
XPASSED = of_phases(SETUP, phase("call", was_xfail="why"), TEARDOWN)
STRICT = of_phases(SETUP, phase("call", "failed", longrepr="[XPASS(strict)] why"), TEARDOWN)
SETUP_ERROR = of_phases(phase("setup", "failed"), TEARDOWN)
TEARDOWN_ERROR = of_phases(SETUP, phase("call"), phase("teardown", "failed"))
DIED = RankResult(rank=0, died=True)
DIED_AFTER_CALL = of_phases(SETUP, phase("call"), died=True)
RAISED = RankResult(rank=0, raised=True)
MISSING = RankResult(rank=0, missing=True)
STOPPED = of_phases(SETUP, stopped=True)
TIMED_OUT = of_phases(SETUP, timed_out=True)
NO_CALL = of_phases(SETUP, TEARDOWN)
NO_TEARDOWN = of_phases(SETUP, phase("call"))
TWICE = of_phases(SETUP, phase("call"), phase("call"), TEARDOWN)
CALL_AFTER_BAD_SETUP = of_phases(phase("setup", "failed"), phase("call"), TEARDOWN)
NOTHING = RankResult(rank=0)


@pytest.mark.parametrize(
    ("results", "word"),
    [
        ([], "crashed"),
        ([PASSED], "passed"),
        ([PASSED, PASSED], "passed"),
        ([SKIPPED, SKIPPED], "skipped"),
        ([SKIPPED, SKIPPED_IN_SETUP], "skipped"),
        ([XFAILED, XFAILED], "xfailed"),
        ([XPASSED, XPASSED], "xpassed"),
        ([STRICT, STRICT], "strict_xpass"),
        # anything but one report a rank and phase
        ([PASSED, NOTHING], "crashed"),
        ([PASSED, NO_CALL], "crashed"),
        ([PASSED, NO_TEARDOWN], "crashed"),
        ([PASSED, TWICE], "crashed"),
        ([PASSED, CALL_AFTER_BAD_SETUP], "crashed"),
        ([PASSED, DIED], "crashed"),
        ([PASSED, DIED_AFTER_CALL], "crashed"),
        ([PASSED, RAISED], "crashed"),
        ([PASSED, MISSING], "crashed"),
        # a rank that was stopped for another's failure, and one stopped for nothing
        ([FAILED, STOPPED], "failed"),
        ([PASSED, STOPPED], "crashed"),
        # the worst counts
        ([DIED, SETUP_ERROR], "crashed"),
        ([DIED, TIMED_OUT], "crashed"),
        ([SETUP_ERROR, FAILED], "error"),
        ([TEARDOWN_ERROR, PASSED], "error"),
        ([TEARDOWN_ERROR, FAILED], "error"),
        ([FAILED, TIMED_OUT], "failed"),
        ([FAILED, PASSED], "failed"),
        ([FAILED, SKIPPED], "failed"),
        ([FAILED, STRICT], "failed"),
        ([TIMED_OUT, PASSED], "timed_out"),
        ([TIMED_OUT, SKIPPED], "timed_out"),
        # one word on all ranks, or they disagree
        ([PASSED, SKIPPED], "disagree"),
        ([PASSED, XFAILED], "disagree"),
        ([SKIPPED, XFAILED], "disagree"),
        ([XFAILED, XPASSED], "disagree"),
        ([XFAILED, STRICT], "disagree"),
        ([PASSED, XPASSED], "disagree"),
        ([PASSED, STRICT], "disagree"),
    ],
)
def test_the_verdict_is_fail_closed(results, word):
    assert verdict(results) == word
    assert verdict(results[::-1]) == word


def test_a_result_takes_streamed_and_collected_reports_together():
    failed = phase("call", "failed")
    run = RankRun(rank=1, messages=[failed, Finished(phases=(SETUP, TEARDOWN))], done=True)
    result = result_of(run)
    assert result.phases == (SETUP, failed, TEARDOWN)
    assert result.status == "failed"


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (RankRun(rank=0, crashed=True), "crashed"),
        (RankRun(rank=0, stopped="deadline"), "timed_out"),
        (RankRun(rank=0, stopped="abandoned"), "timed_out"),
        (RankRun(rank=0, stopped="unready"), "timed_out"),
        (RankRun(rank=0, stopped="collateral"), "stopped"),
        (RankRun(rank=0, messages=[Finished(missing="no such test")], done=True), "crashed"),
        (
            RankRun(rank=0, messages=[Raised(headline="x", traceback="", at=0.0)], done=True),
            "crashed",
        ),
        (
            RankRun(
                rank=0,
                messages=[
                    Finished(phases=(SETUP, phase("call"), TEARDOWN), errors=("late teardown",))
                ],
                done=True,
            ),
            "crashed",
        ),
    ],
)
def test_what_a_rank_never_reported_is_never_passed(run, status):
    assert result_of(run).status == status


KILLED = ExpectedEnd(text="SIGKILL", statuses=frozenset({-9}))
DIED_AS_DECLARED = RankResult(rank=0, died=True, expected="died")
DIED_ANOTHER_WAY = RankResult(rank=0, died=True, expected="lives")


@pytest.mark.parametrize(
    ("results", "word"),
    [
        ([DIED_AS_DECLARED, PASSED], "passed"),
        ([DIED_AS_DECLARED, DIED_AS_DECLARED], "passed"),
        ([DIED_AS_DECLARED, SKIPPED], "skipped"),
        ([DIED_AS_DECLARED, FAILED], "failed"),
        ([DIED_AS_DECLARED, DIED], "crashed"),
        ([DIED_AS_DECLARED, STOPPED], "crashed"),
        ([DIED_AS_DECLARED, TIMED_OUT], "timed_out"),
        ([DIED_ANOTHER_WAY, PASSED], "crashed"),
        ([replace(PASSED, expected="lives"), PASSED], "failed"),
        ([replace(SKIPPED, expected="lives"), SKIPPED], "failed"),
        ([replace(XFAILED, expected="lives"), PASSED], "failed"),
        ([replace(FAILED, expected="died"), PASSED], "failed"),
        ([replace(STOPPED, expected="lives"), PASSED], "crashed"),
    ],
)
def test_a_declared_death_is_required_and_is_no_failure(results, word):
    assert verdict(results) == word
    assert verdict(results[::-1]) == word


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (RankRun(rank=0, crashed=True, status=-9), "died_as_expected"),
        (RankRun(rank=0, crashed=True, status=-11), "crashed"),
        (RankRun(rank=0, crashed=True, status=None), "crashed"),
        (
            RankRun(
                rank=0,
                messages=[Finished(phases=(SETUP, phase("call"), TEARDOWN))],
                done=True,
            ),
            "survived",
        ),
        (RankRun(rank=0, stopped="collateral"), "stopped"),
        (RankRun(rank=0, stopped="deadline"), "timed_out"),
    ],
)
def test_a_declared_death_is_recognised_by_how_the_process_ended(run, status):
    assert result_of(run, expected_end=KILLED).status == status
