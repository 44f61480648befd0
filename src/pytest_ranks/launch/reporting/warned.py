"""Warnings that pytest recorded on ranks, recorded again in the controller: no report has them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.reporting.folding import likeness, ranks_text
from pytest_ranks.launch.wire import Finished, Warned

if TYPE_CHECKING:
    import pytest

    from pytest_ranks.launch.rank_run import RankRun


# What was raised in a thread or a `__del__`: pytest can only say where it saw that itself.
_WITHOUT_A_PLACE = (
    "pytest:PytestUnhandledThreadExceptionWarning",
    "pytest:PytestUnraisableExceptionWarning",
)


def forward_warnings(config: pytest.Config, runs: list[RankRun], *, has_processes: bool) -> None:
    """Record the warnings of all ranks, equal ones once; what has no place in a test by its rank.

    Args:
        config: of the session.
        runs: what each rank did.
        has_processes: whether each rank had a process, so that the rank is known.
    """
    found: dict[Warned, tuple[Warned, list[int]]] = {}
    for run in runs:
        for message in run.messages:
            for warned in message.warnings if isinstance(message, Finished) else ():
                is_named = has_processes and warned.category in _WITHOUT_A_PLACE
                key = replace(warned, text=likeness(warned.text)) if is_named else warned
                _, ranks = found.setdefault(key, (warned, []))
                if is_named and run.rank not in ranks:
                    ranks.append(run.rank)
    for warned, ranks in found.values():
        head = f"{ranks_text(ranks)}: " if ranks else ""
        _record(config, replace(warned, text=head + warned.text))


def warn(item: pytest.Item, text: str) -> None:
    """Record a warning about an item, which has passed or failed already."""
    path, line, _ = item.location
    _record(
        item.config,
        Warned(
            category="pytest:PytestWarning",
            text=text,
            filename=path,
            lineno=(line or 0) + 1,
            when="runtest",
            node_id=item.nodeid,
            location=None,
        ),
    )


def _record(config: pytest.Config, warned: Warned) -> None:
    module, _, name = warned.category.partition(":")
    category: Any = getattr(sys.modules.get(module), name, UserWarning)
    if not (isinstance(category, type) and issubclass(category, Warning)):
        category = UserWarning
    try:
        text: Warning | str = category(warned.text)
    except TypeError:
        text = warned.text
    config.hook.pytest_warning_recorded.call_historic(
        kwargs={
            "warning_message": warnings.WarningMessage(
                text, category, warned.filename, warned.lineno
            ),
            "when": warned.when,
            "nodeid": warned.node_id,
            "location": warned.location,
        }
    )
