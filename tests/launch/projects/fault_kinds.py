"""What each kind of fault does, what is refused, and that torch is left as it was."""

import os
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pytest_ranks import BadInputError, RankFailure, inject_faults
from pytest_ranks.launch.injection.traffic_control import has_own_network


def reduce_one():
    one = torch.ones(1)
    dist.all_reduce(one)
    return one.item()


@pytest.mark.ranks(2)
def test_delay(rank, faults):
    faults.delay(rank=1, seconds=0.3, at="barrier#1")
    begin = time.monotonic()
    dist.barrier()
    if rank.index == 1:
        assert time.monotonic() - begin >= 0.3


@pytest.mark.ranks(2)
def test_hang(rank, faults, record_property):
    faults.hang(rank=1, at="all_reduce#2")
    group = dist.new_group(timeout=timedelta(seconds=1))
    one = torch.ones(1)
    dist.all_reduce(one, group=group)
    with pytest.raises(RuntimeError, match=r"Timed out|timeout"):
        dist.all_reduce(one, group=group)
    record_property("survived", rank.index)


@pytest.mark.ranks(2)
def test_a_handler_of_the_signal_runs(rank, faults):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    faults.kill(rank=0, sig=signal.SIGTERM, at="all_reduce#1")
    assert reduce_one() == 2
    signal.signal(signal.SIGTERM, before)
    assert got == ([signal.SIGTERM] if rank.index == 0 else [])


@pytest.mark.ranks(2)
def test_a_handler_that_exits_raises_in_the_test(rank, faults):
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    faults.kill(rank=1, sig="SIGTERM", at="barrier#1")
    if rank.index == 1:
        with pytest.raises(SystemExit):
            dist.barrier()
    dist.barrier()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.ranks(2)
def test_drop_store(rank, faults):
    assert reduce_one() == 2
    port = int(os.environ["MASTER_PORT"])
    socket.create_connection(("127.0.0.1", port)).close()
    dist.barrier()
    faults.drop_store(at="barrier#2")
    dist.barrier()
    with pytest.raises(RuntimeError):
        dist.new_group()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert reduce_one() == 2  # the connections between ranks are still there


@pytest.mark.ranks(2)
def test_slow_network(rank, faults):
    values = torch.arange(1000, dtype=torch.float32)
    faults.slow_network(bandwidth=40_000, latency=0.01)
    begin = time.monotonic()
    work = dist.all_reduce(values, async_op=True)  # 2 steps, 4,000 bytes a rank: 0.12 s
    assert not work.is_completed()
    work.wait()
    assert time.monotonic() - begin >= 0.12
    assert work.is_completed()
    assert torch.equal(values, 2 * torch.arange(1000))
    begin = time.monotonic()
    works = [dist.all_reduce(values, async_op=True) for _ in range(2)]
    for work in works:
        work.wait()
    assert time.monotonic() - begin >= 0.24  # one after the other


@pytest.mark.ranks(2)
def test_the_network_of_the_machine_is_left_alone(rank, faults):
    if has_own_network():
        pytest.skip("needs to run in the network of the machine")
    with pytest.raises(BadInputError) as caught:
        faults.slow_network(bandwidth=1e6, interface="none")
    assert str(caught.value) == (
        "faults.slow_network(interface='none'): found ranks in the network of this machine, "
        "expected a network namespace of their own: an interface is slow for all who use it. "
        "Without interface= only the collectives of this test are."
    )


@pytest.mark.ranks(2)
def test_slow_network_under_trainers(rank, faults):
    from torch.distributed.fsdp import fully_shard

    ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
    fsdp = torch.nn.Linear(2, 2)
    fully_shard(fsdp)
    faults.slow_network(latency=0.1)
    for model, least in ((ddp, 0.2), (fsdp, 0.2)):  # 2 steps; 1 to gather and 1 to scatter
        begin = time.monotonic()
        model(torch.ones(1, 2)).sum().backward()
        assert time.monotonic() - begin >= least
        assert all(parameter.grad is not None for parameter in model.parameters())
    begin = time.monotonic()
    if rank.index == 0:
        dist.send(torch.ones(1), 1)
    else:
        one = torch.zeros(1)
        dist.recv(one, 0)
        assert one.item() == 1
        assert time.monotonic() - begin >= 0.1
    dist.monitored_barrier()


