"""Hangs outside of a test's body: each is reported with its place."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

HANGING = """
import time
import pytest, torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks(2, timeout=2)


def wait_for_ever():
    time.sleep(1000)


@pytest.fixture
def slow_setup(rank):
    if rank.index == 1:
        wait_for_ever()


def test_in_a_fixture(slow_setup, rank):
    dist.barrier()


@pytest.fixture
def slow_teardown(rank):
    yield
    if rank.index == 0:
        wait_for_ever()


def test_in_a_teardown(slow_teardown):
    pass


@pytest.mark.ranks(2, timeout=2, init=False)
def test_one_never_joins(rank):
    if rank.index == 0:
        dist.init_process_group("gloo")
    else:
        wait_for_ever()


@pytest.mark.ranks(2, timeout=2)
def test_in_a_process_of_its_own(rank):
    import subprocess
    if rank.index == 1:
        subprocess.run(["sleep", "1000"])
    dist.barrier()


@pytest.mark.ranks(2, timeout=60)
def test_an_exit_hook_that_hangs_holds_nobody(rank):
    import atexit
    atexit.register(wait_for_ever)


@pytest.mark.ranks(2, timeout=60)
def test_last(rank):
    dist.barrier()
"""
PLACE = r"\(test_hanging.py:\d+\)"


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_hanging.py": HANGING}, "-pno:randomly", "-pno:timeout")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "test_in_a_fixture",
            rf"timed out after 2 s: rank 0 was in barrier, called from test_in_a_fixture {PLACE}; "
            rf"rank 1 was in wait_for_ever {PLACE}",
        ),
        (
            "test_in_a_teardown",
            rf"timed out after 2 s: rank 0 was in wait_for_ever {PLACE}; rank 1 had finished",
        ),
        (
            "test_one_never_joins",
            rf"timed out after 2 s: rank 0 was in init_process_group, called from "
            rf"test_one_never_joins {PLACE}; rank 1 was in wait_for_ever {PLACE}",
        ),
        (
            "test_in_a_process_of_its_own",
            rf"timed out after 2 s: rank 0 was in barrier, called from "
            rf"test_in_a_process_of_its_own {PLACE}; rank 1 was in "
            rf"test_in_a_process_of_its_own {PLACE}",
        ),
    ],
)
def test_the_place_of_a_hang_is_named(session, name, said):
    rows = [row for row in session.of(name) if row.outcome == "failed"]
    assert len(rows) == 1, session.output
    assert re.fullmatch(said, rows[0].text.splitlines()[0]), rows[0].text


def test_the_stack_of_a_hang_in_a_fixture_shows_the_fixture(session):
    assert "in slow_setup" in session.call("test_in_a_fixture").text


@pytest.mark.parametrize("name", ["test_an_exit_hook_that_hangs_holds_nobody", "test_last"])
def test_the_others_pass(session, name):
    assert session.call(name).outcome == "passed", session.output
