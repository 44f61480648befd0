"""Deaths that a test declares: they are then required, and the survivors decide."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

SOURCE = """
import os, signal, time
import pytest, torch
import torch.distributed as dist


def die(how="SIGKILL"):
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_survivor_notices(rank, record_property):
    if rank.index == 1:
        die()
    with pytest.raises(RuntimeError, match="Connection closed by peer|Connection reset"):
        dist.all_reduce(torch.ones(1))
    record_property("survivor", rank.index)


@pytest.mark.ranks(2, expect_deaths={0: "SIGSEGV"}, isolate=True)
def test_rank_0_may_be_the_one(rank, record_property):
    if rank.index == 0:
        die("SIGSEGV")
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1))
    record_property("survivor", rank.index)


@pytest.mark.ranks(3, expect_deaths={1: 3, 2: 0})
def test_exit_codes_of_several(rank, record_property):
    if rank.index:
        os._exit({1: 3, 2: 0}[rank.index])
    record_property("survivor", rank.index)


@pytest.fixture
def deadly(rank):
    if rank.index == 1:
        die()


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_death_in_setup(deadly):
    pass


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_survivor_has_its_time(rank):
    # longer than the grace that ranks have after a death that nobody declared
    if rank.index == 1:
        die()
    time.sleep(3)


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_never_died(rank):
    pass


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_died_of_another_signal(rank):
    if rank.index == 1:
        die("SIGTERM")


@pytest.mark.ranks(2, expect_deaths={1: 3})
def test_exited_with_another_code(rank):
    if rank.index == 1:
        os._exit(4)


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_another_died(rank):
    if rank.index == 0:
        die()
    die()


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_survivor_fails_because_its_peer_died(rank):
    if rank.index == 1:
        die()
    dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_failed_before_its_death(rank, request):
    if rank.index == 1:
        request.addfinalizer(die)
        raise ValueError("before the end")


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
@pytest.mark.xfail(reason="survivors cannot", strict=True)
def test_survivors_are_expected_to_fail(rank):
    if rank.index == 1:
        die()
    raise ValueError("expected")


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_survivors_skip(rank):
    if rank.index == 1:
        die()
    pytest.skip("not today")


@pytest.fixture(scope="module")
def wide():
    return [os.getpid()]


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_wide_fixture_of_the_dead(rank, wide):
    if rank.index == 1:
        die()


@pytest.mark.ranks(2)
def test_wide_fixture_of_fresh_ranks(rank, wide):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2


@pytest.mark.ranks(2)
def test_after(rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2


@pytest.mark.ranks(2, expect_deaths={2: "SIGKILL"})
def test_no_such_rank(rank):
    pass
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_it.py": SOURCE}, "-p", "no:randomly", "--ranks-timeout=60")


@pytest.mark.parametrize(
    "name",
    [
        "test_survivor_notices",
        "test_rank_0_may_be_the_one",
        "test_exit_codes_of_several",
        "test_death_in_setup",
        "test_survivor_has_its_time",
        "test_wide_fixture_of_the_dead",
        "test_wide_fixture_of_fresh_ranks",
        "test_after",
    ],
)
def test_declared_deaths_that_happen_are_no_failure(session, name):
    assert [row.summary for row in session.of(name)] == [
        (when, "passed", None) for when in ("setup", "call", "teardown")
    ], session.output


@pytest.mark.parametrize(
    ("name", "survivor"),
    [
        ("test_survivor_notices", ["survivor", 0]),
        ("test_rank_0_may_be_the_one", ["survivor (rank 1)", 1]),
        ("test_exit_codes_of_several", ["survivor", 0]),
    ],
)
def test_the_survivor_is_the_one_that_reports(session, name, survivor):
    assert survivor in session.call(name).properties


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("test_never_died", "rank 1 was expected to die of SIGKILL, it passed"),
        (
            "test_died_of_another_signal",
            "rank 1 of 2 failed first: died of SIGTERM without a report, it was expected to die "
            "of SIGKILL",
        ),
        (
            "test_exited_with_another_code",
            "rank 1 of 2 failed first: exited with code 4 without a report, it was expected to "
            "exit with code 3",
        ),
        ("test_another_died", "rank 0 of 2 failed first: died of SIGKILL without a report"),
        ("test_failed_before_its_death", "rank 1 of 2 failed first: ValueError: before the end"),
        (
            "test_no_such_rank",
            "test_it.py::test_no_such_rank: mark ranks(expect_deaths={2: 'SIGKILL'}): rank 2, "
            "expected one from 0 to 1, since the world has 2.",
        ),
    ],
)
def test_other_ends_fail(session, name, first):
    row = session.call(name)
    assert row.outcome == "failed"
    assert row.text.startswith(first), row.text


def test_a_survivor_that_fails_because_its_peer_died_fails_the_test(session):
    row = session.call("test_survivor_fails_because_its_peer_died")
    assert row.outcome == "failed"
    assert row.text.splitlines()[0].startswith("rank 0 of 2 failed first: RuntimeError:")
    assert "rank 1 was expected to die of SIGKILL, and did" in row.text.splitlines()


def test_survivors_alone_are_skipped_or_expected_to_fail(session):
    assert session.call("test_survivors_skip").outcome == "skipped"
    row = session.call("test_survivors_are_expected_to_fail")
    assert (row.outcome, row.wasxfail) == ("skipped", "survivors cannot")
