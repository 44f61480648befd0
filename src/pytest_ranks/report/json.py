"""The JSON report of a session: what each item did on its ranks, in one document."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pytest_ranks
from pytest_ranks.options import settings
from pytest_ranks.report.records import ATTRIBUTE, SCHEMA_VERSION, SessionRecord

if TYPE_CHECKING:
    from collections.abc import Generator

NAME = "ranks-report"


def register(config: pytest.Config) -> None:
    """Have the report written, where one was asked for, by the process that the user started.

    Raises:
        pytest.UsageError: it cannot be written there.
    """
    chosen = settings(config)
    if chosen.report is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    path = Path(os.path.expanduser(chosen.report))
    path = Path(config.invocation_params.dir, path)
    if path.is_dir():
        raise pytest.UsageError(
            f"{chosen.source('report')}: found the folder {chosen.report!r}, expected the path of "
            f"a file; write for example {chosen.source('report')}={chosen.report}/ranks.json"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"{chosen.source('report')}: found {chosen.report!r}, expected a path in a folder that "
            f"is there or can be made ({error})"
        ) from None
    config.pluginmanager.register(JsonReport(path), NAME)


class JsonReport:
    """Collects what the reports of items carry, from xdist's workers too, and writes it at the end.

    Args:
        path: of the document.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._items: list[dict[str, Any]] = []
        self._attempts: Counter[str] = Counter()
        self._running: dict[str, None] = {}
        self._reason = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note what is at work."""
        self._running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note what is not at work any more."""
        self._running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take an item's record from the report that carries it."""
        record: dict[str, Any] | None = getattr(report, ATTRIBUTE, None)
        if record is None:
            return
        if record["ranks"] or record["verdict"] == "not_run":  # else it is about an earlier one
            self._attempts[report.nodeid] += 1
        attempt = self._attempts[report.nodeid]
        worker = getattr(report, "worker_id", None)
        self._items.append({**record, "attempt": attempt, "worker": worker})

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note why the session ended early: Ctrl-C, `pytest.exit`, `-x`."""
        self._reason = excinfo.exconly()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None]:
        """Write the document, once all others have had their say on the exit status."""
        yield
        self._write(int(session.exitstatus))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the document is."""
        terminalreporter.write_sep("-", f"ranks report: {self._path}")

    def _write(self, exit_status: int) -> None:
        document = SessionRecord(
            schema_version=SCHEMA_VERSION,
            pytest_ranks=pytest_ranks.__version__,
            pytest=pytest.__version__,
            python=platform.python_version(),
            started=self._started,
            seconds=time.monotonic() - self._start,
            exit_status=exit_status,
            ended="interrupted" if self._reason else "finished",
            reason=self._reason,
            unfinished=list(self._running) if self._reason else [],
            counts=dict(Counter(item["verdict"] for item in self._items)),
            items=self._items,
        )
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(asdict(document), file, indent=1, ensure_ascii=False)
                file.write("\n")
            beside.replace(self._path)  # who reads it meanwhile sees the old one or the new one
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
