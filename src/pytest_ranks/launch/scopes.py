"""Which fixtures outlive an item, and so live on the ranks between tests; who shares them."""

from __future__ import annotations

import os
import sysconfig
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.launch.fidelity.choice import FIXTURE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

KEPT_GROUP = "process group of "  # how the name of a scope begins that keeps nothing else

_NODES = {"class": "Class", "module": "Module", "package": "Package"}


def shared_scopes(items: Sequence[pytest.Item]) -> dict[str, str | None]:
    """Return for each node id which ranks it has to share, None where it shares no fixture.

    Two items that use one instance of a class, module, package or session fixture have to run on
    the same ranks, and so do all that are connected through others: they get the same name.
    """
    chosen: dict[str, str | None] = {}
    leaders: dict[str, str] = {}

    def leader(name: str) -> str:
        while leaders[name] != name:
            name = leaders[name]
        return name

    # A group comes last, so that what has both is named after a fixture.
    used = {item.nodeid: [*_wide_fixtures(item), *_kept_groups(item)] for item in items}
    for names in used.values():
        for name in names:
            leaders.setdefault(name, name)
            leaders[leader(name)] = leader(names[0])
    for node_id, names in used.items():
        chosen[node_id] = leader(names[0]) if names else None
    return chosen


def _wide_fixtures(item: pytest.Item) -> Iterable[str]:
    """Yield the names of the item's own fixtures that live longer than it, with their place.

    Fixtures of installed plugins do not count: what they keep is theirs, and nearly every test
    has one. Fixtures of conftests, of the test module, and xunit-style setups do: they may keep
    a model, a mesh or a group that the next test of the scope goes on with.
    """
    for definition in _compat.fixture_definitions(item):
        is_wide = definition.scope != "function" and definition.argname != FIXTURE
        if is_wide and _is_users(definition):
            where = _node_of(item, definition.scope)
            yield f"{definition.scope} fixture {definition.argname} of {where or 'the session'}"


def _kept_groups(item: pytest.Item) -> Iterable[str]:
    """Yield the name of the group that the item's mark has it share, and with whom."""
    for node, mark in item.iter_markers_with_node("ranks"):
        if mark.kwargs.get("keep_group") is True:
            own = item.nodeid.partition("[")[0]  # the items of one function share theirs
            yield f"{KEPT_GROUP}{own if node is item else node.nodeid}"
        return


def _is_users(definition: pytest.FixtureDef[object]) -> bool:
    if definition.argname.startswith(("_xunit_setup", "_unittest_setUpClass")):
        return True
    code = getattr(_unwrapped(definition.func), "__code__", None)
    return code is None or not code.co_filename.startswith(_installed())


def _unwrapped(function: object) -> object:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__func__", function)


def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (*folders, os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)


def _node_of(item: pytest.Item, scope: str) -> str:
    if scope == "session":
        return ""
    for node in reversed(item.listchain()):
        if any(one.__name__ == _NODES[scope] for one in type(node).__mro__):
            return node.nodeid
    return item.nodeid.partition("::")[0]  # no such node above: the file bounds it


class Sibling:
    """Stands for an unknown next item beside this one: everything above the item stays."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._item, name)

    def listchain(self) -> list[Any]:
        """Return the nodes above the item."""
        return self._item.listchain()[:-1]
