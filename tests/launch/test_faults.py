"""Faults that a test injects into its own ranks: when they strike, what they do, what is reported."""

from __future__ import annotations

import pytest

from launch.conftest import project

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def session(run_session):
    files = {f"test_{name}.py": project(f"fault_{name}") for name in ("places", "kinds")}
    return run_session(files, "-p", "no:randomly", "--ranks-timeout=60")


@pytest.fixture(scope="module")
def failing(run_session):
    return run_session(
        {"test_it.py": project("faults_missed")}, "-p", "no:randomly", "--ranks-timeout=60"
    )


def test_every_fault_strikes_where_it_should(session):
    bad = [(row.id, row.when, row.text) for row in session.rows if row.outcome == "failed"]
    assert not bad, session.output
    assert session.returncode == 0


def test_ranks_that_saw_a_fault_serve_no_other_test(session):
    before, during, after = (
        dict(map(tuple, session.call(f"test_pids_{name}").properties))["pids"]
        for name in ("before", "with", "after")
    )
    assert before == during
    assert set(before).isdisjoint(after)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "test_too_few",
            "Failed: faults.kill(rank=1, at='all_reduce#3') never happened: rank 1 issued 2 "
            "all_reduce, 1 barrier",
        ),
        (
            "test_none_at_all",
            "Failed: faults.delay(rank=0, seconds=1, at='#1') never happened: rank 0 issued no "
            "collective",
        ),
        (
            "test_too_few_steps",
            "Failed: faults.hang(rank=0, at=step(2, when='after')) never happened: rank 0 made 1 "
            "optimizer step",
        ),
        (
            "test_over_before",
            "Failed: faults.raise_(rank=0, exception=ValueError('late'), after=50) never "
            "happened: the test was over before",
        ),
        (
            "test_nothing_to_slow",
            "Failed: faults.slow_network slowed nothing: rank 0 issued no collective since",
        ),
        (
            "test_asked_for_late",
            "Failed: faults.kill(rank=0, at='barrier#1') never happened: rank 0 issued 0 barrier",
        ),
        (
            "test_not_declared",
            "died of SIGKILL without a report, after faults.kill(rank=1, at='all_reduce#1') at "
            "all_reduce#1",
        ),
        ("test_own_failure_says_more", "ValueError: own"),
        (
            "test_no_mark",
            "the fixture 'faults' needs a mark that says how many ranks: @pytest.mark.ranks(2).",
        ),
        (
            "test_in_a_kept_group",
            "mark ranks(keep_group=True): the fixture 'faults' leaves a process group that cannot "
            "be kept; give the test a mark without it.",
        ),
        (
            "test_no_processes",
            "mark ranks(fidelity='threads'): the fixture 'faults' needs a process a rank, expected "
            "fidelity 'gloo' or above.",
        ),
    ],
)
def test_a_fault_that_was_missed_or_not_declared_fails(failing, name, text):
    row = failing.call(name)
    assert row.outcome == "failed"
    assert text in row.text, row.text
    assert row.text.count("never happened") == text.count("never happened"), row.text
    assert "traceback entries are hidden" not in row.text


@pytest.mark.parametrize(
    "name",
    [
        *("no_such_rank", "no_such_time", "no_such_signal", "no_such_moment", "no_such_step"),
        *("no_exception", "no_network", "no_interface", "raised_at_once", "raised_in_a_collective"),
    ],
)
def test_a_bad_argument_is_shown_where_the_test_has_it(failing, name):
    text = failing.call(f"test_{name}").text
    assert "\n>       faults." in text or "\n>       dist.barrier()" in text, text
    assert "pytest_ranks/" not in text


def test_a_hang_that_takes_the_survivors_along_is_named(failing):
    lines = failing.call("test_survivor_hangs_too").text.splitlines()
    assert lines[0].startswith("timed out after 3 s: rank 0 was in all_reduce")
    assert "injected on rank 1: faults.hang(rank=1, at='all_reduce#1') at all_reduce#1" in lines
