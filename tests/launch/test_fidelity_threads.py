"""Ranks that are threads: real data and branches, fixtures of their own, the same outcomes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NO_SUBTESTS = (
    "fidelity 'threads' cannot show subtests (the fixture subtests, unittest's self.subTest): "
    "pytest counts them once a process, not once a thread; run the test at fidelity 'gloo' or "
    "above, or write it without subtests."
)
TESTS = """
import logging, os, random, signal, threading, time, unittest
from importlib.util import find_spec
import pytest, torch
import torch.distributed as dist
from torch import manual_seed

pytestmark = [
    pytest.mark.ranks(4, fidelity="threads"),
    pytest.mark.filterwarnings("ignore"),
]
SEEN = []
HAS_SUBTESTS = find_spec("_pytest.subtests") is not None  # of pytest 9


@pytest.fixture
def shard(rank):
    t = torch.full((2,), float(rank.index))
    dist.all_reduce(t)
    yield t
    dist.barrier()


# ---- what they show

def test_fixtures_and_collectives(rank, shard, tmp_path):
    assert shard.tolist() == [6.0, 6.0]
    assert rank.fidelity == "threads" and dist.get_rank() == rank.index
    assert threading.current_thread().name == f"rank {rank.index}"
    assert len(set(map(str, rank.gather(tmp_path)))) == 4
    rank.shared_tmp_path.joinpath(str(rank.index)).touch()
    rank.barrier()
    assert len(list(rank.shared_tmp_path.iterdir())) == 4


def test_each_rank_draws_what_a_process_would(rank):
    weights = [torch.nn.Linear(4, 4).weight.detach() for _ in range(20)]
    dropped = torch.nn.functional.dropout(torch.ones(200))
    for other, drops in rank.gather((weights, dropped)):
        assert all(map(torch.equal, weights, other))
        assert torch.equal(drops, dropped)
    alone = torch.Generator().manual_seed(rank.index + 5)
    manual_seed(rank.index + 5)
    for _ in range(20):
        assert torch.equal(torch.rand(3), torch.rand(3, generator=alone))
    with torch.random.fork_rng():
        torch.rand(7)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=alone))


def test_trainers(rank):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    fully_shard(model)
    model(torch.ones(2, 8)).sum().backward()
    assert model[0].weight.grad.to_local().shape == (2, 8)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    ddp(torch.full((1, 4), float(rank.index))).sum().backward()
    assert ddp.module.weight.grad.unique().tolist() == [1.5]  # the mean of 0 to 3


