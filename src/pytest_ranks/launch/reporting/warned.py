"""Warnings that pytest recorded on ranks, recorded again in the controller: no report has them."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.wire import Finished, Warned

if TYPE_CHECKING:
    import pytest

    from pytest_ranks.launch.rank_run import RankRun


def forward_warnings(config: pytest.Config, runs: list[RankRun]) -> None:
    """Record the warnings of all ranks, equal ones once."""
    seen: set[Warned] = set()
    for run in runs:
        for message in run.messages:
            for warned in message.warnings if isinstance(message, Finished) else ():
                if warned not in seen:
                    seen.add(warned)
                    _record(config, warned)


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
