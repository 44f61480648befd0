"""Who can never go on, and where collectives differ, judged from sights made by hand."""

from __future__ import annotations

import dataclasses
import os
import sysconfig

import pytest

from pytest_ranks.launch.forensics import collectives
from pytest_ranks.launch.forensics.collectives import Scene
from pytest_ranks.launch.forensics.explanation import describe_difference, who_waits
from pytest_ranks.launch.forensics.sight import Group, Record, Sight

C10D = f"{sysconfig.get_paths()['purelib']}/torch/distributed/distributed_c10d.py"
TEST = "/repo/test_it.py"


def relative(path):
    return os.path.relpath(path)


def record(
    op="all_reduce", sequence=1, *, group="0", label="", shape=(4,), dtype="float32", over=False
):
    return Record(
        op=op,
        group=group,
        label=label,
        sequence=sequence,
        inputs=(shape,),
        outputs=(shape,),
        dtypes=(dtype,),
        is_over=over,
        frames=((C10D, 1, op), (TEST, 10, "step")),
    )


def waiting(rank, *records, size=2, groups=None, **more):
    """Return a rank that is in its last collective."""
    last = records[-1]
    return Sight(
        rank=rank,
        frames=((C10D, 2, last.op), (TEST, 10, "step")),
        records=tuple(records),
        groups=groups or {"0": Group(ranks=tuple(range(size)))},
        is_blocked=True,
        **more,
    )


def busy(rank, *records, size=2):
    return Sight(
        rank=rank,
        frames=((TEST, 20, "compute"),),
        records=tuple(records),
        groups={"0": Group(ranks=tuple(range(size)))},
    )


def in_recv(rank, source, *, function="recv", size=2):
    name = "group_src" if function == "recv" else "group_dst"
    return Sight(
        rank=rank,
        frames=((C10D, 3, function), (TEST, 30, "talk")),
        arguments={name: source, "group": "0", "tensor": ["float32", [3]]},
        groups={"0": Group(ranks=tuple(range(size)))},
        is_blocked=True,
    )


def in_new_group(rank):
    return Sight(rank=rank, frames=((C10D, 4, "new_group"), (TEST, 40, "setup")), is_blocked=True)


def scene(*sights, finished=(), asleep=None):
    left = {one.rank for one in sights} - set(finished)
    blocked = {one.rank for one in sights if one.rank in left and one.is_waiting}
    return Scene(
        sights={one.rank: one for one in sights},
        finished=frozenset(finished),
        asleep=frozenset(blocked if asleep is None else asleep),
        size=len(sights),
    )


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (scene(waiting(0, record()), busy(1)), []),
        (scene(waiting(0, record()), waiting(1, record())), []),
        (scene(waiting(0, record()), busy(1), finished=[1]), [0]),
        (scene(waiting(0, record()), busy(1, record(over=True)), finished=[1]), []),
        # the recorder has room for the newest alone
        (scene(waiting(0, record()), busy(1, record(sequence=9, over=True)), finished=[1]), []),
        (scene(waiting(0, record()), waiting(1, record("broadcast"))), [0, 1]),
        (scene(waiting(0, record()), waiting(1, record(shape=(5,)))), [0, 1]),
        (scene(waiting(0, record()), waiting(1, record(dtype="int32"))), [0, 1]),
        (scene(waiting(0, record(shape=(2, 3))), waiting(1, record(shape=(6,)))), []),
        (scene(waiting(0, record(over=True), record(sequence=2)), waiting(1, record())), []),
        (scene(in_recv(0, 1), in_recv(1, 0)), [0, 1]),
        (scene(in_recv(0, 1), in_recv(1, 0, function="send")), []),
        (scene(in_recv(0, 1), busy(1)), []),
        (scene(in_recv(0, 1), busy(1), finished=[1]), [0]),
        (scene(in_recv(0, 1), waiting(1, record())), [0, 1]),
        (scene(in_new_group(0), in_new_group(1)), []),
        (scene(in_new_group(0), waiting(1, record())), [0, 1]),
        (scene(in_new_group(0), busy(1)), []),
        (scene(in_new_group(0), busy(1), finished=[1]), [0]),
        (scene(waiting(0, record(), size=3), waiting(1, record(), size=3), busy(2, size=3)), []),
    ],
)
def test_only_ranks_that_wait_in_vain_are_stuck(case, found):
    assert collectives.find_stuck(case) == found


