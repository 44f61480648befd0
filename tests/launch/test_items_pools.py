"""Which tests share rank processes, what they may leave behind, and who tears what down."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

FIRST = """
import os, random
import pytest, torch
import torch.distributed as dist


def note(record_property, rank):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.mark.ranks(2)
def test_one(rank, record_property):
    note(record_property, rank)


@pytest.mark.ranks([2, 3])
def test_two(rank, record_property):
    note(record_property, rank)
    assert rank.world_size == dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    assert rank.index == rank.local_rank == dist.get_rank() == int(os.environ["LOCAL_RANK"])


@pytest.mark.ranks(2, isolate=True)
def test_alone(rank, record_property):
    note(record_property, rank)


@pytest.mark.ranks(2)
def test_leaves_everything_changed(rank):
    os.environ["LEFT"] = "behind"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(99)


@pytest.mark.ranks(2)
def test_finds_nothing_changed(rank, record_property):
    note(record_property, rank)
    assert "LEFT" not in os.environ
    assert os.getcwd() != "/"
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.ranks(2)
def test_leaves_a_collective_pending(rank):
    if rank.index == 0:
        dist.all_reduce(torch.full((1,), 100.0), async_op=True)


@pytest.mark.ranks(2)
def test_has_a_group_of_its_own(rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2


@pytest.mark.ranks(2)
def test_fails(rank, record_property):
    note(record_property, rank)
    assert rank.index == 0


@pytest.mark.ranks(2)
def test_after_failure(rank, record_property):
    note(record_property, rank)


@pytest.mark.ranks(2)
def test_numbers(rank, record_property):
    numbers = rank.gather((random.random(), torch.rand(1).item(), torch.get_num_threads()))
    assert numbers[0] == numbers[1]
    assert numbers[0][2] == 1
    record_property("numbers", str(numbers[0]))


@pytest.mark.ranks(2)
def test_numbers_again(rank, record_property):
    record_property("numbers", str((random.random(), torch.rand(1).item(), 1)))


@pytest.mark.ranks(tp=2, dp=2)
def test_mesh(rank):
    assert rank.mesh.mesh_dim_names == ("tp", "dp")
    total = torch.ones(1)
    dist.all_reduce(total, group=rank.mesh["tp"].get_group())
    assert total == 2


@pytest.mark.ranks(2)
def test_own_initialisation(rank):
    for _ in range(3):
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2
        dist.destroy_process_group()


@pytest.mark.ranks(2)
def test_accelerate_joins(rank):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank.index)
    assert accelerator.gather(torch.tensor([rank.index])).tolist() == [0, 1]


@pytest.mark.ranks(2)
def test_temporary_folders(rank, tmp_path):
    (rank.shared_tmp_path / str(rank.index)).touch()
    rank.barrier()
    assert len(list(rank.shared_tmp_path.iterdir())) == 2
    assert len(set(rank.gather(str(tmp_path)))) == 2


def test_plain():
    with pytest.raises(ValueError, match="plain"):
        raise ValueError("plain")
"""
SECOND = """
import os
import pytest, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@pytest.mark.ranks(2)
def test_in_another_file(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.fixture(scope="module")
def model():
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    yield model
    dist.barrier()
    print("module fixture torn down")


@pytest.fixture
def step(model):
    return lambda: model(torch.ones(1, 2)).sum().backward()


@pytest.mark.ranks([2, 4])
def test_model(step, model, rank, record_property):
    step()
    model.steps = getattr(model, "steps", 0) + 1
    assert model.steps == 1
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


def test_between():
    pass


@pytest.mark.ranks([2, 4])
def test_model_again(step, model, rank, record_property):
    step()
    model.steps += 1
    assert model.steps == 2
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))


@pytest.mark.ranks(2)
def test_leaves_its_kept_group_uneven(model, rank):
    if rank.index == 0:
        dist.all_reduce(torch.full((1,), 100.0), async_op=True)


