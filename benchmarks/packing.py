"""How few micro-batches packers need, how long ranks wait, and how fast they are: ours beside others.

    python benchmarks/packing.py [--samples 1024 16384] [--ranks 1 8 64] [--json FILE] [--picture FILE]

Every packer gets the same lengths; every plan is checked (each sample once, nothing over the limit). A
row shows micro-batches / the least possible, the busiest ranks' tokens / the least possible (what a synchronous step
waits for), the share of time in which ranks wait, and samples a second. `benchmarks/packing_peers.py`
says who the others are; install what should be measured:
`pip install numba pyarrow binpacking` and, with `--no-deps`, `instructlab-training verl axolotl trl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from packing_peers import PEERS, MicroBatches, Packer, Refused

from pytest_ranks.reference.packing import PACKERS
from pytest_ranks.reference.packing_bounds import lower_bounds

CAPACITIES = (8192, 32768)


def lognormal(count: int, random: numpy.random.Generator) -> list[int]:
    """Chat data: mean about 600 tokens, a long tail."""
    return [
        int(one) for one in numpy.clip(random.lognormal(numpy.log(600) - 0.5, 1, count), 1, 8192)
    ]


def bimodal(count: int, random: numpy.random.Generator) -> list[int]:
    """Long documents among short questions."""
    is_long = random.random(count) < 0.2
    return [
        int(one)
        for one in numpy.where(
            is_long, random.integers(4097, 8193, count), random.integers(32, 513, count)
        )
    ]


def uniform(count: int, random: numpy.random.Generator) -> list[int]:
    """Any length is as likely as any other."""
    return [int(one) for one in random.integers(1, 8193, count)]


def equal(count: int, _: numpy.random.Generator) -> list[int]:
    """All alike, two to a bin."""
    return [3000] * count


def no_slack(count: int, random: numpy.random.Generator) -> list[int]:
    """Bins of 8192 cut into four, so that a plan without any room left exists."""
    found: list[int] = []
    while len(found) + 4 <= count:
        cuts = sorted(random.choice(numpy.arange(1, 8192), 3, replace=False).tolist())
        found += [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], 8192 - cuts[2]]
    random.shuffle(found)
    return [int(one) for one in found]


LENGTHS: dict[str, Callable[[int, numpy.random.Generator], list[int]]] = {
    one.__name__: one for one in (lognormal, bimodal, uniform, equal, no_slack)
}


@dataclass
class Cell:
    """What one packer made of one case."""

    packer: str
    lengths: str
    samples: int
    ranks: int
    capacity: int
    micro_batches: float  # / the least possible
    step_tokens: float  # / the least possible
    idle: float
    seconds: float


def ours(name: str) -> Packer:
    return lambda lengths, capacity, ranks: [
        [list(one) for one in bins]
        for bins in PACKERS[name](lengths, capacity, ranks).micro_batches
    ]


def packers() -> tuple[dict[str, Packer], list[str]]:
    """Return all that can be measured, and what is missing and why."""
    found = {f"ours, {name}": ours(name) for name in PACKERS}
    missing = []
    for name, load in PEERS.items():
        try:
            found[name] = load()
            found[name]([5, 3, 4, 9, 2, 2, 7, 1], 10, 2)  # compiles what is compiled at first use
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return found, missing


def why_wrong(plan: MicroBatches, lengths: list[int], capacity: int) -> str:
    placed = sorted(index for ranks in plan for indices in ranks for index in indices)
    if placed != list(range(len(lengths))):
        return f"{len(lengths) - len(set(placed))} samples lost"
    most = max((sum(lengths[i] for i in indices) for ranks in plan for indices in ranks), default=0)
    return f"a row of {most} tokens in {capacity}" if most > capacity else ""


def measure(
    name: str, pack: Packer, kind: str, lengths: list[int], ranks: int, capacity: int, limit: float
) -> Cell | str:
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < limit:
        start = time.perf_counter()
        try:
            plan = pack(list(lengths), capacity, ranks)
        except Refused as error:
            return f"refused: {error}"
        seconds.append(time.perf_counter() - start)
    if wrong := why_wrong(plan, lengths, capacity):
        return wrong
    least = lower_bounds(lengths, capacity, ranks)
    loads = [[sum(lengths[i] for i in indices) for indices in bins] for bins in plan]
    busiest = sum(map(max, loads))
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


def compare(chosen: argparse.Namespace, found: dict[str, Packer]) -> tuple[list[Cell], list[str]]:
    cells: list[Cell] = []
    wrong: dict[str, list[str]] = {}
    for kind, make in LENGTHS.items():
        for samples in chosen.samples:
            for ranks in chosen.ranks:
                if samples < 4 * ranks:
                    continue
                lengths = make(samples, numpy.random.default_rng(samples + ranks))
                for capacity in CAPACITIES:
                    for name, pack in found.items():
                        cell = measure(name, pack, kind, lengths, ranks, capacity, chosen.limit)
                        if isinstance(cell, Cell):
                            cells.append(cell)
                        else:
                            wrong.setdefault(name, []).append(cell)
                print(kind, samples, ranks, file=sys.stderr, flush=True)
    return cells, [
        f"{name}: {len(texts)} times, such as {texts[0]}" for name, texts in wrong.items()
    ]


def table(cells: list[Cell]) -> list[str]:
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


def behind(cells: list[Cell]) -> list[str]:
    """Return the cases in which another packer is ahead of ours, by micro-batches, then by tokens."""
    by_case: dict[tuple[str, int, int, int], dict[str, Cell]] = {}
    for cell in cells:
        case = (cell.lengths, cell.samples, cell.ranks, cell.capacity)
        by_case.setdefault(case, {})[cell.packer] = cell
    found = []
    for case, own in by_case.items():
        mine = own["ours, level"]
        for name, other in own.items():
            if (other.micro_batches, other.step_tokens) < (mine.micro_batches, mine.step_tokens):
                found.append(
                    f"{case}: {name} {other.micro_batches:.3f} {other.step_tokens:.5f}, "
                    f"ours {mine.micro_batches:.3f} {mine.step_tokens:.5f}"
                )
    return found


def picture(found: dict[str, Packer]) -> str:
    """Return the loads of 8 ranks under each packer, a strip for each, as SVG."""
    lengths, capacity, ranks = lognormal(256, numpy.random.default_rng(0)), 8192, 8
    plans = {name: pack(list(lengths), capacity, ranks) for name, pack in found.items()}
    longest = max(
        sum(max(sum(lengths[i] for i in one) for one in bins) for bins in plan)
        for plan in plans.values()
    )
    left, width, bar = 230, 560, 5
    height = ranks * (bar + 1) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" '
        f'height="{height * len(plans) + 30}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (name, plan) in enumerate(plans.items()):
        top = 8 + number * height
        parts.append(f'<text x="{left - 8}" y="{top + 28}" text-anchor="end">{name}</text>')
        start = 0.0
        for bins in plan:
            loads = [sum(lengths[i] for i in one) for one in bins]
            for rank, load in enumerate(loads):
                x, y = left + width * start / longest, top + rank * (bar + 1)
                length = width * load / longest
                colour = "#0a7d55" if name.startswith("ours") else "#9aa4ad"
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{bar}" fill="{colour}"/>'
                )
            start += max(loads)
            x = left + width * start / longest
            parts.append(
                f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + ranks * (bar + 1)}" '
                'stroke="#c33"/>'
            )
    parts.append(
        f'<text x="{left}" y="{height * len(plans) + 20}" fill="#555">a line a rank, time to the right; '
        "red: all ranks have finished a micro-batch</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of one packer on a case")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--picture", type=Path, help="SVG file for the loads of eight ranks")
    chosen = parser.parse_args()
    found, missing = packers()
    cells, wrong = compare(chosen, found)
    lines = table(cells)
    lines += ["", *(f"Not installed: {one}." for one in missing)] * bool(missing)
    lines += ["", *(f"No valid plan: {one}." for one in wrong)] * bool(wrong)
    ahead = behind(cells)
    lines += ["", f"Cases in which another packer is ahead of ours, level: {len(ahead)}."]
    print("\n".join([*lines, *ahead]))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    if chosen.picture:
        chosen.picture.write_text(picture(found))


if __name__ == "__main__":
    main()
