"""The session's needs on the terminal, and the gate that fails a session whose needs did not run.

`--ranks-require=gpu:2` means: at least one test marked `gpu` ran on a machine with at least 2
such devices.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import marks
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from pytest_ranks.report.needs import NeedsBook, Row

GATE_TITLE = "ranks: required tests did not run"
TABLE_TITLE = "ranks: what tests needed"
# Under pytest-xdist the workers tell the controller what they collected under this name.
WORKER_KEY = "ranks_selected"


class NeedsReporter:
    """Follows one session: registered in `pytest_configure`, in xdist's workers too.

    The process that runs the tests attaches their needs to the reports; the process that the user
    started keeps the book, prints the summary and judges `--ranks-require`.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        self.items: dict[str, pytest.Item] = {}
        self.book: NeedsBook | None = None
        self.has_run = False
        self.unmet: list[str] = []

    def _open_book(self) -> NeedsBook:
        """Return the book, which a session without needs never opens."""
        if self.book is None:
            from pytest_ranks.report.needs import NeedsBook

            self.book = NeedsBook()
        return self.book

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember the items with needs, as all other plugins left them."""
        marks.fail_collect_only(session)
        self.items = {item.nodeid: item for item in session.items if marks.read(item).needs}
        if self.items:
            labels = (
                {need.label for need in marks.read(item).needs} for item in self.items.values()
            )
            self._open_book().select(Counter(label for some in labels for label in some))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Note that tests are about to run: only then is there something to require."""
        self.has_run = not session.config.option.collectonly

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Attach a test's needs where it ran, count it where the user looks."""
        item = self.items.get(report.nodeid)
        if item is not None:
            self._attach(report, item)
        if not self.is_worker and hasattr(report, "ranks_needs"):
            self._open_book().record(report)

    def _attach(self, report: pytest.TestReport, item: pytest.Item) -> None:
        """Give a report its needs; devices are counted for a test that ran, with no second look."""
        from pytest_ranks.hardware.requirements import devices_found
        from pytest_ranks.report.needs import attach

        did_run = report.when == "call"
        needs = [
            (
                need,
                devices_found(need, hardware=lambda: marks.hardware(self.config)) if did_run else 0,
            )
            for need in marks.read(item).needs
        ]
        attach(report, needs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what an xdist worker collected; one that crashed has told nothing."""
        counts = getattr(node, "workeroutput", {}).get(WORKER_KEY)
        if counts:
            self._open_book().select(counts)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Judge what was required; a worker hands its part to the controller."""
        if self.is_worker:
            if self.book is not None:
                self.config.workeroutput[WORKER_KEY] = dict(self.book.selected)  # type: ignore[attr-defined]
            return
        required = settings(self.config).require
        judged = (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
            pytest.ExitCode.TESTS_FAILED,
        )
        if not required or not self.has_run or exitstatus not in judged:
            return
        self.unmet = self._open_book().judge(required)
        if self.unmet:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _gate_lines(self) -> list[str]:
        """Return the sentences about what was required, each with the source of the requirement."""
        source = settings(self.config).source("require")
        return [f"{source}: {sentence}" for sentence in self.unmet]

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the needs, and what was required and did not run."""
        rows = self.book.rows() if self.book is not None else []
        if rows and self.has_run and self.config.get_verbosity() >= 0:
            terminalreporter.section(TABLE_TITLE)
            for line in table(rows):
                terminalreporter.line(line)
        if self.unmet:
            terminalreporter.section(GATE_TITLE, red=True, bold=True)
            for line in self._gate_lines():
                terminalreporter.line(line, red=True)
            self.unmet = []

    def pytest_unconfigure(self) -> None:
        """Say on stderr why the session failed, where no terminal summary did."""
        if not self.unmet:
            return
        # What is still captured here pytest hands on when it ends.
        print(f"{GATE_TITLE}:", *self._gate_lines(), sep="\n", file=sys.stderr)


def table(rows: list[Row]) -> list[str]:
    """Return the summary's lines: one for each kind of need, further reasons below it."""
    width = max(len("need"), *(len(row.label) for row in rows))
    lines = [f"{'need':<{width}}  selected   ran  skipped  why"]
    for row in rows:
        counts = f"{row.label:<{width}}  {row.selected:>8}  {row.ran:>4}  {row.skipped:>7}"
        reasons = [
            reason if number == row.selected else f"{number} x {reason}"
            for reason, number in row.why.items()
        ]
        lines.append(f"{counts}  {reasons[0] if reasons else ''}".rstrip())
        lines += [f"{' ' * len(counts)}  {reason}" for reason in reasons[1:]]
    return lines