@pytest.mark.ranks(2)
def test_gets_another_model(step, model):
    assert not hasattr(model, "steps")
    step()


@pytest.fixture(scope="module")
def failing_end():
    yield
    raise RuntimeError("at the end of the module")


@pytest.mark.ranks(2)
def test_wide_teardown(failing_end, rank):
    pass


@pytest.mark.ranks(2)
def test_wide_teardown_is_not_this_ones(rank):
    pass
"""


@pytest.fixture(scope="module")
def session(run_session):
    files = {"test_first.py": FIRST, "test_second.py": SECOND}
    return run_session(files, "-p", "no:randomly", "-p", "no:rerunfailures")


def pids(session, name):
    return dict(session.call(name).properties)["pids"]


def test_all_but_the_failing_ones_pass(session):
    bad = [(row.id, row.when) for row in session.rows if row.outcome == "failed"]
    assert bad == [
        ("test_first.py::test_leaves_a_collective_pending", "call"),
        ("test_first.py::test_fails", "call"),
        ("test_second.py::test_leaves_its_kept_group_uneven", "call"),
        ("test_second.py::test_leaves_its_kept_group_uneven", "teardown"),
        ("test_second.py::test_wide_teardown", "teardown"),
    ], session.output


def test_a_wide_teardown_that_hangs_after_an_uneven_test_is_its_error(session):
    text = session.of("test_leaves_its_kept_group_uneven")[-1].text
    assert re.search(
        r"^teardown of wider fixtures failed: not over after 5 s: ranks 0 and 1 were in barrier, "
        r"called from model \(test_second.py:\d+\)",
        text,
    ), text


def test_ranks_are_kept_between_tests_and_files(session):
    kept = {pids(session, name) for name in ("test_one", "test_two[ws=2]")}
    assert kept == {pids(session, "test_finds_nothing_changed")}
    assert pids(session, "test_after_failure") == pids(session, "test_in_another_file")


def test_ranks_of_another_shape_or_isolated_are_others(session):
    names = ("test_one", "test_two[ws=3]", "test_alone")
    found = [set(pids(session, name).split()) for name in names]
    assert len(set.union(*found)) == 2 + 3 + 2


def test_ranks_where_a_test_failed_are_not_used_again(session):
    before, after = pids(session, "test_fails"), pids(session, "test_after_failure")
    assert set(before.split()).isdisjoint(after.split())


def test_numbers_are_the_same_in_every_test(session):
    first, second = (
        dict(session.call(name).properties)["numbers"]
        for name in ("test_numbers", "test_numbers_again")
    )
    assert first == second


def test_tests_that_share_a_wide_fixture_share_ranks_with_nobody_else(session):
    for size in (2, 4):
        shared = pids(session, f"test_model[ws={size}]")
        assert pids(session, f"test_model_again[ws={size}]") == shared
    others = pids(session, "test_in_another_file").split()
    assert set(others).isdisjoint(pids(session, "test_model[ws=2]").split())


def test_a_wide_teardown_is_reported_once(session):
    row = session.call("test_wide_teardown")
    assert row.text.splitlines()[0].endswith("RuntimeError: at the end of the module")


STOPPED = """
import pytest


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    yield
    raise RuntimeError("owed teardown")


@pytest.mark.ranks(2)
def test_first(wide, rank):
    pass


def test_stops_the_session():
    raise AssertionError


@pytest.mark.ranks(2)
def test_never_run(wide, rank):
    pass
"""


def test_teardowns_that_are_owed_run_when_the_session_stops(run_session):
    session = run_session({"test_it.py": STOPPED}, "-x", "-p", "no:randomly")
    owed = [row for row in session.rows if "owed teardown" in row.text]
    assert [(row.id, row.when) for row in owed] == [("test_it.py::test_first", "teardown")]
    assert not [row for row in session.rows if "never_run" in row.id]
