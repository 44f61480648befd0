"""What a test on a rank may do that is neither a pass nor a plain exception: outcome and text."""

from __future__ import annotations

import re

import pytest

from launch.conftest import project

pytest.importorskip("torch")


WIDE = """
import os
import pytest

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(scope="module")
def wide():
    yield
    if os.environ["RANK"] == "1":
        os._exit(3)


def test_fails_before_a_wide_teardown_dies(wide, rank):
    assert rank.index == 1


def test_dies_in_a_wide_teardown(wide):
    pass
"""


@pytest.fixture(scope="module")
def session(run_session):
    files = {"test_it.py": project("endings"), "test_wide.py": WIDE}
    return run_session(files, "-p", "no:randomly", "-p", "no:rerunfailures")


CUT = r"rank 1 of 2 failed first \(rank 0 was cut off in all_reduce\): "
FIRST = r"rank 1 of 2 failed first: "
DISAGREE = r"the ranks disagree: "


@pytest.mark.parametrize(
    ("name", "when", "headline"),
    [
        ("test_fail", "call", CUT + "Failed: said so"),
        (
            "test_did_not_raise",
            "call",
            CUT + "Failed: DID NOT RAISE (ValueError|<class 'ValueError'>)",
        ),
        ("test_importorskip", "call", DISAGREE + "rank 0 passed, rank 1 skipped"),
        ("test_skip_in_a_fixture", "call", DISAGREE + "rank 0 passed, rank 1 skipped"),
        ("test_skipif_by_rank", "call", DISAGREE + "rank 0 passed, rank 1 skipped"),
        ("test_xfail_in_a_fixture", "call", DISAGREE + "rank 0 passed, rank 1 xfailed"),
        ("test_xfail_raises_another", "call", FIRST + "KeyError: 'other'"),
        (
            "test_xfail_raises_with_peers_cut_off",
            "call",
            DISAGREE + "rank 0 was cut off in all_reduce, rank 1 xfailed",
        ),
        (
            "test_xfail_does_not_expect_a_death",
            "call",
            FIRST + "exited with code 9 without a report",
        ),
        (
            "test_strict_by_rank",
            "call",
            DISAGREE + r"rank 0 xpassed \(strict\), rank 1 passed",
        ),
        ("test_sys_exit_0", "call", FIRST + "SystemExit: 0"),
        ("test_sys_exit_3", "call", CUT + "SystemExit: 3"),
        ("test_os_exit_0", "call", FIRST + "exited with code 0 without a report"),
        ("test_os_exit_in_a_thread", "call", CUT + "exited with code 5 without a report"),
        ("test_exit_in_a_fixture", "setup", FIRST + "SystemExit: 0"),
        ("test_exit_in_teardown", "teardown", FIRST + "SystemExit: 0"),
        ("test_keyboard_interrupt", "call", CUT + "KeyboardInterrupt"),
        ("test_generator_exit", "call", FIRST + "GeneratorExit"),
        ("test_cancelled", "call", FIRST + "asyncio.exceptions.CancelledError: gone"),
        ("test_unpicklable", "call", FIRST + "test_it.Unpicklable: holds a lock"),
        ("test_bad_str", "call", FIRST + r"test_it.BadStr: <exception str\(\) failed>"),
        ("test_worse_str", "call", FIRST + r"test_it.WorseStr: <exception str\(\) failed>"),
        ("test_bad_str_of_an_interrupt", "call", FIRST + ".*BadStrInterrupt.*"),
        (
            "test_bad_repr_of_a_value",
            "call",
            FIRST + r"AssertionError: assert <\[RuntimeError\('no repr'\) raised in repr\(\)\] "
            r"BadValue object at 0x[0-9a-f]+> == 3",
        ),
        ("test_recursion", "call", FIRST + "RecursionError: maximum recursion depth exceeded.*"),
        ("test_group", "call", FIRST + r"ExceptionGroup: several \(2 sub-exceptions\)"),
        ("test_base_group", "call", FIRST + r"BaseExceptionGroup: several \(2 sub-exceptions\)"),
        ("test_surrogates", "call", FIRST + r"ValueError: a .* surrogate"),
        ("test_bytes_that_are_no_text", "call", FIRST + "exited with code 3 without a report"),
        ("test_ten_megabytes", "call", FIRST + r"Failed: x+ \[\.\.\. \d+ characters\]"),
        ("test_chained", "call", CUT + "ValueError: root"),
        (
            "test_exception_in_a_thread",
            "call",
            FIRST + "pytest.PytestUnhandledThreadExceptionWarning: Exception in thread worker",
        ),
        (
            "test_unraisable",
            "call",
            FIRST + "pytest.PytestUnraisableExceptionWarning: Exception ignored .*",
        ),
        ("test_warning", "call", FIRST + "UserWarning: careful"),
        (
            "test_setup_and_teardown",
            "setup",
            r"rank 0 of 2 failed first \(rank 1 failed too\): RuntimeError: in setup",
        ),
        ("test_call_and_teardown", "call", FIRST + "ValueError: in call"),
        (
            "test_alone_in_a_collective",
            "call",
            r"rank 1 was in all_reduce, called from wait_for_all \(test_it.py:\d+\), "
            r"waiting for rank 0 that had finished",
        ),
        (
            "test_unawaited_on_one",
            "call",
            DISAGREE + r"rank 1 issued all_reduce #1 of float32 \[3\] in test_unawaited_on_one "
            r"\(test_it.py:\d+\) and never waited for it, rank 0 never issued it",
        ),
        (
            "test_unawaited_in_a_subgroup",
            "call",
            DISAGREE + r"rank 1 issued all_reduce #1 of float32 \[3\] in "
            r"test_unawaited_in_a_subgroup \(test_it.py:\d+\) and never waited for it, "
            r"rank 0 never issued it",
        ),
        (
            "test_unawaited_on_two",
            "call",
            DISAGREE + r"rank.* issued broadcast #1 of float32 \[3\] in test_unawaited_on_two "
            r"\(test_it.py:\d+\) and never waited for it, rank 1 never issued it",
        ),
    ],
)
def test_it_fails_in_its_phase_and_names_the_rank(session, name, when, headline):
    row = next(row for row in session.of(name) if row.outcome != "passed")
    assert (row.outcome, row.when) == ("failed", when), row.text[:2000]
    first, *rest = row.text.splitlines()
    assert re.fullmatch(headline, first), row.text[:2000]
    assert rest[-1] == f"reproduce: pytest 'test_it.py::{name}'"


