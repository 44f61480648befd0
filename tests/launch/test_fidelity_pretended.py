"""Ranks that one body stands for: `fake` for one of many thousands, `local_tensor` for all."""

from __future__ import annotations

import pytest

TESTS = """
import pytest, time, torch
import torch.distributed as dist
from torch.distributed import all_gather_object, get_rank
from pytest_ranks.errors import FidelityError
from pytest_ranks.launch.rank_context import current_rank

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def doubled(rank):
    return rank.world_size * 2


# ---- fake

@pytest.mark.ranks(dp=128, tp=64, pp=8, fidelity="fake", as_rank=777)
def test_mesh_of_many(rank, doubled):
    assert rank.fidelity == "fake"
    assert (rank.index, rank.world_size, doubled) == (777, 65536, 131072)
    assert dist.get_rank() == 777
    assert rank.mesh.get_coordinate() == (1, 33, 1)
    assert rank.mesh["tp"].size() == 64


@pytest.mark.ranks(8, fidelity="fake", as_rank=3)
def test_data_of_others_is_not_a_number(rank):
    t = torch.ones(4)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)  # by chance this would be right
    assert t.shape == (4,) and t.isnan().all()
    parts = [torch.ones(2) for _ in range(8)]
    dist.all_gather(parts, torch.ones(2))
    assert torch.stack(parts).isnan().all()
    received = torch.ones(2)
    dist.recv(received, src=1)
    assert received.isnan().all()
    gathered = [torch.ones(2) for _ in range(8)]
    dist.gather(torch.ones(2), gathered, dst=3)
    assert torch.stack(gathered).isnan().all()


@pytest.mark.ranks(8, fidelity="fake")
def test_integers_are_its_own(rank):
    t = torch.tensor([5])
    dist.all_reduce(t)
    assert t.tolist() == [5]


@pytest.mark.ranks(4096, fidelity="fake")
def test_a_step_of_fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (4096,))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 64)).sum()
    loss.backward()
    optimizer.step()
    assert loss.isnan()
    assert model[0].weight.shape == (64, 64)
    assert model[0].weight.to_local().shape == (1, 64)


@pytest.mark.ranks(8, fidelity="fake")
def test_gather_under_fake(rank):
    rank.gather(rank.index)


@pytest.mark.ranks(8, fidelity="fake")
def test_objects_under_a_name_of_the_modules_own(rank):
    found = [None] * 8
    all_gather_object(found, 1)


@pytest.mark.ranks(8, fidelity="fake")
def test_ddp_under_fake(rank):
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))


@pytest.mark.ranks(8, fidelity="fake")
def test_fsdp1_under_fake(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    FullyShardedDataParallel(torch.nn.Linear(2, 2))


@pytest.mark.ranks(8, fidelity="fake")
def test_stages_that_are_imported_late(rank):
    from torch.distributed.pipelining import PipelineStage

    PipelineStage(torch.nn.Linear(2, 2), 0, 2, torch.device("cpu"))


@pytest.mark.ranks(8, fidelity="fake")
def test_checkpoints_under_fake(rank, tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)


@pytest.mark.ranks(8, fidelity="fake")
def test_own_initialisation(rank):
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    assert (dist.get_world_size(), dist.get_backend()) == (8, "fake")


@pytest.mark.ranks([4, 8], fidelity="fake", keep_group=True)
def test_a_kept_group_is_of_one_size(rank):
    assert dist.get_world_size() == rank.world_size


@pytest.mark.ranks(16, fidelity="fake", as_rank=5)
def test_fails_under_fake(rank):
    print("seen")
    assert rank.world_size == 3


# ---- local_tensor

@pytest.mark.ranks(dp=2, tp=2, fidelity="local_tensor")
def test_numbers_of_all_ranks(rank, doubled):
    from torch.distributed.tensor import Shard, distribute_tensor

    assert doubled == 8
    whole = torch.randn(4, 6)
    sharded = distribute_tensor(whole, rank.mesh["tp"], [Shard(0)])
    assert sharded.to_local().shape == (2, 6)
    assert torch.equal(sharded.full_tensor().reconcile(), whole)
    t = torch.ones(3)
    dist.all_reduce(t)
    assert t.reconcile().tolist() == [4.0] * 3


@pytest.mark.ranks(1024, fidelity="local_tensor")
def test_many_ranks_of_real_numbers(rank):
    t = torch.ones(2)
    dist.all_reduce(t)
    assert t.reconcile().tolist() == [1024.0, 1024.0]


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_index(rank):
    assert repr(rank) == "<all 4 ranks>"
    rank.index


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_local_rank(rank):
    current_rank().local_rank


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_get_rank(rank):
    get_rank()


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_gather_under_local_tensor(rank):
    rank.gather(1)


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_samples_under_local_tensor(rank):
    torch.utils.data.DistributedSampler(range(8))


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_fsdp2_under_local_tensor(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
    fully_shard(torch.nn.Linear(4, 4), mesh=mesh)


@pytest.mark.ranks(4, fidelity="local_tensor")
def test_ddp_under_local_tensor(rank):
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))


@pytest.mark.ranks(4, fidelity="local_tensor", timeout=8)
def test_hangs(rank):
    time.sleep(600)


# ---- chosen from outside

@pytest.mark.ranks(4, lowest_fidelity="local_tensor")
def test_anywhere_above(rank):
    t = torch.ones(1)
    dist.all_reduce(t)
    assert float(t.reconcile() if rank.fidelity == "local_tensor" else t) == 4


@pytest.mark.ranks(2)
def test_says_nothing(rank):
    assert rank.fidelity == "gloo" and rank.gather(rank.index) == [0, 1]
"""


