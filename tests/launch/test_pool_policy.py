"""How long ranks serve: until they are worn, until a test fails, or until they die idle."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

WORN = """
import os
import pytest


@pytest.mark.parametrize("number", range(5))
@pytest.mark.ranks(2)
def test_counted(number, rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
"""
FAILING = """
import os
import pytest, torch
import torch.distributed as dist


@pytest.fixture
def pids(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.mark.ranks(2)
def test_fails(rank, pids):
    if rank.index == 1:
        raise ValueError("before the collective")
    dist.all_reduce(torch.full((1,), 100.0))


@pytest.mark.ranks(2)
def test_after_failure(rank, pids):
    found = torch.ones(1)
    dist.all_reduce(found)
    assert found == 2


@pytest.mark.ranks(2, keep_group=True)
class TestKept:
    def test_fails_here(self, rank, pids):
        assert rank.index == 0

    def test_after_that(self, rank, pids):
        assert dist.group.WORLD._get_sequence_number_for_group() in (1, 2)  # of `pids` alone
        found = torch.ones(1)
        dist.all_reduce(found)
        assert found == 2


@pytest.fixture(scope="module")
def wide(rank_group):
    return rank_group


@pytest.fixture(scope="module")
def rank_group():
    return dist.group.WORLD


@pytest.mark.ranks(2)
def test_fails_with_a_wide_fixture(wide, rank, pids):
    assert rank.index == 0


@pytest.mark.ranks(2)
def test_after_it(wide, rank, pids):
    pass


@pytest.mark.ranks(2)
def test_dies(rank, pids):
    if rank.index == 1:
        os._exit(3)


@pytest.mark.ranks(2)
def test_after_death(rank, pids):
    pass
"""
IDLE = """
import os, signal
from pathlib import Path
import pytest


@pytest.mark.ranks(2)
def test_first(rank):
    pids = rank.gather(os.getpid())
    Path("pids").write_text(str(pids[1]))


def test_kills_an_idle_rank():
    pid = int(Path("pids").read_text())
    watched = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    import select
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    assert poll.poll(60_000)


@pytest.mark.ranks(2)
def test_second(rank):
    assert str(os.getpid()) != Path("pids").read_text()
"""
PLAIN = ("-p", "no:randomly", "-p", "no:rerunfailures")


def pids(session, name):
    return set(dict(session.call(name).properties)["pids"].split())


def test_ranks_serve_as_many_tests_as_they_may(run_session):
    session = run_session({"test_it.py": WORN}, *PLAIN, "-o", "ranks_max_uses=2")
    assert session.returncode == 0, session.output
    found = [pids(session, f"test_counted[{number}]") for number in range(5)]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert len(set.union(*found)) == 6


@pytest.fixture(scope="module")
def reusing(run_session):
    return run_session({"test_it.py": FAILING}, *PLAIN, "-o", "ranks_reuse_after_failure=true")


def test_ranks_serve_on_after_a_failure_where_the_project_wants_that(reusing):
    bad = {row.id.partition("::")[2] for row in reusing.rows if row.outcome != "passed"}
    assert bad == {
        "test_fails",
        "TestKept::test_fails_here",
        "test_fails_with_a_wide_fixture",
        "test_dies",
    }, reusing.output
    assert pids(reusing, "test_fails") == pids(reusing, "test_after_failure")
    assert pids(reusing, "TestKept::test_fails_here") == pids(reusing, "TestKept::test_after_that")


def test_ranks_with_a_broken_fixture_or_a_dead_rank_never_serve_on(reusing):
    failed = pids(reusing, "test_fails_with_a_wide_fixture")
    assert failed.isdisjoint(pids(reusing, "test_after_it"))
    assert pids(reusing, "test_after_failure").isdisjoint(pids(reusing, "test_after_death"))


def test_ranks_that_died_idle_are_replaced_and_that_is_said(run_session):
    session = run_session({"test_it.py": IDLE}, *PLAIN)
    assert session.returncode == 0, session.output
    assert session.call("test_second").sections == [
        [
            "Idle ranks",
            "the ranks that last ran test_it.py::test_first ended while idle: "
            "rank 1 died of SIGKILL",
        ]
    ]


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (("--ranks-reuse-after-failure=true",), {}, "reuse_after_failure=True"),
        ((), {"RANKS_REUSE_AFTER_FAILURE": "1"}, "(from RANKS_REUSE_AFTER_FAILURE)"),
        ((), {"RANKS_REUSE_AFTER_FAILURE": "perhaps"}, "found 'perhaps', expected true or false"),
        (("--ranks-max-uses=0",), {}, "expected a whole number of at least 1"),
    ],
)
def test_the_settings_can_be_given_anywhere(run_session, arguments, env, said):
    session = run_session({"test_it.py": "def test_it(): pass"}, *arguments, env=env)
    assert said in session.output


WIDE = """
import os, time
import pytest, torch
import torch.distributed as dist


@pytest.fixture
def pids(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.mark.ranks(8)
def test_of_eight(rank, pids):
    pass


@pytest.mark.ranks(1)
def test_of_one_beside_eight(rank, pids):
    pass


@pytest.mark.ranks(4)
def test_of_four(rank, pids):
    pass


@pytest.mark.ranks(dp=2)
def test_of_two(rank, pids):
    found = torch.ones(1)
    dist.all_reduce(found)
    assert (found, rank.world_size, dist.get_world_size()) == (2, 2, 2)
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert rank.mesh.size() == 2


@pytest.mark.ranks(4)
def test_of_four_again(rank, pids):
    found = torch.ones(1)
    dist.all_reduce(found)
    assert found == 4


@pytest.mark.ranks(3)
def test_of_three(rank, pids):
    assert rank.gather(rank.index) == [0, 1, 2]


@pytest.mark.ranks(2, isolate=True)
def test_alone(rank, pids):
    pass


@pytest.mark.ranks(2, keep_group=True)
class TestKept:
    def test_kept(self, rank, pids):
        pass


@pytest.mark.ranks(2, timeout=60)
def test_waits_in_vain(rank, pids):
    if rank.index == 1:
        dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(4)
def test_of_four_after_that(rank, pids):
    pass
"""


@pytest.fixture(scope="module")
def wide(run_session):
    return run_session({"test_it.py": WIDE}, *PLAIN)


def test_a_narrow_test_runs_on_some_of_the_idle_ranks_of_a_wide_one(wide):
    bad = {row.id.partition("::")[2] for row in wide.rows if row.outcome != "passed"}
    assert bad == {"test_waits_in_vain"}, wide.output
    four = pids(wide, "test_of_four")
    assert len(four) == 4
    assert four < pids(wide, "test_of_eight")
    assert four == pids(wide, "test_of_four_again")
    assert len(pids(wide, "test_of_two")) == 2
    assert pids(wide, "test_of_two") < four
    assert pids(wide, "test_of_three") < four


def test_what_asks_for_ranks_of_its_own_gets_them(wide):
    four = pids(wide, "test_of_four")
    assert pids(wide, "test_alone").isdisjoint(four)
    assert pids(wide, "TestKept::test_kept").isdisjoint(four)


def test_a_failure_on_some_ranks_is_told_of_these_and_ends_all(wide):
    failed = wide.call("test_waits_in_vain")
    assert "rank 1 was in all_reduce" in failed.text
    assert "waiting for rank 0 that had finished" in failed.text
    assert "rank 2" not in failed.text
    assert pids(wide, "test_of_four").isdisjoint(pids(wide, "test_of_four_after_that"))


def test_a_few_ranks_are_not_taken_out_of_very_many(wide):
    assert pids(wide, "test_of_one_beside_eight").isdisjoint(pids(wide, "test_of_eight"))


AHEAD = """
import os, time
from pathlib import Path
import pytest
from pytest_ranks.launch.processes import children, descendants


@pytest.mark.ranks(3)
def test_fails(rank):
    Path(f"old{rank.index}").write_text(str(os.getpid()))
    assert False


def test_nobody_asks_for_ranks(record_property):
    old = {int(path.read_text()) for path in Path().glob("old?")}
    end, found = time.monotonic() + 60, []
    while len(found) < 4 and time.monotonic() < end:  # three ranks, beside the store
        below = [set(children(pid)) - old for pid in descendants(os.getpid())]
        found = max(below, key=len, default=[])
        time.sleep(0.01)
    record_property("pids", " ".join(map(str, found)))


@pytest.mark.ranks(3)
def test_next(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
"""


def test_the_ranks_that_replace_others_are_there_before_they_are_needed(run_session):
    session = run_session({"test_it.py": AHEAD}, *PLAIN)
    bad = {row.id.partition("::")[2] for row in session.rows if row.outcome != "passed"}
    assert bad == {"test_fails"}, session.output
    assert pids(session, "test_next") < pids(session, "test_nobody_asks_for_ranks")
