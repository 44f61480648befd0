"""Packers side by side on lengths of several kinds: how near to the least possible, and how fast."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_ranks.reference.packing import PACKERS
from pytest_ranks.reference.packing_bounds import lower_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    MicroBatches = list[list[list[int]]]
    """For each micro-batch, for each rank, indices into the lengths."""
    AnyPacker = Callable[[list[int], int, int], MicroBatches]

CAPACITIES = (8192, 32768)


class Refused(Exception):
    """The packer has no plan for these lengths."""


def lognormal(count: int, random: Any) -> list[int]:
    """Chat data: mean about 600 tokens, a long tail."""
    import numpy

    return _whole(numpy.clip(random.lognormal(numpy.log(600) - 0.5, 1, count), 1, 8192))


def bimodal(count: int, random: Any) -> list[int]:
    """Long documents among short questions."""
    import numpy

    is_long = random.random(count) < 0.2
    long, short = random.integers(4097, 8193, count), random.integers(32, 513, count)
    return _whole(numpy.where(is_long, long, short))


def uniform(count: int, random: Any) -> list[int]:
    """Any length is as likely as any other."""
    return _whole(random.integers(1, 8193, count))


def equal(count: int, random: Any) -> list[int]:
    """All alike, two to a bin."""
    del random
    return [3000] * count


def no_slack(count: int, random: Any) -> list[int]:
    """Bins of 8192 cut into four, so that a plan without any room left exists."""
    import numpy

    found: list[int] = []
    while len(found) + 4 <= count:
        cuts = sorted(random.choice(numpy.arange(1, 8192), 3, replace=False).tolist())
        found += [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], 8192 - cuts[2]]
    random.shuffle(found)
    return _whole(found)


def _whole(found: Iterable[Any]) -> list[int]:
    return [int(one) for one in found]


LENGTHS: dict[str, Callable[[int, Any], list[int]]] = {
    one.__name__: one for one in (lognormal, bimodal, uniform, equal, no_slack)
}
"""Kinds of lengths: what training sees, and what is hard to pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one packer made of one case.

    Attributes:
        packer: its name.
        lengths: the kind of lengths, a name of `LENGTHS`.
        samples: how many there are.
        ranks: how many there are.
        capacity: tokens of a rank in a micro-batch.
        micro_batches: how many, divided by the least possible.
        step_tokens: the busiest ranks' tokens, divided by the least possible.
        idle: share of the time, in tokens, in which ranks wait.
        seconds: median of up to five calls.
    """

    packer: str
    lengths: str
    samples: int
    ranks: int
    capacity: int
    micro_batches: float
    step_tokens: float
    idle: float
    seconds: float


def ours() -> dict[str, AnyPacker]:
    """Return the packers of this package, by name."""

    def bare(name: str) -> AnyPacker:
        return lambda lengths, capacity, ranks: [
            [list(one) for one in bins]
            for bins in PACKERS[name](lengths, capacity, ranks).micro_batches
        ]

    return {f"ours, {name}": bare(name) for name in PACKERS}


def cases(
    samples: Sequence[int], ranks: Sequence[int]
) -> Iterator[tuple[str, list[int], int, int]]:
    """Yield each kind of lengths at each size: its name, the lengths, ranks and capacity."""
    import numpy

    for kind, make in LENGTHS.items():
        for count in samples:
            for world_size in ranks:
                if count >= 4 * world_size:
                    lengths = make(count, numpy.random.default_rng(count + world_size))
                    for capacity in CAPACITIES:
                        yield kind, lengths, world_size, capacity


def compare(
    packers: Mapping[str, AnyPacker],
    *,
    samples: Sequence[int],
    ranks: Sequence[int],
    limit: float = 1.0,
    on_case: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[list[Cell], list[str]]:
    """Give every packer the same lengths, and check every plan.

    Args:
        packers: by name.
        samples: how many samples a case has.
        ranks: how many ranks a case has; not more than a quarter of the samples.
        limit: seconds of one packer on a case.
        on_case: told of each case before it is measured.

    Returns:
        What was measured, and a line for each packer that made plans which are none.
    """
    cells: list[Cell] = []
    wrong: dict[str, list[str]] = {}
    for kind, lengths, world_size, capacity in cases(samples, ranks):
        on_case(kind, len(lengths), world_size)
        for name, pack in packers.items():
            found = _measure(name, pack, kind, lengths, world_size, capacity, limit)
            if isinstance(found, Cell):
                cells.append(found)
            else:
                wrong.setdefault(name, []).append(found)
    return cells, [
        f"{name}: {len(texts)} times, such as {texts[0]}" for name, texts in wrong.items()
    ]


def _measure(
    name: str,
    pack: AnyPacker,
    kind: str,
    lengths: list[int],
    ranks: int,
    capacity: int,
    limit: float,
) -> Cell | str:
    seconds: list[float] = []
    while not seconds or (len(seconds) < 5 and sum(seconds) < limit):
        start = time.perf_counter()
        try:
            plan = pack(list(lengths), capacity, ranks)
        except Refused as error:
            return f"refused: {error}"
        seconds.append(time.perf_counter() - start)
    if wrong := why_wrong(plan, lengths, capacity):
        return wrong
    least = lower_bounds(lengths, capacity, ranks)
    busiest = sum(max(sum(lengths[i] for i in indices) for indices in bins) for bins in plan)
    return Cell(
        packer=name,
        lengths=kind,
        samples=len(lengths),
        ranks=ranks,
        capacity=capacity,
        micro_batches=len(plan) / least.micro_batches,
        step_tokens=busiest / least.step_tokens,
        idle=1 - sum(lengths) / (busiest * ranks),
        seconds=statistics.median(seconds),
    )


def why_wrong(plan: MicroBatches, lengths: Sequence[int], capacity: int) -> str:
    """Return what makes this no plan for the lengths; nothing if it is one."""
    placed = [index for ranks in plan for indices in ranks for index in indices]
    if lost := len(set(range(len(lengths))) - set(placed)):
        return f"{lost} samples lost"
    if len(placed) > len(lengths):
        return f"{len(placed) - len(lengths)} samples placed twice"
    if len({len(ranks) for ranks in plan}) > 1:
        return "not every rank has a part in each micro-batch"
    most = max((sum(lengths[i] for i in indices) for ranks in plan for indices in ranks), default=0)
    return f"a row of {most} tokens in {capacity}" if most > capacity else ""


def table(cells: Sequence[Cell]) -> list[str]:
    """Return a row for each packer and kind of lengths, over all sizes, as Markdown."""
    lines = [
        "| lengths | packer | micro-batches / least | most | tokens waited for / least | most "
        "| idle | samples a second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in LENGTHS:
        rows: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.lengths == kind:
                rows.setdefault(cell.packer, []).append(cell)
        for name, own in rows.items():
            counts = [one.micro_batches for one in own]
            tokens = [one.step_tokens for one in own]
            speed = statistics.median(one.samples / one.seconds for one in own)
            shown = f"**{name}**" if name.startswith("ours") else name
            lines.append(
                f"| {kind} | {shown} | {statistics.mean(counts):.3f} | {max(counts):.2f} "
                f"| {statistics.mean(tokens):.4f} | {max(tokens):.3f} "
                f"| {statistics.mean(one.idle for one in own):.2%} | {speed:,.0f} |"
            )
    return lines


def ahead_of(name: str, cells: Sequence[Cell]) -> list[str]:
    """Return the cases in which another packer is better: by micro-batches, then by tokens."""
    by_case: dict[tuple[str, int, int, int], dict[str, Cell]] = {}
    for cell in cells:
        case = (cell.lengths, cell.samples, cell.ranks, cell.capacity)
        by_case.setdefault(case, {})[cell.packer] = cell
    found = []
    for case, own in by_case.items():
        mine = own[name]
        for other_name, other in own.items():
            if (other.micro_batches, other.step_tokens) < (mine.micro_batches, mine.step_tokens):
                found.append(
                    f"{case}: {other_name} {other.micro_batches:.3f} {other.step_tokens:.5f}, "
                    f"{name} {mine.micro_batches:.3f} {mine.step_tokens:.5f}"
                )
    return found
