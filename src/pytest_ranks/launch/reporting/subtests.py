"""Subtests that ran on ranks, reported in the controller: equal ones once, others by rank."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat, _compat_terminal
from pytest_ranks.launch.terminal.asides import Subtest

if TYPE_CHECKING:
    from pytest_ranks.launch.rank_run import RankRun

_KEY = pytest.StashKey[list[Any]]()
# Where a serialised report of a subtest says which one it is (pytest 9, and pytest-subtests).
_CONTEXT = "_subtest.context"


def note(item: pytest.Item, runs: list[RankRun]) -> None:
    """Keep the subtests of an item's ranks until its setup is over.

    A report that is written during a phase would go to that phase's captured output.
    """
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for run in runs:
        count: dict[str, int] = {}
        for message in run.messages:
            if isinstance(message, Subtest):
                data = message.report
                key = json.dumps([data.get(_CONTEXT), data["outcome"], _crash(data)], default=str)
                count[key] = count.get(key, 0) + 1  # two alike on one rank are two
                found.setdefault(f"{key} {count[key]}", (data, []))[1].append(run.rank)
    item.stash[_KEY] = [
        _report(item, data, ranks, is_on_all=len(ranks) == len(runs))
        for data, ranks in found.values()
    ]


def log(item: pytest.Item) -> None:
    """Report the subtests that were kept."""
    for report in item.stash.get(_KEY, ()):
        if report.failed:
            _compat_terminal.count_failed_subtest(item)
        item.ihook.pytest_runtest_logreport(report=report)
    item.stash[_KEY] = []


def _report(item: pytest.Item, data: dict[str, Any], ranks: list[int], *, is_on_all: bool) -> Any:
    context = data.get(_CONTEXT)
    report = _compat.report_from_data(item.config, data)
    if isinstance(context, dict):
        rank = {} if is_on_all else {"rank": ", ".join(map(str, ranks))}
        with contextlib.suppress(AttributeError):
            # it is frozen, and makes a repr of each value whenever it is made
            object.__setattr__(report.context, "kwargs", {**context.get("kwargs", {}), **rank})
    return report


def _crash(data: dict[str, Any]) -> Any:
    longrepr = data.get("longrepr")
    return longrepr.get("reprcrash") if isinstance(longrepr, dict) else longrepr