def test_a_rank_waits_for_one_that_waits_for_one_that_has_finished():
    pairs = {"a": Group(ranks=(0, 1)), "b": Group(ranks=(1, 2))}
    first = waiting(0, record(group="a"), groups=pairs)
    second = waiting(1, record(group="b"), groups=pairs)
    third = busy(2, size=3)
    assert collectives.find_stuck(scene(first, second, third)) == []
    assert collectives.find_stuck(scene(first, second, third, finished=[2])) == [0, 1]


def test_a_message_goes_to_the_rank_that_it_is_for():
    sights = [in_recv(0, 1, size=3), in_recv(1, 2, function="send", size=3), busy(2, size=3)]
    assert collectives.find_stuck(scene(*sights)) == []
    assert collectives.find_stuck(scene(*sights, finished=[2])) == [0, 1]


def test_a_rank_that_waits_for_several_goes_on_with_any_of_them():
    pairs = {"a": Group(ranks=(0, 1)), "b": Group(ranks=(0, 2))}
    mine = (record("reduce_scatter", group="a"), record(group="b"))
    first = Sight(
        rank=0,
        frames=((TEST, 50, "wait_for_all"),),
        call="wait",
        records=mine,
        groups=pairs,
        is_blocked=True,
    )
    others = busy(1, size=3), busy(2, size=3)
    assert first.waits_for == mine
    for finished in ([1], [2]):
        assert collectives.find_stuck(scene(first, *others, finished=finished)) == []
    assert collectives.find_stuck(scene(first, *others, finished=[1, 2])) == [0]


