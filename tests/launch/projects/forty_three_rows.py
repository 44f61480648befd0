"""One test, or a few, for each row of the table of other harnesses."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist


def wait_for_all():
    dist.all_reduce(torch.ones(1))


def test_on_cpu_alone():
    assert not dist.is_initialized()


@pytest.mark.ranks(2)
def test_plain_function(rank, record_property):
    total = torch.ones(1)
    dist.all_reduce(total)
    record_property("total", total.item())


@pytest.mark.ranks(2)
def test_the_item_itself(request, rank, record_property):
    record_property("item", f"{type(request.node).__name__} {request.node.nodeid} {os.getpid()}")


@pytest.fixture(autouse=True)
def log(record_property):
    events = []
    yield events
    record_property("events", " ".join(events))


@pytest.fixture
def resource(log):
    log.append("up")
    yield "resource"
    log.append("down")


@pytest.mark.ranks(2)
def test_fixtures(resource, log, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("SET_BY_TEST", resource)
    (tmp_path / "file").write_text("mine alone")
    print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert len(set(rank.gather(str(tmp_path)))) == 2
    log.append("body")


@pytest.fixture
def closure():
    lock = open(os.devnull)
    return lambda value: (lock.fileno(), value)[1]


@pytest.mark.ranks(2)
def test_what_no_pickle_carries(closure, rank):
    assert closure(rank.index) == rank.index


@pytest.mark.ranks(2)
@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("right", ["a", "b"])
def test_parameters(left, right, rank, record_property):
    record_property("parameters", f"{left}{right}")


@pytest.mark.ranks([1, 2, 3])
def test_world_sizes(rank, record_property):
    record_property("size", dist.get_world_size())


@pytest.mark.ranks(dp="dp", tp="tp")
@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1)])
def test_layout(rank, dp, tp, record_property):
    record_property("mesh", f"{rank.mesh['dp'].size()}x{rank.mesh['tp'].size()}")


@pytest.mark.ranks(2)
def test_assertion_explains(rank):
    wait_for_all()
    found = {"loss": 2.0 + rank.index}
    assert found == {"loss": 2.0}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("turn", range(3))
def test_same_ranks(turn, rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.mark.ranks(2)
def test_fails_then_is_replaced(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
    assert rank.index == 5


@pytest.mark.ranks(2)
def test_after_the_failure(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.fixture(scope="module")
def wide():
    return {"made by": os.getpid(), "uses": 0}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("turn", [1, 2])
def test_module_fixture(wide, turn, rank):
    wide["uses"] += 1
    assert wide == {"made by": os.getpid(), "uses": turn}


@pytest.mark.ranks(2)
def test_each_rank_fails_its_own_way(rank):
    if rank.index == 0:
        raise ValueError("of rank zero")
    time.sleep(0.2)
    raise KeyError("of rank one")


@pytest.mark.ranks(3)
def test_root_cause(rank):
    if rank.index == 1:
        raise ValueError("the cause")
    wait_for_all()


@pytest.mark.ranks(2)
def test_skip_on_all(rank):
    pytest.skip("no tokenizer")


@pytest.mark.ranks(2)
def test_skip_masks_nothing(rank):
    if rank.index == 0:
        pytest.skip("no tokenizer")
    assert rank.index == 5


@pytest.mark.ranks(2)
def test_did_not_raise(rank):
    if rank.index == 1:
        with pytest.raises(ValueError):
            pass


@pytest.mark.ranks(2)
def test_pytest_fail(rank):
    if rank.index == 1:
        pytest.fail("said by pytest.fail")


@pytest.mark.ranks(2)
def test_crash(rank):
    print("last words of", rank.index)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    wait_for_all()


@pytest.mark.ranks(2)
def test_silent_exit(rank):
    if rank.index == 1:
        os._exit(0)


@pytest.mark.ranks(2, timeout=1)
def test_hang(rank):
    if rank.index == 1:
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import signal, time; "
                "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)",
                "of-the-rows",
            ],
            start_new_session=True,
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    wait_for_all()


@pytest.mark.ranks(2)
def test_after_the_hang(rank):
    wait_for_all()


@pytest.mark.ranks(2)
def test_no_port_is_guessed(rank, record_property):
    record_property("port", os.environ["MASTER_PORT"])


@pytest.mark.ranks(2)
def test_output(rank):
    print("spoken by", rank.index)
    pytest.fail("after its output")


@pytest.mark.ranks(3)
def test_gathers(rank):
    assert rank.gather(rank.index**2) == [0, 1, 4]


@pytest.mark.ranks(2)
def test_last_of_the_file(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


def square(rank_index_plus):
    return (dist.get_rank() + rank_index_plus) ** 2


def test_results_of_ranks(launch):
    assert launch(square, world_size=3, args=(1,)) == [1, 4, 9]