@pytest.mark.parametrize(
    ("name", "when", "outcome"),
    [
        ("test_xfail_raises", "call", "skipped"),
        ("test_xfail_with_peers_cut_off", "call", "skipped"),
        ("test_xfail_not_run", "setup", "skipped"),
        ("test_unawaited_on_all", "call", "passed"),
        ("test_messages_between_two", "call", "passed"),
        ("test_last", "call", "passed"),
    ],
)
def test_it_is_no_failure(session, name, when, outcome):
    row = session.call(name)
    assert (row.outcome, row.when) == (outcome, when), row.text
    assert (row.wasxfail is None) == (outcome == "passed")


def test_nothing_else_failed(session):
    assert session.returncode == 1
    assert "INTERNALERROR" not in session.output
    assert len({row.id for row in session.rows}) == (project("endings") + WIDE).count("\ndef test_")


def test_a_teardown_after_a_failure_is_an_error_of_its_own(session):
    rows = [row for row in session.of("test_call_and_teardown") if row.outcome == "failed"]
    assert [row.when for row in rows] == ["call", "teardown"]
    assert "rank 1 then failed in teardown too: RuntimeError: in teardown" in rows[0].text
    assert rows[1].text.startswith("rank 1 of 2 failed first: RuntimeError: in teardown")


def test_a_death_in_a_wide_teardown_is_an_error(session):
    rows = [row for row in session.of("test_fails_before_a_wide_teardown_dies") if row.text]
    assert [row.when for row in rows] == ["call", "teardown"]
    assert rows[1].text.splitlines()[0] == (
        "teardown of wider fixtures failed: rank 1: exited with code 3 without a report"
    )
    row = session.call("test_dies_in_a_wide_teardown")
    assert row.text.startswith("rank 1 of 2 failed first: exited with code 3 without a report")


def test_another_rank_in_another_phase_is_told_with_its_line(session):
    text = session.call("test_setup_and_teardown").text
    assert re.search(
        r"^rank 1 failed too: RuntimeError: in teardown \(test_it.py:\d+\)$", text, re.MULTILINE
    )


def test_a_peers_own_exception_over_a_cut_connection_is_collateral(session):
    text = session.call("test_chained").text
    assert "\ncollateral: rank 0 KeyError: 'my trainer failed'\n" in text


def test_the_cause_of_an_exception_in_a_thread_is_there(session):
    assert "ZeroDivisionError: division by zero" in session.call("test_exception_in_a_thread").text


def test_each_of_a_group_is_there(session):
    text = session.call("test_group").text
    assert "ValueError: one" in text
    assert "KeyError: 'two'" in text


def test_bytes_that_are_no_text_are_shown_as_such(session):
    text = session.call("test_bytes_that_are_no_text").text
    assert "last output of rank 1:\n  \ufffd caf\ufffd\n" in text


EXIT = """
import pytest

pytestmark = pytest.mark.ranks(2)


def test_before(rank):
    pass


def test_exits(rank):
    if rank.index == 1:
        pytest.exit("enough", returncode=7)


def test_after(rank):
    pass
"""


def test_pytest_exit_on_a_rank_ends_the_session_as_in_a_plain_test(run_session):
    session = run_session({"test_it.py": EXIT}, "-p", "no:randomly")
    assert session.returncode == 7
    assert "_pytest.outcomes.Exit: rank 1 of 2: enough" in session.output
    assert [row.id for row in session.rows if row.when == "call"] == [
        "test_it.py::test_before",
        "test_it.py::test_exits",
    ]
    row = session.call("test_exits")
    assert row.outcome == "failed"
    assert row.text.splitlines()[0] == ("rank 1 of 2 failed first: called pytest.exit: enough")


LATE_EXIT = """
import time
import pytest

pytestmark = pytest.mark.ranks(2)


@pytest.fixture
def first(rank):
    path = rank.shared_tmp_path / "first"
    yield path
    path.touch()


def test_exits(rank, first):
    if rank.index == 0:
        raise ValueError("root")
    while not first.exists():
        time.sleep(0.01)
    pytest.exit("enough", returncode=7)


def test_after(rank):
    pass
"""


def test_pytest_exit_that_follows_a_failure_does_not_end_the_session(run_session):
    session = run_session({"test_it.py": LATE_EXIT}, "-p", "no:randomly")
    assert session.returncode == 1, session.output
    assert session.call("test_after").outcome == "passed"
    first = session.call("test_exits").text.splitlines()[0]
    assert re.fullmatch(r"rank 0 of 2 failed first \(.*\): ValueError: root", first)
