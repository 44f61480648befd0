"""Which ranks wait for which, whether that can ever end, and how their collectives differ.

Pure functions over what the witnesses saw: nothing here waits, asks or ends anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pytest_ranks.launch.forensics.sight import Record, Sight

# Of these, each rank may bring another amount of data.
_UNEVEN = ("all_to_all", "alltoall")
_ROOTED = ("broadcast", "reduce", "scatter", "gather")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The ranks of a run at one moment.

    Attributes:
        sights: what each rank was doing, without those that did not answer.
        finished: those that are done with the run.
        asleep: those that are blocked in communication and have been for a while.
        size: number of ranks.
    """

    sights: Mapping[int, Sight]
    finished: frozenset[int] = frozenset()
    asleep: frozenset[int] = frozenset()
    size: int = field(default=0)

    def members(self, rank: int, record: Record) -> tuple[int, ...]:
        """Return the ranks of a collective's group, as one of them knows it."""
        group = self.sights[rank].groups.get(record.group)
        return group.ranks if group is not None else tuple(range(self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first collective of a group that its ranks have not issued alike.

    Attributes:
        records: rank -> what it issued under one number of the group.
        kind: what differs: `operation`, `dtype`, `shape`, `root` or `group`.
    """

    records: dict[int, Record]
    kind: str


def is_asleep(before: Sight | None, now: Sight) -> bool:
    """Return whether a rank's main thread is blocked in communication and has not run since.

    A thread that waits for a processor does not run either; the kernel tells the two apart.
    """
    return (
        before is not None
        and now.is_waiting
        and now.is_blocked
        and now.switches == before.switches
        and (now.frames, now.instruction) == (before.frames, before.instruction)
    )


def find_stuck(scene: Scene) -> list[int]:
    """Return the ranks that can never go on, whatever the others still do.

    A rank in a collective goes on once every member of the group has issued the same one. A
    member that is at work elsewhere may still do that; one that has finished will not, nor will
    one that itself can never go on. A rank with other Python threads is never judged, nor
    believed to be done: they may issue what is missing.
    """
    stuck = {rank for rank in scene.asleep if not scene.sights[rank].other_threads}
    while freed := {rank for rank in stuck if _can_go_on(rank, scene, stuck)}:
        stuck -= freed
    return sorted(stuck)


def _can_go_on(rank: int, scene: Scene, stuck: Collection[int]) -> bool:
    sight = scene.sights[rank]
    if sight.is_peer_to_peer:
        return _can_meet(rank, scene, stuck)
    if records := sight.waits_for:
        return any(_can_complete(rank, record, scene, stuck) for record in records)
    # In new_group, init_process_group or at a store: whoever is at work may come and help, and
    # so may one that waits in such a place too.
    others = set(range(scene.size)) - {rank}
    return any(
        not _will_not(other, scene, stuck) or (other in stuck and not scene.sights[other].waits_for)
        for other in others
    )


def _can_meet(rank: int, scene: Scene, stuck: Collection[int]) -> bool:
    sight = scene.sights[rank]
    peers = {sight.peer} if sight.peer is not None else set(range(scene.size)) - {rank}
    for peer in peers:
        other = scene.sights.get(peer)
        if other is None or not _will_not(peer, scene, stuck):
            return True
        is_partner = other.is_peer_to_peer and other.peer in (rank, None)
        if peer in stuck and is_partner and other.torch_call != sight.torch_call:
            return True
    return False


def _can_complete(rank: int, record: Record, scene: Scene, stuck: Collection[int]) -> bool:
    for member in scene.members(rank, record):
        other = scene.sights.get(member)
        if member == rank or other is None:
            continue
        found = issued(other, record)
        if found is None and not is_past(other, record) and _will_not(member, scene, stuck):
            return False
        if found is not None and difference(scene, {rank: record, member: found}) is not None:
            return False
    return True


def _will_not(rank: int, scene: Scene, stuck: Collection[int]) -> bool:
    """Return whether a rank will issue nothing more."""
    other = scene.sights.get(rank)
    if rank in scene.finished:
        return other is not None and not other.other_threads
    return rank in stuck


def issued(sight: Sight, record: Record) -> Record | None:
    """Return what a rank issued under the number of another's collective, if it is known."""
    for one in reversed(sight.records):
        if (one.group, one.sequence) == (record.group, record.sequence):
            return one
    return None


def is_past(sight: Sight, record: Record) -> bool:
    """Return whether a rank has issued later ones of that group."""
    return any(
        one.group == record.group and one.sequence > record.sequence for one in sight.records
    )


def find_difference(scene: Scene) -> Difference | None:
    """Return the first collective that the members of its group issued unlike each other."""
    by_number: dict[tuple[str, tuple[int, ...], int], dict[int, Record]] = {}
    for rank, sight in sorted(scene.sights.items()):
        for record in sight.records:
            place = (record.group, scene.members(rank, record), record.sequence)
            by_number.setdefault(place, {})[rank] = record
    for (_, members, _), records in sorted(by_number.items(), key=lambda pair: _age(pair[1])):
        mine = {rank: one for rank, one in records.items() if rank in members}
        kind = difference(scene, mine)
        if kind is not None:
            return Difference(records=mine, kind=kind)
    return None


def _age(records: Mapping[int, Record]) -> float:
    return min(record.created for record in records.values())


def difference(scene: Scene, records: Mapping[int, Record]) -> str | None:
    """Return what differs between the ranks' records of one collective, None where nothing does."""
    ranks = list(records)
    for rank in ranks[1:]:
        one, other = records[ranks[0]], records[rank]
        if scene.members(ranks[0], one) != scene.members(rank, other):
            return "group"
        if one.op != other.op:
            return "operation"
        if one.dtypes[:1] != other.dtypes[:1]:
            return "dtype"
        if not _is_as_large(one, other):
            return "shape"
        roots = _root(scene, ranks[0], one), _root(scene, rank, other)
        if None not in roots and roots[0] != roots[1]:
            return "root"
    return None


def _is_as_large(one: Record, other: Record) -> bool:
    if one.op.startswith(_UNEVEN):
        return True
    # Only the root has the list that is scattered, or the one that is gathered.
    sides = [(one.outputs, other.outputs)] if one.op == "scatter" else [(one.inputs, other.inputs)]
    return all(
        [math.prod(shape) for shape in left] == [math.prod(shape) for shape in right]
        for left, right in sides
    )


def _root(scene: Scene, rank: int, record: Record) -> object:
    """Return the root that a rank calls a collective with, known only while it is in there."""
    sight = scene.sights[rank]
    is_there = record.op in _ROOTED and sight.waits_for == (record,)
    return sight.root if is_there else None
