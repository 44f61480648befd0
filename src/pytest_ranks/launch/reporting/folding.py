"""Texts of several ranks that say the same, said once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# What differs between processes that did the same: addresses of objects and threads, ports, and
# how gloo counts the milliseconds.
_OWN = re.compile(r"0x[0-9a-f]+|\[127\.0\.0\.1\]:\d+|\b127\.0\.0\.1:\d+|\b\d+ms\b")


def likeness(text: str) -> str:
    """Return a text without what differs between processes that did the same."""
    return _OWN.sub("…", text)


def fold(texts: Iterable[tuple[int, str]]) -> list[tuple[list[int], str]]:
    """Return the texts of ranks, alike ones once, each with its ranks; in order of appearance."""
    found: dict[str, tuple[list[int], str]] = {}
    for rank, text in texts:
        ranks, _ = found.setdefault(likeness(text), ([], text))
        if rank not in ranks:
            ranks.append(rank)
    return list(found.values())


def ranks_text(numbers: Iterable[int]) -> str:
    """Return `rank 2` or `ranks 0, 2 and 3`."""
    names = [str(number) for number in sorted(numbers)]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
