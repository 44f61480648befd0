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
import sys
from dataclasses import asdict
from pathlib import Path

import numpy
from packing_peers import PEERS, Packer

from pytest_ranks.reference.packing_comparison import ahead_of, compare, lognormal, ours, table


def packers() -> tuple[dict[str, Packer], list[str]]:
    """Return all that can be measured, and what is missing and why."""
    found: dict[str, Packer] = ours()
    missing = []
    for name, load in PEERS.items():
        try:
            found[name] = load()
            found[name]([5, 3, 4, 9, 2, 2, 7, 1], 10, 2)  # compiles what is compiled at first use
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return found, missing


def tell(*case: object) -> None:
    """Show how far the run has come."""
    print(*case, file=sys.stderr, flush=True)


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
    cells, wrong = compare(
        found, samples=chosen.samples, ranks=chosen.ranks, limit=chosen.limit, on_case=tell
    )
    lines = table(cells)
    lines += ["", *(f"Not installed: {one}." for one in missing)] * bool(missing)
    lines += ["", *(f"No valid plan: {one}." for one in wrong)] * bool(wrong)
    ahead = ahead_of("ours, level", cells)
    lines += ["", f"Cases in which another packer is ahead of ours, level: {len(ahead)}."]
    print("\n".join([*lines, *ahead]))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    if chosen.picture:
        chosen.picture.write_text(picture(found))


if __name__ == "__main__":
    main()