def test_groups_of_one_name_and_other_ranks_never_meet():
    first = waiting(0, record(group="g"), groups={"g": Group(ranks=(0, 1))})
    second = waiting(1, record(group="g"), groups={"g": Group(ranks=(1, 0))})
    assert collectives.find_stuck(scene(first, second)) == [0, 1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_with_other_threads_is_neither_judged_nor_believed_to_be_done(which):
    sights = [waiting(0, record()), busy(1)]
    sights[which] = dataclasses.replace(sights[which], other_threads=1)
    assert collectives.find_stuck(scene(*sights, finished=[1])) == []


def test_roots_are_compared_while_all_are_in_the_call():
    sights = [
        waiting(0, record("broadcast"), arguments={"group_src": 0}),
        waiting(1, record("broadcast"), arguments={"group_src": 1}),
    ]
    assert collectives.find_stuck(scene(*sights)) == [0, 1]
    found = collectives.find_difference(scene(*sights))
    assert found is not None
    place = f"step ({relative(TEST)}:10)"
    assert describe_difference(scene(*sights), found) == (
        "the ranks called a collective with different roots: "
        f"rank 0 called broadcast #1 of float32 [4] with src=0, {place}; "
        f"rank 1 called broadcast #1 of float32 [4] with src=1, {place}"
    )


def test_the_first_difference_is_found_behind_equal_ones():
    sights = [
        waiting(0, record(over=True), record("broadcast", 2), record("barrier", 3)),
        waiting(1, record(over=True), record(sequence=2)),
    ]
    found = collectives.find_difference(scene(*sights))
    assert found is not None
    assert found.kind == "operation"
    assert {rank: one.op for rank, one in found.records.items()} == {
        0: "broadcast",
        1: "all_reduce",
    }


def test_the_root_of_a_later_call_is_not_that_of_an_earlier_one():
    sights = [
        waiting(
            0,
            record("broadcast", over=True),
            record("broadcast", 2),
            arguments={"group_src": 1},
        ),
        waiting(1, record("broadcast"), arguments={"group_src": 0}),
    ]
    assert collectives.find_difference(scene(*sights)) is None


def test_the_oldest_of_several_differences_is_told():
    groups = {name: Group(ranks=(0, 1)) for name in ("early", "late")}

    def differing(rank, op):
        early = dataclasses.replace(record(op, group="early"), created=5.0 + rank)
        late = dataclasses.replace(record(op, group="late"), created=8.0)
        return waiting(rank, late, early, groups=groups)

    found = collectives.find_difference(scene(differing(0, "broadcast"), differing(1, "reduce")))
    assert found is not None
    assert {one.group for one in found.records.values()} == {"early"}


def test_what_the_root_scatters_is_not_compared_with_what_the_others_have():
    def scattering(rank, inputs, outputs):
        made = record("scatter")
        return waiting(rank, dataclasses.replace(made, inputs=inputs, outputs=outputs))

    root = scattering(0, ((4,), (4,)), ((4,),))
    assert collectives.find_difference(scene(root, scattering(1, (), ((4,),)))) is None
    found = collectives.find_difference(scene(root, scattering(1, (), ((5,),))))
    assert found is not None
    assert found.kind == "shape"


@pytest.mark.parametrize("op", ["all_to_all", "all_to_all_base", "alltoall_base"])
def test_uneven_exchanges_are_no_difference(op):
    sights = [waiting(0, record(op, shape=(1,))), waiting(1, record(op, shape=(9,)))]
    assert collectives.find_difference(scene(*sights)) is None


def test_a_blocked_thread_is_told_from_one_that_waits_for_a_processor():
    before = waiting(0, record(), switches=7)
    assert collectives.is_asleep(before, before)
    assert not collectives.is_asleep(None, before)
    assert not collectives.is_asleep(before, dataclasses.replace(before, switches=8))
    assert not collectives.is_asleep(before, dataclasses.replace(before, is_blocked=False))
    moved = waiting(0, record(over=True), record(sequence=2), switches=7)
    assert not collectives.is_asleep(before, dataclasses.replace(moved, instruction=4))


def test_who_waits_names_what_the_others_do_instead():
    sights = [
        waiting(0, record(sequence=17), size=3),
        busy(1, size=3),
        waiting(2, record(sequence=17), size=3),
    ]
    place = f"({relative(TEST)}:"
    assert who_waits(scene(*sights), set()) == [
        f"ranks 0 and 2 wait in all_reduce #17 of float32 [4], step {place}10); "
        f"rank 1 never issued it: it is in compute {place}20)"
    ]
    assert who_waits(scene(*sights, finished=[1]), set()) == [
        f"ranks 0 and 2 wait in all_reduce #17 of float32 [4], step {place}10); "
        "rank 1 never issued it: it has finished"
    ]
    assert who_waits(scene(sights[0], in_recv(1, 0), sights[2]), {2}) == [
        f"ranks 0 and 2 wait in all_reduce #17 of float32 [4], step {place}10); "
        "rank 1 never issued it: it waits in recv from rank 0 of float32 [3]; "
        "rank 2 never issued it: it died",
        f"rank 1 waits in recv from rank 0 of float32 [3], talk {place}30)",
    ]


def test_a_group_is_named_with_its_ranks():
    groups = {"g": Group(ranks=(0, 2))}
    mine = record(group="g", label="mesh_dp")
    sights = [waiting(0, mine, groups=groups), busy(1, size=3), busy(2, size=3)]
    assert who_waits(scene(*sights), set())[0].startswith(
        "rank 0 waits in all_reduce #1 of float32 [4] on group 'mesh_dp' of ranks 0 and 2, step"
    )
