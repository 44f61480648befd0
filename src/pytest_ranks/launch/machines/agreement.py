"""Whether all ranks of a world have collected the same tests, with the same software."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.launch.reporting.folding import ranks_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_ranks.launch.machines.coordination import Hello

SHOWN_IDS = 10


def node_labels(hellos: Sequence[Hello]) -> dict[int, str]:
    """Return what each node is called; those that share a name get their number too."""
    names = {one.node: one.node_name for one in hellos}
    shared = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {node: f"{name}#{node}" if name in shared else name for node, name in names.items()}


def who(hellos: Sequence[Hello], labels: Mapping[int, str]) -> str:
    """Return `ranks 2 and 3 (node hostb)`."""
    nodes = list(dict.fromkeys(labels[one.node] for one in hellos))
    word = "node" if len(nodes) == 1 else "nodes"
    return f"{ranks_text([one.rank for one in hellos])} ({word} {', '.join(nodes)})"


def complaints(hellos: Sequence[Hello], *, may_have_more: bool = False) -> list[str]:
    """Return in what the ranks differ from rank 0, a sentence each; equal ones once.

    Args:
        hellos: what each rank says of itself, rank 0 first.
        may_have_more: whether rank 0 may have collected less than the others, as with --lf.
    """
    first, others = hellos[0], hellos[1:]
    labels = node_labels(hellos)
    found: dict[tuple[str, str], list[Hello]] = {}
    for one in hellos[1:]:
        for error in one.errors:
            found.setdefault(("could not collect: ", error), []).append(one)
    for one in others:
        for name, version in first.versions.items():
            theirs = one.versions.get(name, "none")
            if theirs != version:
                text = f"{theirs}, rank 0 (node {labels[first.node]}) has {name} {version}"
                found.setdefault((f"has {name} ", f"{text}: make them the same"), []).append(one)
        is_broken = bool(one.errors or first.errors)
        if (missing := _listed(set(first.ids) - set(one.ids))) and not is_broken:
            found.setdefault(("did not collect what rank 0 did: ", missing), []).append(one)
        if (more := _listed(set(one.ids) - set(first.ids))) and not (is_broken or may_have_more):
            found.setdefault(("collected what rank 0 did not: ", more), []).append(one)
    return [
        f"{who(ranks, labels)} {_plural(verb, ranks)}{text}"
        for (verb, text), ranks in found.items()
    ]


def _plural(verb: str, ranks: Sequence[Hello]) -> str:
    return verb.replace("has ", "have ") if len(ranks) > 1 else verb


def _listed(ids: set[str]) -> str:
    names = sorted(ids)
    more = f" and {len(names) - SHOWN_IDS} more" if len(names) > SHOWN_IDS else ""
    return ", ".join(names[:SHOWN_IDS]) + more