PLACE = "expected a rank from 0 to 1, since the world has 2."


BAD = [
    (lambda f: f.kill(rank=2), "faults.kill(rank=2): " + PLACE),
    (lambda f: f.hang(rank=True), "faults.hang(rank=True): " + PLACE),
    (
        lambda f: f.kill(rank=1, sig="SIGKIL"),
        "faults.kill(sig='SIGKIL'): expected a signal, such as 'SIGKILL' or 'SIGTERM'. "
        "Did you mean 'SIGKILL'?",
    ),
    (
        lambda f: f.kill(rank=1, sig="SIGSTOP"),
        "faults.kill(sig='SIGSTOP'): expected a signal that ends a process, such as 'SIGKILL' or "
        "'SIGTERM'; faults.hang freezes one.",
    ),
    (
        lambda f: f.delay(rank=1, seconds=-1),
        "faults.delay(seconds=-1): expected a number of seconds, 0 or more.",
    ),
    (
        lambda f: f.kill(rank=1, after=-1),
        "faults.kill(after=-1): expected a number of seconds, 0 or more.",
    ),
    (
        lambda f: f.raise_(rank=1, exception="no"),
        "faults.raise_(exception='no'): expected an exception, such as RuntimeError('link down').",
    ),
    (
        lambda f: f.kill(rank=1, at="barrier#1", after=1),
        "faults.kill(at='barrier#1', after=1): expected one of them.",
    ),
    (
        lambda f: f.slow_network(),
        "faults.slow_network(): expected a bandwidth in bytes a second, a latency in seconds, or "
        "both.",
    ),
    (
        lambda f: f.slow_network(bandwidth=0),
        "faults.slow_network(bandwidth=0): expected bytes a second, above 0.",
    ),
]


@pytest.mark.ranks(2)
def test_bad_inputs(rank, faults):
    for call, text in BAD:
        with pytest.raises(BadInputError) as caught:
            call(faults)
        assert str(caught.value) == text


@pytest.mark.ranks(2)
def test_torch_is_left_as_it_was(rank, record_property):
    assert reduce_one() == 2
    assert signal.getsignal(signal.SIGRTMAX - 5) == signal.SIG_DFL


@pytest.mark.ranks(2)
def test_pids_before(rank, record_property):
    record_property("pids", rank.gather(os.getpid()))


@pytest.mark.ranks(2)
def test_pids_with(rank, faults, record_property):
    record_property("pids", rank.gather(os.getpid()))
    faults.delay(rank=1, seconds=0)


@pytest.mark.ranks(2)
def test_pids_after(rank, record_property):
    record_property("pids", rank.gather(os.getpid()))


@pytest.mark.ranks(2, fidelity="threads")
def test_ranks_without_a_process(rank):
    with pytest.raises(BadInputError) as caught, inject_faults():
        pass
    assert str(caught.value) == (
        "faults: found ranks of fidelity 'threads', expected ranks with a process each: faults hit "
        "processes."
    )


def killed_in_a_function():
    with inject_faults() as faults:
        faults.kill(rank=1, at="all_reduce#1")
        reduce_one()


def missed_in_a_function():
    with inject_faults() as faults:
        faults.kill(rank=1, at="all_reduce#2")
        reduce_one()


def without_a_store():
    with inject_faults() as faults:
        faults.drop_store()
    try:
        dist.new_group()
    except RuntimeError:
        return reduce_one()


def hangs_in_a_function():
    with inject_faults() as faults:
        faults.hang(rank=1)


def test_functions(launch):
    assert launch(without_a_store, world_size=2) == [2, 2]
    with pytest.raises(RankFailure, match=r"after faults.hang\(rank=1\) at once"):
        launch(hangs_in_a_function, world_size=2)
    with pytest.raises(RankFailure) as caught:
        launch(killed_in_a_function, world_size=2)
    assert caught.value.rank == 1
    assert (
        "died of SIGKILL without a report, after faults.kill(rank=1, at='all_reduce#1') at "
        in str(caught.value)
    )
    with pytest.raises(
        RankFailure, match=r"faults.kill\(rank=1, at='all_reduce#2'\) never happened"
    ):
        launch(missed_in_a_function, world_size=2)
