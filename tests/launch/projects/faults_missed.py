"""Faults that never happen, strike undeclared, or have no place: each test fails."""

import pytest
import torch
import torch.distributed as dist

from pytest_ranks import step


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_too_few(rank, faults):
    faults.kill(rank=1, at="all_reduce#3")
    for _ in range(2):
        dist.all_reduce(torch.ones(1))
    dist.barrier()


@pytest.mark.ranks(2)
def test_none_at_all(rank, faults):
    faults.delay(rank=0, seconds=1, at="#1")


@pytest.mark.ranks(1)
def test_too_few_steps(rank, faults):
    faults.hang(rank=0, at=step(2, when="after"))
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1).step()


@pytest.mark.ranks(1)
def test_over_before(rank, faults):
    faults.raise_(rank=0, exception=ValueError("late"), after=50)


@pytest.mark.ranks(2)
def test_nothing_to_slow(rank, faults):
    faults.slow_network(latency=1)


@pytest.mark.ranks(1)
def test_asked_for_late(rank, request):
    request.getfixturevalue("faults").kill(rank=0, at="barrier#1")


@pytest.mark.ranks(2)
def test_not_declared(rank, faults):
    faults.kill(rank=1, at="all_reduce#1")
    dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(2, timeout=3)
def test_survivor_hangs_too(rank, faults):
    faults.hang(rank=1, at="all_reduce#1")
    dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(2)
def test_own_failure_says_more(rank, faults):
    faults.kill(rank=0, at="all_reduce#1")
    raise ValueError("own")


@pytest.mark.ranks(2)
def test_no_such_rank(rank, faults):
    faults.kill(rank=7)


@pytest.mark.ranks(2)
def test_no_such_time(rank, faults):
    faults.delay(1, "x")


@pytest.mark.ranks(2)
def test_no_such_signal(rank, faults):
    faults.kill(1, sig="no")


@pytest.mark.ranks(2)
def test_no_such_moment(rank, faults):
    faults.drop_store(at="nonsense")


@pytest.mark.ranks(2)
def test_no_such_step(rank, faults):
    faults.hang(1, at=step(0))


@pytest.mark.ranks(2)
def test_no_exception(rank, faults):
    faults.raise_(1, "no")


@pytest.mark.ranks(2)
def test_no_network(rank, faults):
    faults.slow_network()


@pytest.mark.ranks(2)
def test_no_interface(rank, faults):
    faults.slow_network(interface="none", latency=1)


@pytest.mark.ranks(2)
def test_raised_at_once(rank, faults):
    faults.raise_(1, ValueError("now"))


@pytest.mark.ranks(2)
def test_raised_in_a_collective(rank, faults):
    faults.raise_(1, ValueError("now"), at="barrier#1")
    dist.barrier()


def test_no_mark(faults):
    pass


@pytest.mark.ranks(2, keep_group=True)
class TestKept:
    def test_in_a_kept_group(self, rank, faults):
        pass


@pytest.mark.ranks(2, fidelity="threads")
def test_no_processes(rank, faults):
    pass
