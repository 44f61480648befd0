"""Which fixtures of an item outlive it, and so live on the ranks between tests."""

from __future__ import annotations

import os
import sysconfig
from typing import TYPE_CHECKING

from pytest_ranks import _compat

if TYPE_CHECKING:
    import pytest

_WIDTH = {"function": 0, "class": 1, "module": 2, "package": 3, "session": 4}


def widest_on_ranks(item: pytest.Item) -> str | None:
    """Return the node id of the widest scope of the item's own fixtures, None for function.

    Fixtures of installed plugins do not count: what they keep is theirs, and nearly every test
    has one. Fixtures of conftests, of the test module, and xunit-style setups do: they may keep
    a model, a mesh or a group that the next test of the scope goes on with.
    """
    widest = "function"
    for definition in _compat.fixture_definitions(item):
        scope = definition.scope
        if _WIDTH[scope] > _WIDTH[widest] and _is_users(definition):
            widest = scope
    if widest == "function":
        return None
    if widest == "session":
        return ""
    return _node_of(item, widest)


def _is_users(definition: pytest.FixtureDef[object]) -> bool:
    name = definition.argname
    if name.startswith(("_xunit_setup", "_unittest_setUpClass")):
        return True
    code = getattr(_unwrapped(definition.func), "__code__", None)
    if code is None:
        return True
    return not code.co_filename.startswith(_installed())


def _unwrapped(function: object) -> object:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__func__", function)


def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (*folders, os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)


def _node_of(item: pytest.Item, scope: str) -> str:
    wanted = {"class": "Class", "module": "Module", "package": "Package"}[scope]
    for node in reversed(item.listchain()):
        if any(one.__name__ == wanted for one in type(node).__mro__):
            return node.nodeid
    return item.nodeid.partition("::")[0]  # no such node above: the file bounds it
