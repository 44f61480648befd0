"""Tests that share a process group: it is used again only where it is proven clean."""

from __future__ import annotations

import pytest

from pytest_ranks.launch.kept import GroupState, why_unclean

pytest.importorskip("torch")

HEAD = """
import os
import pytest, torch
import torch.distributed as dist


def issued():
    return dist.group.WORLD._get_sequence_number_for_group()


def total():
    found = torch.ones(1)
    dist.all_reduce(found)
    return found.item()


def note(record_property, rank, before=None):
    record_property("before", issued() if before is None else before)
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
    assert total() == 2.0
"""
MODULE = (
    HEAD
    + """
pytestmark = pytest.mark.ranks(2, keep_group=True)


def test_first(rank, record_property):
    note(record_property, rank)
    torch.set_default_dtype(torch.float64)


def test_shares(rank, record_property):
    assert torch.get_default_dtype() == torch.float32
    note(record_property, rank)


def test_shards_a_model(rank):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    model(torch.ones(1, 4)).sum().backward()


def test_after_reduce_scatter(rank, record_property):
    note(record_property, rank)


def test_leaves_a_collective_of_one_rank(rank, record_property):
    note(record_property, rank)
    if rank.index == 0:
        dist.all_reduce(torch.full((1,), 100.0), async_op=True)


def test_after_collective(rank, record_property):
    note(record_property, rank)


def test_leaves_a_message(rank):
    if rank.index == 0:
        dist.isend(torch.full((1,), 100.0), dst=1)


def test_after_message(rank, record_property):
    note(record_property, rank)


def test_leaves_a_message_each(rank):
    dist.isend(torch.full((1,), 100.0), dst=1 - rank.index)


def test_after_message_each(rank, record_property):
    before = issued()
    got = torch.zeros(1)
    works = [dist.isend(torch.ones(1), dst=1 - rank.index), dist.irecv(got, src=1 - rank.index)]
    for work in works:
        work.wait()
    assert got.item() == 1.0
    note(record_property, rank, before)


def test_after_answered_messages(rank, record_property):
    note(record_property, rank)


def test_leaves_a_subgroup(rank):
    dist.new_group([0, 1])


def test_after_subgroup(rank, record_property):
    note(record_property, rank)


def test_destroys_it(rank):
    dist.destroy_process_group()


def test_after_destroyed(rank, record_property):
    note(record_property, rank)


def test_raises_on_one_rank(rank, record_property):
    record_property("pids", " ".join(map(str, rank.gather(os.getpid()))))
    if rank.index == 1:
        raise ValueError("before the collective")
    dist.all_reduce(torch.full((1,), 100.0))


def test_after_failure(rank, record_property):
    note(record_property, rank)


@pytest.mark.ranks(2)
def test_of_its_own(rank, record_property):
    note(record_property, rank)
"""
)
CLASSES = (
    HEAD
    + """
@pytest.mark.ranks(dp=2, keep_group=True)
class TestOne:
    def test_a(self, rank, record_property):
        note(record_property, rank)
        assert rank.mesh.mesh_dim_names == ("dp",)
        dist.all_reduce(torch.ones(1), group=rank.mesh["dp"].get_group())

    def test_b(self, rank, record_property):
        note(record_property, rank)
        dist.all_reduce(torch.ones(1), group=rank.mesh["dp"].get_group())


@pytest.mark.ranks(2, keep_group=True)
class TestTwo:
    def test_a(self, rank, record_property):
        note(record_property, rank)


@pytest.mark.parametrize("number", range(2))
@pytest.mark.ranks(2, keep_group=True)
def test_function(number, rank, record_property):
    note(record_property, rank)
"""
)


@pytest.fixture(scope="module")
def session(run_session):
    files = {"test_module.py": MODULE, "test_classes.py": CLASSES}
    return run_session(files, "-p", "no:randomly", "-p", "no:rerunfailures", *files)


def noted(session, name):
    found = dict(session.call(name).properties)
    return found["pids"], found.get("before")


def remark(session, name):
    found = [text for title, text in session.call(name).sections if title == "Kept process group"]
    assert len(found) <= 1
    return found[0] if found else None


def test_every_test_but_the_failing_one_reads_its_own_sum(session):
    bad = [row.id for row in session.rows if row.outcome != "passed"]
    assert bad == [
        "test_module.py::test_leaves_a_collective_of_one_rank",
        "test_module.py::test_raises_on_one_rank",
    ], session.output


