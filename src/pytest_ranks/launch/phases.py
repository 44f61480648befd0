"""Reports of pytest's on a rank, as plain data that travels."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from pytest_ranks.launch.deadline import collective_of
from pytest_ranks.launch.wire import Phase
from pytest_ranks.report.records import shorten_sections

if TYPE_CHECKING:
    import pytest


def make_phase(
    config: pytest.Config, report: pytest.TestReport, at: float, error: BaseException | None
) -> Phase:
    """Return what a rank says of one phase of an item.

    Args:
        config: of the rank's session.
        report: of the phase.
        at: when it was over, CLOCK_MONOTONIC seconds.
        error: what it raised.
    """
    data = as_data(config, report)
    if properties := data.get("user_properties"):
        data["user_properties"] = [(str(name), _plain(value)) for name, value in properties]
    lost = [] if _is_plain(data) else [name for name in data if not _is_plain(data[name])]
    for name in lost:
        del data[name]
    return Phase(
        when=report.when,
        outcome=report.outcome,
        was_xfail=getattr(report, "wasxfail", None),
        report=data,
        at=at,
        place=collective_of(error),
        lost=tuple(lost),
    )


def as_data(config: pytest.Config, report: pytest.TestReport) -> dict[str, Any]:
    """Return a report as pytest serialises it, with both ends of what was captured."""
    data: dict[str, Any] = config.hook.pytest_report_to_serializable(config=config, report=report)
    data["sections"] = shorten_sections(data["sections"])
    return data


def _plain(value: object) -> object:
    return value if _is_plain(value) else str(value)


def _is_plain(value: object) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        json.dumps(value)
        return True
    return False
