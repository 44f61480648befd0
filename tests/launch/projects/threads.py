"""Ranks that are threads: what they show, how they fail, and what they cannot show."""

import logging
import os
import random
import signal
import threading
import time
import unittest
from importlib.util import find_spec

import pytest
import torch
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
    assert rank.fidelity == "threads"
    assert dist.get_rank() == rank.index
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
    print(f"printed by {rank.index}\n", end="")  # in one piece
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
    assert work.is_completed()
    assert t.tolist() == [4.0, 4.0]  # without the wait that gloo needs


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