@pytest.fixture(scope="module")
def found(run_session):
    return run_session({"test_it.py": TESTS}, "--ranks-fidelity=local_tensor", "-rA")


PASS = (
    "test_mesh_of_many",
    "test_data_of_others_is_not_a_number",
    "test_integers_are_its_own",
    "test_a_step_of_fsdp2",
    "test_own_initialisation",
    "test_a_kept_group_is_of_one_size[ws=4]",
    "test_a_kept_group_is_of_one_size[ws=8]",
    "test_numbers_of_all_ranks",
    "test_many_ranks_of_real_numbers",
    "test_anywhere_above",
    "test_says_nothing",
)


@pytest.mark.parametrize("name", PASS)
def test_what_they_show(found, name):
    row = found.call(name)
    assert row.outcome == "passed", row.text


@pytest.mark.parametrize(
    ("name", "fidelity"),
    [
        ("test_mesh_of_many", "fake"),
        ("test_numbers_of_all_ranks", "local_tensor"),
        ("test_anywhere_above", "local_tensor"),  # by the session's wish
        ("test_says_nothing", "gloo"),  # nothing below gloo is promised
    ],
)
def test_reports_name_the_fidelity(found, name, fidelity):
    assert dict(found.call(name).properties)["fidelity"] == fidelity