def test_the_group_is_shared_while_it_is_clean(session):
    (first, fresh), (again, used) = noted(session, "test_first"), noted(session, "test_shares")
    assert first == again
    assert fresh == 0
    assert used > 0
    assert remark(session, "test_first") is None


def test_what_gloo_never_calls_complete_leaves_the_group_clean(session):
    """The reduce-scatter of FSDP's backward pass, whose work says so neither waited for nor not."""
    assert remark(session, "test_shards_a_model") is None
    assert noted(session, "test_after_reduce_scatter")[1] > 0


@pytest.mark.parametrize(
    ("left", "after", "reason"),
    [
        ("a_message", "message", "rank 0 left 1 operation pending"),
        ("a_message_each", "message_each", "rank 0 left 1 operation pending"),
        ("a_subgroup", "subgroup", "rank 0 left 1 other group behind"),
    ],
)
def test_what_cannot_be_proven_clean_is_replaced_and_said(session, left, after, reason):
    text = f"not proven clean, so the next test gets a fresh one: {reason}"
    assert remark(session, f"test_leaves_{left}") == text
    ranks = noted(session, "test_after_collective")[0]
    assert noted(session, f"test_after_{after}") == (ranks, 0)  # the same ranks, a fresh group


def test_messages_that_were_answered_leave_the_group_clean(session):
    assert remark(session, "test_after_message_each") is None
    assert noted(session, "test_after_answered_messages")[1] > 0


def test_a_destroyed_group_is_made_again(session):
    assert remark(session, "test_destroys_it").endswith(": rank 0, 1 destroyed it")
    assert noted(session, "test_after_destroyed")[1] == 0


def test_ranks_of_a_failed_test_are_replaced(session):
    failed, (after, used) = (
        noted(session, "test_raises_on_one_rank"),
        None or noted(session, "test_after_failure"),
    )
    assert set(failed[0].split()).isdisjoint(after.split())
    assert used == 0


def test_each_mark_has_a_group_of_its_own(session):
    names = ("test_first", "test_of_its_own", "TestOne::test_a", "TestTwo::test_a")
    found = [noted(session, name)[0] for name in (*names, "test_function[0]")]
    assert len(set(found)) == len(found)
    for first, second in (
        ("TestOne::test_a", "TestOne::test_b"),
        ("test_function[0]", "test_function[1]"),
    ):
        assert noted(session, first) == (noted(session, second)[0], 0)
        assert noted(session, second)[1] > 0


def state(*sequences, **other):
    return GroupState(sequences=sequences, **other)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ((state(("0", 3)), state(("0", 3))), None),
        ((state(("0", 3), ("tp", 1)), state(("0", 3), ("pp", 2))), None),
        ((state(("0", 3)), None), "rank 1 destroyed it"),
        (
            (state(("0", 3), ("tp", 1)), state(("0", 3), ("tp", 2))),
            "the ranks issued different numbers of operations: 1 on rank 0, 2 on rank 1",
        ),
        ((state(("0", None)),), "torch does not tell how many collectives it has seen"),
        ((state(),), "torch does not tell what was done on it"),
        ((state(("0", 1), others=2),), "rank 0 left 2 other groups behind"),
        ((state(("0", 1)), state(("0", 1), pending=2)), "rank 1 left 2 operations pending"),
        (
            (
                state(("0", 1), messages=(("0", "send", 0, 1, 2), ("0", "recv", 0, 1, 1))),
                state(("0", 1), messages=(("0", "send", 1, 0, 1), ("0", "recv", 1, 0, 1))),
            ),
            "3 messages were sent and 2 received, not pair by pair",
        ),
        (
            (state(("0", 1), messages=(("0", "recv_anysource", 0, -1, 1),)),),
            "rank 0 received messages of any rank, which nobody can match",
        ),
    ],
)
def test_a_group_is_proven_clean_or_the_reason_is_given(states, reason):
    assert why_unclean(states) == reason


def test_fixtures_may_hold_groups_and_have_messages_on_the_way():
    states = (state(("0", 1), others=1, messages=(("0", "send", 0, 1, 1),)),)
    assert why_unclean(states) is not None
    assert why_unclean(states, has_fixtures=True) is None
