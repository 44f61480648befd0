"""Sections of ranks in JUnit XML, which keeps what was captured and forgets by whom."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

_OF_RANKS = re.compile(r"^Captured (\w+)(.*) \((ranks? [\d, and]+)\)$")
# pytest writes sections of these names and no other.
_KNOWN = ("stdout", "stderr", "log")


class JunitSections:
    """Heads each section by its ranks while pytest's junitxml plugin reads the report."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None]:
        """Show other sections to those who listen inside than the terminal shows later."""
        kept = report.sections
        report.sections = [headed(name, text) for name, text in kept]
        try:
            yield
        finally:
            report.sections = kept


def headed(name: str, text: str) -> tuple[str, str]:
    """Return a section with its ranks in its text, under a name that pytest writes."""
    found = _OF_RANKS.match(name)
    if found is None:
        return name, text
    kind = found[1] if found[1] in _KNOWN else "stdout"
    return f"Captured {kind}{found[2]} ({found[3]})", f"--- {name} ---\n{text}\n"