OWN_DATA = "no data moves, so what arrives is this rank's own; run the test at fidelity 'threads'"
ONE_BODY = (
    "one body runs for all ranks, so no rank has an object of its own to send; run the test at "
    "fidelity 'threads'"
)
NUMBER = (
    "fidelity 'local_tensor' cannot show the number of a rank: one body runs for all ranks at "
    "once; take what differs from rank.mesh and DTensor; run the test at fidelity 'threads' or "
    "above."
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "test_gather_under_fake",
            f"fidelity 'fake' cannot show collectives of Python objects: {OWN_DATA} or above.",
        ),
        (
            "test_objects_under_a_name_of_the_modules_own",
            f"fidelity 'fake' cannot show collectives of Python objects: {OWN_DATA} or above.",
        ),
        (
            "test_ddp_under_fake",
            "fidelity 'fake' cannot show DistributedDataParallel: its reducer compares parameters "
            "between ranks; run the test at fidelity 'threads' or above.",
        ),
        (
            "test_fsdp1_under_fake",
            "fidelity 'fake' cannot show FSDP1 (FullyShardedDataParallel): it exchanges objects "
            "between ranks; run the test at fidelity 'threads' or above.",
        ),
        (
            "test_stages_that_are_imported_late",
            f"fidelity 'fake' cannot show pipeline stages: {OWN_DATA} or above.",
        ),
        (
            "test_checkpoints_under_fake",
            f"fidelity 'fake' cannot show distributed checkpoints: {OWN_DATA} or above.",
        ),
        ("test_index", NUMBER),
        ("test_local_rank", NUMBER),
        ("test_get_rank", NUMBER),
        (
            "test_gather_under_local_tensor",
            "fidelity 'local_tensor' cannot show collectives of Python objects: "
            f"{ONE_BODY} or above.",
        ),
        (
            "test_samples_under_local_tensor",
            "fidelity 'local_tensor' cannot show the samples of a rank (DistributedSampler): one "
            "body runs for all ranks, which would all see those of rank 0; run the test at "
            "fidelity 'threads' or above.",
        ),
        (
            "test_fsdp2_under_local_tensor",
            "fidelity 'local_tensor' cannot show FSDP2 (fully_shard): it resizes the storage of "
            "parameters, and one tensor that stands for all ranks has none; with that stubbed its "
            "numbers are wrong; run the test at fidelity 'threads' or above.",
        ),
        (
            "test_ddp_under_local_tensor",
            "fidelity 'local_tensor' cannot show DistributedDataParallel: its reducer needs the "
            "storage of each parameter; run the test at fidelity 'threads' or above.",
        ),
    ],
)
def test_what_they_cannot_show_fails_with_the_reason(found, name, text):
    row = found.call(name)
    assert row.outcome == "failed"
    assert text in row.text


def test_failures_say_whom_the_body_stood_for(found):
    row = found.call("test_fails_under_fake")
    head = row.text.splitlines()[0]
    assert head.startswith("fidelity fake: rank 5 of 16 failed: ")
    assert "16 == 3" in head
    assert ["Captured stdout call (rank 0)", "seen\n"] in row.sections


@pytest.mark.parametrize("fidelity", ["fake", "local_tensor"])
def test_the_process_serves_the_next_test(run_session, fidelity):
    text = f"""
import os, pytest, torch
import torch.distributed as dist

@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.ranks(4, fidelity="{fidelity}")
def test_it(rank, turn, record_property):
    dist.all_reduce(torch.ones(2))
    record_property("pid", os.getpid())
"""
    found = run_session({"test_it.py": text}, "-p", "no:randomly")
    pids = {dict(found.call(f"test_it[{turn}]").properties)["pid"] for turn in (1, 2)}
    assert len(pids) == 1
    assert "left behind" not in found.output


def test_hangs_end_with_stacks(found):
    text = found.call("test_hangs").text
    head = "fidelity local_tensor: timed out after 8 s: the body of all 4 ranks was in test_hangs"
    assert text.startswith(head)
    assert "time.sleep" not in text.splitlines()[0]
    assert "in test_hangs" in text.split("stacks of")[1]


def test_the_summary_tells_pretended_ranks_from_real_ones(found):
    assert "ranks ws=65536 fake" in found.output
    assert "ranks ws=4 local_tensor" in found.output


def test_pretended_ranks_meet_no_requirement_of_ranks(run_session):
    text = """
import pytest

@pytest.mark.ranks(8, fidelity="fake")
def test_fake(rank):
    pass

@pytest.mark.ranks(2, fidelity="threads")
def test_threads(rank):
    pass
"""
    found = run_session({"test_it.py": text}, "--ranks-require=ranks:1")
    assert found.returncode != 0
    assert (
        "ranks:1 is not met: 2 ranks tests ran, none on rank processes (fidelity fake, threads); "
        "it takes fidelity gloo or above\n"
    ) in found.output
    real = "@pytest.mark.ranks(1)\ndef test_real(rank):\n    pass"
    found = run_session({"test_it.py": text + real}, "--ranks-require=ranks:2")
    assert found.returncode != 0
    assert (
        "ranks:2 is not met: 3 ranks tests ran, on 1 rank process at most; 2 had no rank processes "
        "(fidelity fake, threads)\n"
    ) in found.output
