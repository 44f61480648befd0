"""Who waits where, and which collectives differ, in sentences for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.forensics import collectives
from pytest_ranks.launch.forensics.collectives import Scene
from pytest_ranks.launch.reporting.folding import ranks_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_ranks.launch.forensics.collectives import Difference
    from pytest_ranks.launch.forensics.sight import Record, Sight
    from pytest_ranks.launch.rank_run import RankRun

_WHAT_DIFFERS = {
    "operation": "the ranks called different collectives",
    "dtype": "the ranks called a collective with different dtypes",
    "shape": "the ranks called a collective with different amounts of data",
    "root": "the ranks called a collective with different roots",
    "group": "the ranks called a collective on groups of one name with different members",
}


def explain(runs: Sequence[RankRun]) -> list[str]:
    """Return what is known of a failed run besides what its ranks said, a line a finding.

    How ranks were killed; and where some had to be stopped, what each of them was doing.
    """
    by_note: dict[str, list[int]] = {}
    for run in runs:
        if run.note:
            by_note.setdefault(run.note, []).append(run.rank)
    killed = [
        f"{ranks_text(ranks)} {note.replace('was', 'were', 1) if ranks[1:] else note}"
        for note, ranks in by_note.items()
    ]
    return [*killed, *_explain_stopped(runs)]


def _explain_stopped(runs: Sequence[RankRun]) -> list[str]:
    if not any(run.stopped for run in runs) or not any(run.sight for run in runs):
        return []
    sights = {run.rank: run.sight for run in runs if run.sight is not None}
    scene = Scene(
        sights=sights,
        finished=frozenset(run.rank for run in runs if run.done),
        size=len(runs),
    )
    dead = {run.rank for run in runs if run.crashed}
    found = collectives.find_difference(scene)
    lines = [] if found is None else [describe_difference(scene, found)]
    lines += who_waits(scene, dead)
    silent = [run for run in runs if run.stopped and run.sight is None]
    lines += [_silence(run) for run in silent]
    return [*lines, *_recorder(sights)]


def describe_difference(scene: Scene, found: Difference) -> str:
    """Return the sentence on collectives that differ, with every rank's call and its place."""
    by_text: dict[str, list[int]] = {}
    for rank, record in found.records.items():
        by_text.setdefault(_issued(scene, rank, record, found.kind), []).append(rank)
    parts = [f"{ranks_text(ranks)} {text}" for text, ranks in by_text.items()]
    return f"{_WHAT_DIFFERS[found.kind]}: {'; '.join(parts)}"


def _issued(scene: Scene, rank: int, record: Record, kind: str) -> str:
    extra = ""
    if kind == "root":
        name = "src" if record.op in ("broadcast", "scatter") else "dst"
        extra = f" with {name}={scene.sights[rank].root}"
    return f"called {record.what}{extra}{_on(scene, rank, record, kind)}{_at(record.site)}"


def _on(scene: Scene, rank: int, record: Record, kind: str = "") -> str:
    """Return which group a collective is on, nothing for the default one."""
    if not record.label and kind != "group":
        return ""
    name = f" {record.label!r}" if record.label else ""
    return f" on group{name} of {ranks_text(scene.members(rank, record))}"


def who_waits(scene: Scene, dead: set[int]) -> list[str]:
    """Return a sentence for each thing that ranks wait for, and one for those that do not wait."""
    waits: dict[tuple[str, str], list[int]] = {}
    busy: dict[str, list[int]] = {}
    missing: dict[tuple[str, str], Mapping[int, str]] = {}
    for rank, sight in sorted(scene.sights.items()):
        if rank in scene.finished:
            continue
        if not sight.is_waiting:
            busy.setdefault(sight.site or "code that its stack does not show", []).append(rank)
            continue
        what = _waits_for(scene, rank, sight)
        waits.setdefault((what, sight.site), []).append(rank)
        if records := sight.waits_for:
            missing[what, sight.site] = _missing(scene, rank, records[0], dead)
    lines = []
    told: set[int] = set()
    for (what, place), ranks in waits.items():
        absent = missing.get((what, place), {})
        told |= set(absent)
        verb = "wait" if len(ranks) > 1 else "waits"
        lines.append(f"{ranks_text(ranks)} {verb} in {what}{_at(place)}{_absent_text(absent)}")
    for place, ranks in busy.items():
        if left := [rank for rank in ranks if rank not in told]:
            lines.append(f"{ranks_text(left)} {'are' if len(left) > 1 else 'is'} in {place}")
    return lines if waits else []


def _waits_for(scene: Scene, rank: int, sight: Sight) -> str:
    if sight.is_peer_to_peer:
        verb = "from" if sight.torch_call == "recv" else "to"
        peer = "any rank" if sight.peer is None else f"rank {sight.peer}"
        dtype, shape = sight.arguments.get("tensor", ("", None))
        tensor = f" of {dtype} {list(shape)}" if shape is not None else ""
        return f"{sight.torch_call} {verb} {peer}{tensor}"
    records = sight.waits_for
    if not records:
        return sight.torch_call or sight.frames[0][2]
    first = records[0]
    more = f" or one of {len(records) - 1} later ones" if len(records) > 1 else ""
    issued = "" if first.site == sight.site else f", issued in {first.site}"
    return f"{first.what}{_on(scene, rank, first)}{more}{issued}"


def _missing(scene: Scene, rank: int, record: Record, dead: set[int]) -> Mapping[int, str]:
    """Return, for each member that has not issued a collective, what it does instead."""
    found = {}
    for member in scene.members(rank, record):
        other = scene.sights.get(member)
        if member in dead:
            found[member] = "it died"
        elif other is None or member == rank:
            continue
        elif collectives.issued(other, record) is None and not collectives.is_past(other, record):
            if member in scene.finished:
                found[member] = "it has finished"
            elif other.is_waiting:
                found[member] = f"it waits in {_waits_for(scene, member, other)}"
            else:
                found[member] = f"it is in {other.site or 'code that its stack does not show'}"
    return found


def _absent_text(absent: Mapping[int, str]) -> str:
    by_text: dict[str, list[int]] = {}
    for rank, text in absent.items():
        by_text.setdefault(text, []).append(rank)
    parts = []
    for text, ranks in by_text.items():
        does = text
        if len(ranks) > 1:
            for one, many in (
                ("it is", "they are"),
                ("it waits", "they wait"),
                ("it has", "they have"),
                ("it ", "they "),
            ):
                if does.startswith(one):
                    does = many + does.removeprefix(one)
                    break
        parts.append(f"; {ranks_text(ranks)} never issued it: {does}")
    return "".join(parts)


def _silence(run: RankRun) -> str:
    place = f" in {run.where}" if run.where is not None else ""
    return (
        f"rank {run.rank} did not answer: its main thread holds the interpreter lock{place}, or "
        "its process is stopped"
    )


def _recorder(sights: Mapping[int, Sight]) -> list[str]:
    reasons = {sight.recorder for sight in sights.values() if sight.recorder}
    return [f"torch's flight recorder tells nothing: {reason}" for reason in sorted(reasons)]


def _at(place: str) -> str:
    return f", {place}" if place else ""
