"""Ranks that are threads: real data and branches, fixtures of their own, the same outcomes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from launch.conftest import project

NO_SUBTESTS = (
    "fidelity 'threads' cannot show subtests (the fixture subtests, unittest's self.subTest): "
    "pytest counts them once a process, not once a thread; run the test at fidelity 'gloo' or "
    "above, or write it without subtests."
)


@pytest.fixture(scope="module")
def found(run_session):
    return run_session({"test_it.py": project("threads")}, "-p", "no:randomly")


@pytest.mark.parametrize(
    "name",
    [
        "test_fixtures_and_collectives",
        "test_each_rank_draws_what_a_process_would",
        "test_trainers",
        "test_point_to_point",
        "test_mesh",
        "test_own_initialisation",
        "test_parameters[1]",
        "test_parameters[2]",
        "test_first",
        "test_second",
        "test_log_is_of_all_ranks",
        "test_variables_are_of_the_process",
        "test_the_next_test_finds_the_process_as_it_was",
        "test_globals_are_shared",
        "test_pythons_random_is_shared",
        "test_a_collective_is_over_when_it_was_called",
        "test_signals",
        "test_patches_of_others",
        "test_a_process_is_not_used_again_after_patches",
    ],
)
def test_what_threads_show_and_where_they_end(found, name):
    row = found.call(name)
    assert row.outcome == "passed", row.text
    assert ["fidelity", "threads"] in row.properties


def test_outcomes_are_those_of_processes(found):
    assert found.call("test_skipped").outcome == "skipped"
    assert "everywhere" in found.call("test_skipped").text
    known = found.call("test_known")
    assert (known.outcome, known.wasxfail) == ("skipped", "known")
    assert ["value", 2] in found.call("test_parameters[2]").properties


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (
            "test_one_fails",
            "fidelity threads: rank 2 of 4 failed first (ranks 0, 1 and 3 were cut off in "
            "barrier): assert 2 == 7",
        ),
        (
            "test_fails_in_setup_of_one",
            "fidelity threads: rank 1 of 4 failed first (ranks 0, 2 and 3 were cut off in "
            "barrier): ValueError: no",
        ),
        (
            "test_ranks_disagree",
            "fidelity threads: the ranks disagree: ranks 0, 2 and 3 passed, rank 1 skipped",
        ),
        (
            "test_hangs",
            "fidelity threads: timed out after 3 s: rank 0 was in barrier, called from test_hangs "
            "(test_it.py:",
        ),
        (
            "test_dies",
            "fidelity threads: rank 0 of 2 failed first (rank 1 died too): exited with code 3 "
            "without a report",
        ),
    ],
)
def test_failures_name_the_rank(found, name, head):
    row = found.call(name)
    assert row.outcome == "failed"
    assert row.text.startswith(head)


def test_what_was_printed_is_of_all_ranks_together(found):
    sections = dict(found.call("test_one_fails").sections)
    printed = sections["Captured stdout call (ranks 0, 1, 2 and 3)"]
    assert sorted(printed.splitlines()) == [f"printed by {number}" for number in range(4)]


def test_a_hang_shows_the_stack_of_each_rank(found):
    text = found.call("test_hangs").text
    first, second = text.split("stacks of rank 0:")[1].split("stacks of rank 1:")
    assert "in barrier" in first
    assert "in barrier" not in second
    assert "in test_hangs" in second


def test_a_death_says_that_all_shared_a_process(found):
    text = found.call("test_dies").text
    line = "all ranks of fidelity 'threads' are threads of one process: what ends it ends them all"
    assert line in text


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "test_different_collectives",
            ["broadcast(src=0, float32[3])", "all_reduce(SUM, float32[3])", "(test_it.py:"],
        ),
        (
            "test_different_shapes",
            ["broadcast(src=0, float32[1])", "broadcast(src=0, float32[4])", "(test_it.py:"],
        ),
        (
            "test_one_never_comes",
            [
                "no rank can go on: rank 0 waits in all_reduce(SUM, float32[3]); rank 2 waits in "
                "all_reduce(SUM, float32[3]); rank 3 waits in all_reduce(SUM, float32[3]); rank 1 "
                "had finished"
            ],
        ),
        (
            "test_a_receive_that_nobody_sends",
            [
                "no rank can go on: rank 0 waits in recv from rank 1 of its group; rank 1 had "
                "finished; rank 2 had finished; rank 3 had finished"
            ],
        ),
        (
            "test_capsys",
            [
                "fidelity 'threads' cannot show capsys: output is captured once a process, not "
                "once a thread; run the test at fidelity 'gloo' or above."
            ],
        ),
        ("test_subtests_by_unittest", [f"FidelityError: {NO_SUBTESTS}", ">           with self."]),
        pytest.param(
            "test_fixture_subtests",
            [f"Failed: {NO_SUBTESTS}\nreproduce"],
            marks=pytest.mark.skipif(
                find_spec("_pytest.subtests") is None, reason="needs the subtests of pytest 9"
            ),
        ),
        (
            "test_receive_from_anybody",
            [
                "fidelity 'threads' cannot show recv from any rank: threads meet by name; run the "
                "test at fidelity 'gloo' or above."
            ],
        ),
        ("test_exits", ["enough"]),
    ],
)
def test_what_goes_wrong_is_said_at_once(found, name, texts):
    row = found.call(name)
    assert row.outcome == "failed"
    assert all(text in row.text for text in texts), row.text


def test_the_session_chooses_for_tests_that_allow_it(run_session):
    text = """
import pytest

@pytest.mark.ranks([1, 3], lowest_fidelity="threads")
def test_allows(rank):
    assert rank.gather(rank.index) == list(range(rank.world_size))

@pytest.mark.ranks(2)
def test_says_nothing(rank):
    assert rank.fidelity == "gloo"
"""
    found = run_session({"test_it.py": text}, env={"RANKS_FIDELITY": "threads"})
    assert found.returncode == 0
    assert "ranks: fidelity=threads (from RANKS_FIDELITY)" in found.output
    for size in (1, 3):
        row = found.call(f"test_allows[ws={size}]")
        assert dict(row.properties)["fidelity"] == "threads"
