from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_ranks.errors import BadInputError, RankFailure, RankTimeout, UnavailableError
from pytest_ranks.launch.host import RankHost
from pytest_ranks.launch.rank_context import current_rank

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def host():
    with RankHost(preload=("torch",)) as host:
        yield host


def add_up(value):
    import torch

    total = torch.tensor([value + current_rank().index])
    torch.distributed.all_reduce(total)
    return current_rank().index, int(total), os.getpid()


def initialise_and_add():
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group()
    torch.distributed.barrier()
    return float(total)


def rank_variables():
    return sorted(name for name in os.environ if name in {"RANK", "WORLD_SIZE", "MASTER_PORT"})


def threads_and_seeds():
    import torch

    return torch.get_num_threads(), torch.rand(1).item()


def fail_on_one(how):
    import torch

    if current_rank().index == 1:
        print("the last words of rank 1")
        if how == "raise":
            raise ValueError("boom")
        if how == "exit":
            raise SystemExit(3)
        if how == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "os._exit":
            os._exit(7)
        if how == "hang":
            time.sleep(1000)
    torch.distributed.all_reduce(torch.ones(1))


def unpicklable_result():
    return lambda: None


def start_grandchild_and_hang(path):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(path).write_text(str(child.pid))
    time.sleep(1000)


def test_results_come_by_rank_from_fresh_processes(host):
    first = host.run(add_up, world_size=2, args=(10,))
    second = host.run("test_host:add_up", world_size=2, args=(10,))
    assert [row[:2] for row in first] == [(0, 21), (1, 21)]
    assert {row[2] for row in first}.isdisjoint({row[2] for row in second})


def test_a_closure_travels_by_value(host):
    factor = 3
    assert host.run(lambda value: factor * value, world_size=2, args=(2,)) == [6, 6]


def test_a_plain_init_process_group_joins_the_store_of_the_run(host):
    for init in (False, True):
        assert host.run(initialise_and_add, world_size=2, init=init) == [2.0, 2.0]


def test_a_plain_process_has_no_rank_variables(host, monkeypatch):
    assert host.run(rank_variables, world_size=1, rank_variables=False) == [[]]
    assert host.run(rank_variables, world_size=1) == [["MASTER_PORT", "RANK", "WORLD_SIZE"]]


def test_ranks_are_repeatable(host):
    runs = [host.run(threads_and_seeds, world_size=2) for _ in range(2)]
    (threads, number) = runs[0][0]
    assert threads == 1
    assert runs == [[(1, number)] * 2] * 2


def test_variables_of_a_run_reach_its_ranks_alone(host):
    assert host.run(os.getenv, world_size=1, args=("OF_THIS_RUN",), env={"OF_THIS_RUN": "1"}) == [
        "1"
    ]
    assert host.run(os.getenv, world_size=1, args=("OF_THIS_RUN",)) == [None]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "ValueError: boom"),
        ("exit", "SystemExit: 3"),
        ("sigkill", "died of SIGKILL without a report"),
        ("os._exit", "exited with code 7 without a report"),
    ],
)
def test_the_rank_that_failed_first_heads_the_report(host, how, said):
    with pytest.raises(RankFailure) as caught:
        host.run(fail_on_one, world_size=4, args=(how,))
    text = str(caught.value)
    headline = text.splitlines()[0]
    assert caught.value.rank == 1
    assert caught.value.world_size == 4
    assert headline.startswith("rank 1 of 4 failed first (ranks 0, 2 and 3 were ")
    assert headline.endswith(f"): {said}")
    # gloo tells some that the peer closed, others that it reset: alike ones are folded
    told = re.findall(r"^collateral: ranks? ([\d, and]+) RuntimeError: ", text, re.MULTILINE)
    assert sorted(re.findall(r"\d", " ".join(told))) == ["0", "2", "3"]
    if how in ("raise", "exit"):
        assert "in fail_on_one" in text
    assert "the last words of rank 1" in text
    assert host.run(add_up, world_size=2, args=(0,))[0][1] == 1


def test_a_hang_ends_at_its_deadline_with_the_stacks_of_all_ranks(host):
    with pytest.raises(RankTimeout) as caught:
        host.run(fail_on_one, world_size=2, args=("hang",), timeout=0.5)
    headline, *rest = str(caught.value).splitlines()
    assert headline.startswith(
        "timed out after 0.5 s: rank 0 was in all_reduce, called from fail_on_one"
    )
    assert "; rank 1 was in fail_on_one (" in headline
    assert "; rank 1 never issued it: it is in fail_on_one (" in rest[0]
    stacks = "\n".join(rest[1:])
    assert stacks.count("in fail_on_one") == 2
    assert "rank.py" not in stacks


def test_a_stopped_rank_takes_its_descendants_along(host, tmp_path):
    noted = tmp_path / "pid"
    with pytest.raises(RankTimeout):
        host.run(start_grandchild_and_hang, world_size=1, args=(str(noted),), timeout=2)
    assert wait_for_end([int(noted.read_text())]) == []


def test_a_result_that_does_not_pickle_is_named(host):
    with pytest.raises(RankFailure, match="the result of rank 0 cannot be pickled: function"):
        host.run(unpicklable_result, world_size=1)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fn": "nocolon"}, "fn='nocolon': expected 'package.module:function'."),
        ({"fn": 3}, "fn=3: expected a function or 'package.module:function', found int."),
        ({"world_size": 0}, "world_size=0: expected a whole number of at least 1."),
        ({"timeout": -1}, "timeout=-1: expected a number of seconds above 0."),
        ({"backend": "mpi"}, "backend='mpi': expected one of 'gloo', 'nccl', 'xccl', 'neuron'."),
        (
            {"rank_variables": False},
            "rank_variables=False, world_size=2: a plain process has no rank, so it needs "
            "world_size=1.",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(host, changes, text):
    with pytest.raises(BadInputError) as caught:
        host.run(**{"fn": add_up, "world_size": 2, **changes})
    assert str(caught.value) == text


def test_arguments_that_do_not_pickle_are_refused(host):
    with pytest.raises(BadInputError, match="the arguments cannot be pickled"):
        host.run(add_up, world_size=1, args=(sys._getframe(),))


def test_a_closed_host_says_so():
    host = RankHost(preload=())
    host.close()
    host.close()
    with pytest.raises(UnavailableError, match="this RankHost is closed"):
        host.run(add_up, world_size=1)


CONTROLLER = """
import sys, time
from pytest_ranks.launch.host import RankHost
host = RankHost(preload=())
host.run("test_host:write_pids_and_hang", world_size=2, args=(sys.argv[1],), init=False)
"""


def write_pids_and_hang(folder):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    pids = [os.getpid(), os.getppid(), child.pid]
    part = Path(folder, f"{current_rank().index}.part")
    part.write_text(" ".join(map(str, pids)))
    part.rename(part.with_suffix(".pids"))
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_survives_its_controller(tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(tmp_path)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    while len(files := list(tmp_path.glob("*.pids"))) < 2:
        assert controller.poll() is None
        time.sleep(0.02)
    pids = {int(pid) for file in files for pid in file.read_text().split()}
    assert len(pids) == 5
    controller.send_signal(number)
    controller.wait()
    assert wait_for_end(pids) == []


def wait_for_end(pids):
    """Return which of these processes still live, once none does or patience is over."""
    alive = list(pids)
    for _ in range(250):
        alive = [pid for pid in alive if is_alive(pid)]
        if not alive:
            break
        time.sleep(0.02)
    return alive


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
