"""Which random numbers were used twice: by two ranks, or in two epochs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_ranks.conformance.findings import NotApplicable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_ranks.observe.draws import Draw


def repeated_numbers(draws: Sequence[Draw], *, count: int, epochs: int) -> tuple[str, str]:
    """Return which random numbers were used more than once and the likely cause; two empty texts for none.

    Two draws of a float32 in [0, 1) agree by chance once in 2^24.

    Args:
        draws: the readings of samples, in their order.
        count: samples in the dataset.
        epochs: epochs that were trained.

    Raises:
        NotApplicable: when samples were not read anew in each epoch.
    """
    if len(draws) < epochs * count:
        raise NotApplicable(
            f"the subject read {count} samples {len(draws)} times in {epochs} epochs: it copies them before it trains"
        )
    users: dict[float, list[Draw]] = defaultdict(list)
    for draw in draws:
        users[draw.value].append(draw)
    again = [them for them in users.values() if len(them) > 1]
    if not again:
        return "", ""
    first = again[0]
    ranks = sorted({draw.rank for them in again for draw in them})
    across = [them for them in again if len({draw.rank for draw in them}) > 1]
    found = (
        f"{len(again)} of {len(users)} numbers were used more than once, such as {first[0].value:.6f} for "
        + " and ".join(f"sample {draw.index} on rank {draw.rank}" for draw in first[:3])
    )
    if len(across) == len(again):
        return found, f"ranks {', '.join(map(str, ranks))} are seeded alike"
    if not across:
        return found, "the generator is seeded anew in every epoch"
    return found, "ranks are seeded alike, and anew in every epoch"
