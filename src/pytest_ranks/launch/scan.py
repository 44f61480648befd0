"""Whether tests on ranks are likely, from the bytes of the files, before any is imported."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_ranks import marks
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from pytest_ranks.launch.items import RankItems
    from pytest_ranks.launch.machines.rank_other import OtherItems

ATTACHED = "ranks-attached"  # the plugin of a session that a launcher started once a rank
_SIGN = b"mark.ranks"
# Options that only show what there is: --collect-only and its relatives.
_RUN_NOTHING = ("collectonly", "setupplan", "showfixtures", "show_fixtures_per_test")
LATE = (
    "the mark ranks was added too late for it to run on ranks; add it at the test, or in "
    "pytest_collection_modifyitems at the latest."
)
# A tree of more files than this is not scanned to its end: ranks then start at their first item.
MOST_FILES = 3000


def check_options(config: pytest.Config) -> None:
    """Refuse options that contradict each other.

    Raises:
        pytest.UsageError: a rank is to be debugged where it cannot have the terminal.
    """
    if settings(config).debug is not None:
        from pytest_ranks.launch.terminal import debug

        debug.check(config)


def before_collection(session: pytest.Session) -> None:
    """Start the zygote at once where a file to collect has the mark `ranks` in its bytes."""
    if _may_run(session) and _has_torch() and (_is_attached(session) or is_likely(session.config)):
        _plugin(session).start()


def after_collection(session: pytest.Session) -> None:
    """Have the items that ask for ranks run there."""
    if not _may_run(session):
        return
    items = [item for item in session.items if _asks_for_ranks(item)]
    if items and _has_torch():  # else they are skipped with the reason
        _plugin(session).take_over(items)
    elif _is_attached(session):
        _plugin(session).start()


def check_mark_is_in_time(item: pytest.Item) -> None:
    """Fail an item whose mark came after it was decided which items run on ranks."""
    if item.get_closest_marker("ranks") is None or "runtest" in vars(item):
        return
    if _may_run(item.session) and _has_torch() and marks.read(item).spec is not None:
        import pytest

        pytest.fail(f"{item.nodeid}: {LATE}", pytrace=False)


def _may_run(session: pytest.Session) -> bool:
    config = session.config
    # the plugins of these names make a session the zygote's, where items run for real
    if any(map(config.pluginmanager.has_plugin, ("ranks-session", "ranks-follower"))):
        return False
    return not any(getattr(config.option, name, False) for name in _RUN_NOTHING)


def _has_torch() -> bool:
    return find_spec("torch") is not None


def _asks_for_ranks(item: pytest.Item) -> bool:
    if item.get_closest_marker("ranks") is None:
        return False
    return marks.read(item).spec is not None


def _is_attached(session: pytest.Session) -> bool:
    return session.config.pluginmanager.has_plugin(ATTACHED)


def _plugin(session: pytest.Session) -> RankItems | OtherItems:
    from pytest_ranks.launch.items import RankItems

    manager = session.config.pluginmanager
    found: RankItems | OtherItems | None = manager.get_plugin("ranks-items")
    if found is None:
        attached = manager.get_plugin(ATTACHED)
        found = RankItems(session) if attached is None else attached.make_items(session)
        manager.register(found, "ranks-items")
    return found


def is_likely(config: pytest.Config) -> bool:
    """Return whether a file to collect has the mark `ranks` in its bytes."""
    patterns = config.getini("python_files")
    count = 0
    for path in _files(config):
        name = os.path.basename(path)
        if not any(fnmatch(name, pattern.rpartition("/")[2]) for pattern in patterns):
            continue
        count += 1
        if count > MOST_FILES:
            return False
        try:
            with open(path, "rb") as file:
                if _SIGN in file.read():
                    return True
        except OSError:
            continue
    return False


def _files(config: pytest.Config) -> Iterator[str]:
    pruned = config.getini("norecursedirs")
    for argument in config.args:
        start = os.path.join(config.invocation_params.dir, argument.partition("::")[0])
        if not os.path.isdir(start):
            yield start
            continue
        for folder, folders, files in os.walk(start):
            folders[:] = [
                name
                for name in folders
                if name != "__pycache__" and not any(fnmatch(name, one) for one in pruned)
            ]
            yield from (os.path.join(folder, name) for name in files)
