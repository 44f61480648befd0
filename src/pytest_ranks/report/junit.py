"""Sections of ranks in JUnit XML, which keeps what was captured and forgets by whom."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat

if TYPE_CHECKING:
    import pytest

_OF_RANKS = re.compile(r"^Captured (\w+).* \(ranks? [\d, and]+\)$")
# pytest's report tells apart what was caught by these names; what else ranks wrote goes with stdout.
_KINDS = ("stdout", "stderr", "log")


class JunitSections:
    """Heads each section by its ranks for pytest's junitxml plugin, and for it alone."""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Stand between the plugin and the reports whose output it writes."""
        _compat.show_junit(session.config, HeadedReport)


class HeadedReport:
    """A report whose captured output names the ranks that wrote it.

    Args:
        report: any; one that is not of ranks shows itself unchanged.
    """

    def __init__(self, report: pytest.TestReport) -> None:
        self._report = report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)

    @property
    def capstdout(self) -> str:
        """What went to standard output, and what ranks wrote that died."""
        return self._of("stdout")

    @property
    def capstderr(self) -> str:
        """What went to standard error."""
        return self._of("stderr")

    @property
    def caplog(self) -> str:
        """What was logged."""
        return self._of("log")

    def _of(self, kind: str) -> str:
        texts = []
        for name, text in self._report.sections:
            found = _OF_RANKS.match(name)
            if found is None:
                if name.startswith(f"Captured {kind}"):
                    texts.append(text)
            elif kind == (found[1] if found[1] in _KINDS else "stdout"):
                texts.append(f"--- {name} ---\n{text}\n")
        return "".join(texts)
