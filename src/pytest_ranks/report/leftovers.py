"""The tests whose ranks could not be used again, at the end of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

TITLE = "ranks: replaced after what a test left behind"


def summarize(terminal: pytest.TerminalReporter) -> None:
    """Print what each test left behind that cost its ranks; they are started anew for the next."""
    found = [
        (report.nodeid, title, text)
        for reports in list(terminal.stats.values())
        for report in reports
        if getattr(report, "when", "") == "teardown"
        for title, text in report.sections
        if "after teardown (rank" in title
    ]
    if not found:
        return
    from pytest_ranks.launch.reporting.leftovers import RETIRED

    lines = [
        f"{node_id}: {line}{title.removeprefix(RETIRED)}"
        for node_id, title, text in found
        if title.startswith(RETIRED)
        for line in text.splitlines()
    ]
    if lines:
        terminal.section(TITLE)
        for line in lines:
            terminal.line(line)
