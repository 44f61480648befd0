"""Faults that a test injects into its own ranks: when they strike, what they do, what is reported."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

SOURCE = """
import os, signal, socket, sys, time
from datetime import timedelta
import pytest, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pytest_ranks import BadInputError, RankFailure, inject_faults, step
from pytest_ranks.launch.injection.traffic_control import has_own_network


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
    with pytest.raises(RuntimeError, match="Connection closed by peer|Connection reset"):
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
    done = 0
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
    with pytest.raises(RuntimeError, match="Timed out|timeout"):
        dist.all_reduce(one, group=group)
    record_property("survived", rank.index)


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


@pytest.mark.ranks(2, expect_deaths={1: "SIGKILL"})
def test_at_once(rank, faults):
    faults.kill(rank=1)
    assert rank.index == 0


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
    with pytest.raises(RankFailure, match=r"after faults.hang\\(rank=1\\) at once"):
        launch(hangs_in_a_function, world_size=2)
    with pytest.raises(RankFailure) as caught:
        launch(killed_in_a_function, world_size=2)
    assert caught.value.rank == 1
    assert "died of SIGKILL without a report, after faults.kill(rank=1, at='all_reduce#1') at " in str(caught.value)
    with pytest.raises(RankFailure, match=r"faults.kill\\(rank=1, at='all_reduce#2'\\) never happened"):
        launch(missed_in_a_function, world_size=2)
"""

FAILING = """
import time
import pytest, torch
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
"""


@pytest.fixture(scope="module")
def session(run_session):
    return run_session({"test_it.py": SOURCE}, "-p", "no:randomly", "--ranks-timeout=60")


@pytest.fixture(scope="module")
def failing(run_session):
    return run_session({"test_it.py": FAILING}, "-p", "no:randomly", "--ranks-timeout=60")


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
