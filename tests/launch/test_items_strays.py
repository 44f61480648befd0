"""Children that a test forked and let run on, and marks that came too late: neither is green."""

from __future__ import annotations

import pytest

from pytest_ranks.errors import RankFailure
from pytest_ranks.launch.host import RankHost
from pytest_ranks.launch.rank import STRAY
from pytest_ranks.launch.scan import LATE

pytest.importorskip("torch")

FILE = """
import os, signal, sys, time
import pytest

pytestmark = pytest.mark.ranks(2)


def test_the_rank_raises(rank):
    if rank.index == 1 and os.fork():
        time.sleep(1)
        raise ValueError("in the rank itself")


def test_after_that(rank):
    rank.barrier()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_rank_ends(rank, end):
    if rank.index == 1 and os.fork():
        os._exit(0) if end == "exit" else os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ranks(1)
def test_alone(rank):
    if os.fork():
        os._exit(0)


@pytest.fixture
def forks_at_the_end(rank):
    yield
    if rank.index == 0 and os.fork():
        raise ValueError("in the teardown of the rank")


def test_teardown(forks_at_the_end):
    pass


def test_a_child_that_ends_itself_is_no_stray(rank):
    child = os.fork()
    if child == 0:
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""
CONFTEST = """
import pytest

def pytest_collection_finish(session):
    for item in session.items:
        if item.name == "test_marked_late":
            item.add_marker(pytest.mark.ranks(2))
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_it.py": FILE}, "-p", "no:randomly", "-p", "no:rerunfailures")


@pytest.mark.parametrize(
    "name",
    [
        "test_the_rank_raises",
        "test_the_rank_ends[exit]",
        "test_the_rank_ends[kill]",
        "test_alone",
        "test_teardown",
    ],
)
def test_a_child_that_runs_on_does_not_speak_for_its_rank(session, name) -> None:
    bad = [row for row in session.of(name) if row.outcome == "failed"]
    assert bad, session.output
    # whichever is seen first: what the child says, or how the rank itself ended
    ends = (STRAY, "exited with code 0 without a report", "died of SIGKILL")
    assert any(end in row.text for row in bad for end in ends), bad[0].text


@pytest.mark.parametrize("name", ["test_after_that", "test_a_child_that_ends_itself_is_no_stray"])
def test_innocent_tests_pass(session, name) -> None:
    assert session.call(name).outcome == "passed", session.output


def fork_and_return() -> int:
    import os

    if os.fork():
        raise ValueError("in the rank itself")
    return 5


def test_a_function_is_not_answered_by_a_child() -> None:
    with RankHost(preload=("torch",)) as host, pytest.raises(RankFailure) as caught:
        host.run(fork_and_return, world_size=1)
    assert STRAY in str(caught.value) or "in the rank itself" in str(caught.value)


def test_a_mark_that_comes_too_late_fails(run_session, tmp_path) -> None:
    session = run_session(
        {
            "late.py": CONFTEST,
            "test_it.py": "import pytest\n\ndef test_marked_late(): pass\n\n"
            "@pytest.mark.ranks(2)\ndef test_in_time(rank): pass\n",
        },
        *("-p", "late", "-p", "no:randomly", "-p", "no:rerunfailures"),
        env={"PYTHONPATH": python_path()},
    )
    row = session.call("test_marked_late")
    assert row.outcome == "failed"
    assert f"test_it.py::test_marked_late: {LATE}" in row.text
    assert session.call("test_in_time").outcome == "passed"


def python_path() -> str:
    import os

    return os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