def test_point_to_point(rank):
    to, origin = (rank.index + 1) % 4, (rank.index - 1) % 4
    mine, theirs = torch.full((2,), float(rank.index)), torch.zeros(2)
    ops = [dist.P2POp(dist.isend, mine, to), dist.P2POp(dist.irecv, theirs, origin)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert theirs.tolist() == [origin, origin]
    if rank.index == 0:
        dist.send(torch.tensor([7]), 3)
    if rank.index == 3:
        received = torch.zeros(1, dtype=torch.int64)
        dist.recv(received, 0)
        assert received.item() == 7


@pytest.mark.ranks(dp=2, tp=2, fidelity="threads")
def test_mesh(rank):
    t = torch.tensor([float(rank.index)])
    dist.all_reduce(t, group=rank.mesh["tp"].get_group())
    assert t.item() == {0: 1, 1: 1, 2: 5, 3: 5}[rank.index]


def test_own_initialisation(rank):
    dist.init_process_group("gloo")
    assert rank.gather(rank.index) == [0, 1, 2, 3]
    dist.destroy_process_group()
    dist.init_process_group()
    assert dist.get_world_size() == 4


def test_skipped(rank):
    pytest.skip("everywhere")


@pytest.mark.xfail(strict=True, reason="known")
def test_known(rank):
    assert rank.index == 9


@pytest.mark.parametrize("value", [1, 2])
def test_parameters(rank, value, record_property):
    record_property("value", value)
    assert sum(rank.gather(value)) == 4 * value


class TestWide:
    @pytest.fixture(scope="class")
    def model(self, request):
        made = torch.nn.Linear(2, 2)
        dist.barrier()
        yield made
        dist.barrier()

    def test_first(self, model, rank):
        model.seen = rank.index

    def test_second(self, model, rank):
        assert model.seen == rank.index


def test_log_is_of_all_ranks(rank, caplog):
    logging.getLogger("x").warning("from %d", rank.index)
    rank.barrier()
    assert all(f"from {number}" in caplog.text for number in range(4))


# ---- how they fail

def test_one_fails(rank):
    print(f"printed by {rank.index}\\n", end="")  # in one piece
    if rank.index == 2:
        assert rank.index == 7
    dist.barrier()


def test_fails_in_setup_of_one(rank, request):
    request.getfixturevalue("broken")


@pytest.fixture
def broken(rank):
    if rank.index == 1:
        raise ValueError("no")
    dist.barrier()


def test_different_collectives(rank):
    if rank.index == 1:
        dist.broadcast(torch.ones(3), 0)
    else:
        dist.all_reduce(torch.ones(3))


def test_different_shapes(rank):
    dist.broadcast(torch.ones(1 if rank.index == 0 else 4), 0)


def test_one_never_comes(rank):
    if rank.index != 1:
        dist.all_reduce(torch.ones(3))


def test_a_receive_that_nobody_sends(rank):
    if rank.index == 0:
        dist.recv(torch.ones(3), 1)


@pytest.mark.ranks(2, fidelity="threads", timeout=3)
def test_hangs(rank):
    if rank.index == 1:
        time.sleep(600)
    dist.barrier()


def test_ranks_disagree(rank):
    if rank.index == 1:
        pytest.skip("one")


@pytest.mark.ranks(2, fidelity="threads")
def test_dies(rank):
    if rank.index == 1:
        os._exit(3)
    dist.barrier()


# ---- what they cannot show

def test_variables_are_of_the_process(rank):
    assert os.environ["WORLD_SIZE"] == "4"
    assert not {"RANK", "LOCAL_RANK"} & set(os.environ)
    os.environ["SHARED"] = "yes"
    rank.barrier()
    os.chdir(rank.shared_tmp_path)


def test_the_next_test_finds_the_process_as_it_was(rank):
    assert "SHARED" not in os.environ


def test_globals_are_shared(rank):
    SEEN.append(rank.index)
    rank.barrier()
    assert sorted(SEEN[-4:]) == [0, 1, 2, 3]


def test_pythons_random_is_shared(rank):
    random.seed(1)
    rank.barrier()
    drawn = rank.gather(random.random())
    assert len(set(drawn)) == 4  # a process of its own would draw the same


def test_a_collective_is_over_when_it_was_called(rank):
    t = torch.ones(2)
    work = dist.all_reduce(t, async_op=True)
    assert work.is_completed() and t.tolist() == [4.0, 4.0]  # without the wait that gloo needs


def test_signals(rank):
    with pytest.raises(ValueError, match="main thread"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def test_capsys(rank, capsys):
    raise AssertionError


class TestsOfUnittest(unittest.TestCase):
    def test_subtests_by_unittest(self):
        for number in range(2):
            with self.subTest(number=number):
                pass

    def test_without_subtests(self):
        dist.barrier()


if HAS_SUBTESTS:

    def test_fixture_subtests(rank, subtests):
        pass


def test_receive_from_anybody(rank):
    dist.recv(torch.ones(1))


def test_patches_of_others(rank, monkeypatch):
    monkeypatch.setattr(random, "patched", rank.index, raising=False)


def test_a_process_is_not_used_again_after_patches(rank):
    assert not hasattr(random, "patched")


def test_exits(rank):  # ends the session, so it comes last
    if rank.index == 3:
        pytest.exit("enough")
    dist.barrier()
"""


@pytest.fixture(scope="module")
def found(run_session):
    return run_session({"test_it.py": TESTS}, "-p", "no:randomly")


@pytest.mark.parametrize(
    "name",
    [
        "test_fixtures_and_collectives",
        "test_each_rank_draws_what_a_process_would",
        "test_trainers",
        "test_point_to_point",
        "test_mesh",
        "test_own_initialisation",
        "test_parameters[1]",
        "test_parameters[2]",
        "test_first",
        "test_second",
        "test_log_is_of_all_ranks",
        "test_variables_are_of_the_process",
        "test_the_next_test_finds_the_process_as_it_was",
        "test_globals_are_shared",
        "test_pythons_random_is_shared",
        "test_a_collective_is_over_when_it_was_called",
        "test_signals",
        "test_patches_of_others",
        "test_a_process_is_not_used_again_after_patches",
    ],
)
def test_what_threads_show_and_where_they_end(found, name):
    row = found.call(name)
    assert row.outcome == "passed", row.text
    assert ["fidelity", "threads"] in row.properties


def test_outcomes_are_those_of_processes(found):
    assert found.call("test_skipped").outcome == "skipped"
    assert "everywhere" in found.call("test_skipped").text
    known = found.call("test_known")
    assert (known.outcome, known.wasxfail) == ("skipped", "known")
    assert ["value", 2] in found.call("test_parameters[2]").properties


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (
            "test_one_fails",
            "fidelity threads: rank 2 of 4 failed first (ranks 0, 1 and 3 were cut off in "
            "barrier): assert 2 == 7",
        ),
        (
            "test_fails_in_setup_of_one",
            "fidelity threads: rank 1 of 4 failed first (ranks 0, 2 and 3 were cut off in "
            "barrier): ValueError: no",
        ),
        (
            "test_ranks_disagree",
            "fidelity threads: the ranks disagree: ranks 0, 2 and 3 passed, rank 1 skipped",
        ),
        (
            "test_hangs",
            "fidelity threads: timed out after 3 s: rank 0 was in barrier, called from test_hangs "
            "(test_it.py:",
        ),
        (
            "test_dies",
            "fidelity threads: rank 0 of 2 failed first (rank 1 died too): exited with code 3 "
            "without a report",
        ),
    ],
)
def test_failures_name_the_rank(found, name, head):
    row = found.call(name)
    assert row.outcome == "failed"
    assert row.text.startswith(head)


def test_what_was_printed_is_of_all_ranks_together(found):
    sections = dict(found.call("test_one_fails").sections)
    printed = sections["Captured stdout call (ranks 0, 1, 2 and 3)"]
    assert sorted(printed.splitlines()) == [f"printed by {number}" for number in range(4)]


def test_a_hang_shows_the_stack_of_each_rank(found):
    text = found.call("test_hangs").text
    first, second = text.split("stacks of rank 0:")[1].split("stacks of rank 1:")
    assert "in barrier" in first
    assert "in barrier" not in second
    assert "in test_hangs" in second


def test_a_death_says_that_all_shared_a_process(found):
    text = found.call("test_dies").text
    line = "all ranks of fidelity 'threads' are threads of one process: what ends it ends them all"
    assert line in text


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "test_different_collectives",
            ["broadcast(src=0, float32[3])", "all_reduce(SUM, float32[3])", "(test_it.py:"],
        ),
        (
            "test_different_shapes",
            ["broadcast(src=0, float32[1])", "broadcast(src=0, float32[4])", "(test_it.py:"],
        ),
        (
            "test_one_never_comes",
            [
                "no rank can go on: rank 0 waits in all_reduce(SUM, float32[3]); rank 2 waits in "
                "all_reduce(SUM, float32[3]); rank 3 waits in all_reduce(SUM, float32[3]); rank 1 "
                "had finished"
            ],
        ),
        (
            "test_a_receive_that_nobody_sends",
            [
                "no rank can go on: rank 0 waits in recv from rank 1 of its group; rank 1 had "
                "finished; rank 2 had finished; rank 3 had finished"
            ],
        ),
        (
            "test_capsys",
            [
                "fidelity 'threads' cannot show capsys: output is captured once a process, not "
                "once a thread; run the test at fidelity 'gloo' or above."
            ],
        ),
        ("test_subtests_by_unittest", [f"FidelityError: {NO_SUBTESTS}", ">           with self."]),
        pytest.param(
            "test_fixture_subtests",
            [f"Failed: {NO_SUBTESTS}\nreproduce"],
            marks=pytest.mark.skipif(
                find_spec("_pytest.subtests") is None, reason="needs the subtests of pytest 9"
            ),
        ),
        (
            "test_receive_from_anybody",
            [
                "fidelity 'threads' cannot show recv from any rank: threads meet by name; run the "
                "test at fidelity 'gloo' or above."
            ],
        ),
        ("test_exits", ["enough"]),
    ],
)
def test_what_goes_wrong_is_said_at_once(found, name, texts):
    row = found.call(name)
    assert row.outcome == "failed"
    assert all(text in row.text for text in texts), row.text


def test_the_session_chooses_for_tests_that_allow_it(run_session):
    text = """
import pytest

@pytest.mark.ranks([1, 3], lowest_fidelity="threads")
def test_allows(rank):
    assert rank.gather(rank.index) == list(range(rank.world_size))

@pytest.mark.ranks(2)
def test_says_nothing(rank):
    assert rank.fidelity == "gloo"
"""
    found = run_session({"test_it.py": text}, env={"RANKS_FIDELITY": "threads"})
    assert found.returncode == 0
    assert "ranks: fidelity=threads (from RANKS_FIDELITY)" in found.output
    for size in (1, 3):
        row = found.call(f"test_allows[ws={size}]")
        assert dict(row.properties)["fidelity"] == "threads"
