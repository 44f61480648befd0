"""The verdict's lines, made from records as they come from reports: no ranks, no torch."""

from __future__ import annotations

import pytest

from pytest_ranks.report.verdict import causes, conclusion, reasons, table


def record(check, outcome, *, setting="single", text="", cause="", seconds=1.0):
    return {
        "subject": "mylib:Mine",
        "suite": check.partition(".")[0],
        "check": check,
        "setting": setting,
        "outcome": outcome,
        "text": text,
        "cause": cause,
        "seconds": seconds,
    }


def lines(pairs):
    return [line for line, _ in pairs]


def test_the_table_counts_results_by_suite():
    records = [
        record("loss.a", "passed"),
        record("loss.a", "failed", setting="ddp-2"),
        record("packing.b", "not applicable", setting=""),
    ]
    assert lines(table(records)) == [
        "suite    claims    passed    failed      time",
        "loss          1         1         1     2.0 s",
        "packing       -  not applicable",
        "total         1         1         1     3.0 s",
    ]


@pytest.mark.parametrize(
    ("outcome", "title"),
    [
        ("expected failure", "expected"),
        ("adapter error", "adapter"),
        ("inconclusive", "unclear"),
        ("not run", "not run"),
    ],
)
def test_a_column_appears_with_its_first_result(outcome, title):
    assert title not in lines(table([record("loss.a", "passed")]))[0]
    assert title in lines(table([record("loss.a", outcome)]))[0]


def test_one_cause_is_said_once_with_all_that_it_breaks():
    records = [
        record("loss.a", "failed", cause="a mean of means (match 1e-08; next best off by 1e-1)"),
        record("loss.b", "failed", cause="a mean of means (match 2e-08; next best off by 1e-1)"),
        record("loss.c", "failed", cause="none of 9 known causes matches (nearest ...)"),
    ]
    assert lines(causes(records)) == [
        "likely: a mean of means",
        "        breaks loss.a, loss.b",
        "likely: cause unknown",
        "        breaks loss.c",
    ]


def test_equal_reasons_are_folded_by_check_and_by_suite():
    records = [
        record("loss.a", "not run", text="nothing is sharded", setting="fsdp2-2"),
        record("loss.a", "not run", text="nothing is sharded", setting="fsdp2-4"),
        record("packing.a", "not applicable", text="no packing", setting=""),
        record("packing.b", "not applicable", text="no packing", setting=""),
    ]
    assert lines(reasons(records)) == [
        "not run: loss.a [fsdp2-2, fsdp2-4]: nothing is sharded",
        "not applicable: packing (2 checks): no packing",
    ]


@pytest.mark.parametrize(
    ("outcomes", "line"),
    [
        (["passed", "not applicable"], "PASSED: verified 1 of 2 claims in 1 setting"),
        (
            ["passed", "failed"],
            "FAILED: 1 claim does not hold; verified 1 of 2 claims in 1 setting",
        ),
        (
            ["failed", "unexpected pass"],
            "FAILED: 2 claims do not hold; verified 0 of 2 claims in 1 setting",
        ),
        (["passed", "inconclusive"], "NO VERDICT on 1 claim; verified 1 of 2 claims in 1 setting"),
        (["passed", "adapter error"], "NO VERDICT on 1 claim; verified 1 of 2 claims in 1 setting"),
    ],
)
def test_the_last_line_says_what_was_verified(outcomes, line):
    records = [record(f"loss.{index}", outcome) for index, outcome in enumerate(outcomes)]
    assert conclusion(records)[0] == line


CHECKS = """
    import pytest

    @pytest.mark.parametrize("outcome", {outcomes!r})
    def test_check(outcome, request):
        request.node.ranks_outcome = outcome
        if outcome in ("not run", "not applicable"):
            pytest.skip(outcome)
        if outcome == "expected failure":
            pytest.xfail(outcome)
"""

CONFTEST = """
    import pytest

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item):
        report = yield
        if report.when == "call":
            report.ranks_check = {
                "subject": "mylib:Mine", "suite": "loss", "check": "loss.a", "setting": "single",
                "outcome": item.ranks_outcome, "text": "why", "cause": "", "seconds": 0.1,
            }
        return report
"""


@pytest.mark.parametrize(
    ("outcomes", "options", "problem"),
    [
        (["passed"], [], ""),
        (["passed", "not run"], [], ""),
        (["expected failure"], [], "FAILED: nothing was verified: no check passed or failed"),
        (["not run"], [], "FAILED: nothing was verified: no check passed or failed"),
        (["not applicable"], [], "FAILED: nothing was verified: no check passed or failed"),
        (
            ["passed", "not run"],
            ["--ranks-require=ranks:1"],
            "FAILED: 1 check was not run, and --ranks-require was given",
        ),
    ],
)
def test_a_session_that_verified_nothing_fails(pytester, outcomes, options, problem):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(CHECKS.format(outcomes=outcomes))
    result = pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:xdist", *options)
    if problem:
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines([problem])
    else:
        assert result.ret == pytest.ExitCode.OK
        result.stdout.no_fnmatch_line("FAILED:*")
