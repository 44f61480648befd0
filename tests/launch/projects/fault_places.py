"""Faults strike where they should: at a collective, at an optimizer step, after a time, at once."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pytest_ranks import step


def reduce_one():
    one = torch.ones(1)
    dist.all_reduce(one)
    return one.item()


def is_alive(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_kill_waits_until_the_peer_is_inside(rank, faults):
    faults.kill(rank=1, at="all_reduce#3")
    victim = rank.gather(os.getpid())[1]
    assert (reduce_one(), reduce_one()) == (2, 2)
    if rank.index == 0:
        for _ in range(100):  # the other is there long before: it waits to die inside
            assert is_alive(victim)
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"Connection closed by peer|Connection reset"):
        reduce_one()
    rank.shared_tmp_path.joinpath(str(rank.index)).touch()
    assert [path.name for path in rank.shared_tmp_path.iterdir()] == ["0"]


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_any_collective_is_counted(rank, faults, record_property):
    faults.kill(rank=1, at="#4")
    dist.barrier()  # 1
    rank.gather(0)  # 2 and 3: it exchanges the lengths first
    record_property("reached", 3)
    with pytest.raises(RuntimeError):
        dist.broadcast(torch.ones(1), 0)


@pytest.mark.ranks(2, expect_deaths={0: "SIGKILL"})
def test_reducer_of_ddp(rank, faults):
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    faults.kill(rank=0, at="all_reduce#2")
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 2)).sum().backward()


@pytest.mark.ranks(2, expect_deaths={1: "SIGABRT"})
def test_reduce_scatter_of_fsdp(rank, faults):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(2, 2)
    fully_shard(model)
    faults.kill(rank=1, sig="SIGABRT", at="reduce_scatter_tensor#1")
    loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_collective_of_a_tensor_in_parts(rank, faults):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    parts = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
    faults.kill(rank=1, at="all_gather_into_tensor#1")
    with pytest.raises(RuntimeError):
        parts.full_tensor()


@pytest.mark.ranks(2, init=False, expect_deaths={1: "SIGKILL"})
def test_a_group_of_the_tests_own(rank, faults):
    faults.kill(rank=1, at="all_reduce#2")
    dist.init_process_group("gloo")
    assert reduce_one() == 2
    with pytest.raises(RuntimeError):
        reduce_one()


@pytest.fixture
def doomed(rank, faults):
    faults.kill(rank=1, at=step(2))


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_optimizer_step_and_a_fixture_that_arms(rank, doomed):
    model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(RuntimeError):
        for number in range(4):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            rank.shared_tmp_path.joinpath(f"{rank.index}-{number}").touch()
    names = {path.name for path in rank.shared_tmp_path.iterdir()}
    assert names == {"0-0", "0-1", "1-0"}


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("when", "left"), [("before", 9.0), ("after", 8.0)])
def test_before_and_after_a_step(rank, faults, when, left):
    weight = torch.nn.Parameter(torch.tensor(10.0))
    optimizer = torch.optim.SGD([weight], lr=1)
    faults.raise_(rank=0, exception=ConnectionError("switch"), at=step(2, when=when))
    with pytest.raises(ConnectionError, match="switch"):
        for _ in range(3):
            weight.grad = torch.tensor(1.0)
            optimizer.step()
    assert weight.item() == left


@pytest.mark.ranks(1)
def test_raises_out_of_backward(rank, faults):
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    faults.raise_(rank=0, exception=ConnectionError, at="all_reduce#1")
    with pytest.raises(ConnectionError):
        model(torch.ones(1, 2)).sum().backward()


@pytest.mark.ranks(2)
def test_raises_on_one_rank_before_it_takes_part(rank, faults):
    faults.raise_(rank=1, exception=ConnectionError("flap"), at="all_reduce#1")
    if rank.index == 1:
        with pytest.raises(ConnectionError, match="flap"):
            reduce_one()
    assert reduce_one() == 2


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_after_a_time(rank, faults):
    faults.kill(rank=1, after=0.1)
    if rank.index == 1:
        time.sleep(60)


@pytest.mark.ranks(2)
def test_after_a_time_in_the_main_thread(rank, faults):
    faults.raise_(rank=1, exception=InterruptedError("now"), after=0.1)
    if rank.index == 1:
        with pytest.raises(InterruptedError, match="now"):
            time.sleep(60)
    faults.delay(rank=0, seconds=0.2, after=0.05)
    if rank.index == 0:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.3:
            last = time.monotonic()
            time.sleep(0.01)
            if time.monotonic() - last >= 0.2:
                break
        else:
            raise AssertionError("never slept")


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_at_once(rank, faults):
    faults.kill(rank=1)
    assert rank.index == 0
