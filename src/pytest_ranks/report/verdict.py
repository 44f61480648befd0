"""The verdict on a subject: suites by results, and why what was not judged was not."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

Record = dict[str, Any]
Markup = dict[str, bool]

COLUMNS = (
    ("passed", ("passed",)),
    ("failed", ("failed", "unexpected pass")),
    ("expected", ("expected failure",)),
    ("adapter", ("adapter error",)),
    ("unclear", ("inconclusive",)),
    ("not run", ("not run",)),
)
"""The table's columns; "not applicable" has no column, since it counts checks and not runs of them."""

JUDGED = ("passed", "failed", "expected failure", "unexpected pass")


RECORD = "ranks_check"
"""The attribute of a test report that carries a check's result, also from xdist's workers."""


def _checks_module() -> ModuleType | None:
    """Return the module of bound checks if this session has imported it: others must not pay for it."""
    return sys.modules.get("pytest_ranks.conformance.parametrize")


class VerdictReporter:
    """Follows one session: registered in `pytest_configure`, in xdist's workers too.

    The process that runs a check attaches its result to the report; the process that the user
    started collects the results, prints the verdict and fails a session in which nothing was
    judged.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.records: list[Record] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Tell the item's checks where runs are kept."""
        module = _checks_module()
        if module is not None:
            module.prepare(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the results of the item's checks."""
        report = yield
        module = _checks_module()
        if module is not None and report.when == "call":
            record = module.record_of(item)
            if record is not None:
                setattr(report, RECORD, record)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a result."""
        record = getattr(report, RECORD, None)
        if record is not None:
            self.records.append(record)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a session that judged nothing."""
        if exitstatus == pytest.ExitCode.OK and self._problem():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print one verdict a subject."""
        by_subject: dict[str, list[Record]] = defaultdict(list)
        for record in self.records:
            by_subject[record["subject"]].append(record)
        for subject, records in by_subject.items():
            terminalreporter.write_sep("=", f"verdict on {subject}", bold=True)
            lines = [*table(records), *causes(records), *reasons(records), conclusion(records)]
            for line, markup in lines:
                terminalreporter.write_line(line, **markup)
        problem = self._problem()
        if problem:
            terminalreporter.write_line(f"FAILED: {problem}", red=True, bold=True)
        unused = self._unused_options()
        if unused:
            terminalreporter.ensure_newline()
            terminalreporter.write_line(unused, yellow=True)

    def pytest_unconfigure(self) -> None:
        """End the ranks of the session's checks."""
        module = _checks_module()
        if module is not None:
            module.close_sessions()

    def _unused_options(self) -> str:
        """Return the sentence about options that no check has looked at; empty where one has."""
        chosen = settings(self.config)
        options = [
            f"--ranks-{name}"
            for name in ("subject", "suite")
            if chosen.source(name) == f"--ranks-{name}"
        ]
        if not options or self.records or self.config.option.collectonly:
            return ""
        return (
            f"{', '.join(options)}: no check of the conformance suites ran; run them with: pytest "
            f"--pyargs pytest_ranks.conformance {options[0]}=..."
        )

    def _problem(self) -> str:
        """Return why a session without failures must fail all the same; empty when it need not."""
        if not self.records:
            return ""
        if not any(record["outcome"] in ("passed", "failed") for record in self.records):
            return "nothing was verified: no check passed or failed"
        not_run = [record for record in self.records if record["outcome"] == "not run"]
        if settings(self.config).require and not_run:
            were = "was" if len(not_run) == 1 else "were"
            return (
                f"{_counted(len(not_run), 'check')} {were} not run, and --ranks-require was given"
            )
        return ""


def table(records: list[Record]) -> list[tuple[str, Markup]]:
    """Return the lines of the table, with how to colour them."""
    suites = list(dict.fromkeys(record["suite"] for record in records))
    shown = [
        (title, outcomes)
        for title, outcomes in COLUMNS
        if title in ("passed", "failed") or _count(records, outcomes)
    ]
    width = max(len(suite) for suite in [*suites, "total"])
    head = (
        f"{'suite':<{width}}  claims"
        + "".join(f"  {title:>8}" for title, _ in shown)
        + f"  {'time':>8}"
    )
    lines: list[tuple[str, Markup]] = [(head, {"bold": True})]
    for suite in [*suites, "total"]:
        mine = [record for record in records if suite in ("total", record["suite"])]
        if all(record["outcome"] == "not applicable" for record in mine):
            lines.append((f"{suite:<{width}}  {'-':>6}  not applicable", {"light": True}))
            continue
        claims = len({record["check"] for record in mine if record["outcome"] != "not applicable"})
        cells = "".join(f"  {_count(mine, outcomes) or '-':>8}" for _, outcomes in shown)
        seconds = sum(record["seconds"] for record in mine)
        bad = _count(mine, ("failed", "unexpected pass", "adapter error", "inconclusive"))
        lines.append(
            (f"{suite:<{width}}  {claims:>6}{cells}  {seconds:>6.1f} s", {"red": bool(bad)})
        )
    return lines


def _count(records: Iterable[Record], outcomes: tuple[str, ...]) -> int:
    return sum(record["outcome"] in outcomes for record in records)


def causes(records: list[Record]) -> list[tuple[str, Markup]]:
    """Return the causes of what failed, each once with the claims that it breaks: one bug breaks many."""
    broken: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["outcome"] == "failed":
            cause = record["cause"].partition(" (match ")[0]
            broken["cause unknown" if not cause or cause.startswith("none of ") else cause].append(
                record
            )
    lines: list[tuple[str, Markup]] = []
    for cause, them in sorted(
        broken.items(), key=lambda entry: (entry[0] == "cause unknown", -len(entry[1]))
    ):
        lines.append((f"likely: {cause}", {"red": True}))
        lines.append(
            (f"        breaks {', '.join(dict.fromkeys(record['check'] for record in them))}", {})
        )
    return lines


def reasons(records: list[Record]) -> list[tuple[str, Markup]]:
    """Return why checks were not judged, equal reasons in one line."""
    lines: list[tuple[str, Markup]] = []
    for outcome in (
        "expected failure",
        "unexpected pass",
        "adapter error",
        "inconclusive",
        "not run",
        "not applicable",
    ):
        why: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if record["outcome"] == outcome:
                why[record["text"]].append(record)
        for text, them in why.items():
            names = list(dict.fromkeys(record["check"] for record in them))
            settings = [record["setting"] for record in them if record["setting"]]
            where = f" [{', '.join(dict.fromkeys(settings))}]" if settings else ""
            subject = names[0] if len(names) == 1 else _folded(names)
            lines.append((f"{outcome}: {subject}{where}: {text}", {}))
    return lines


def _folded(names: list[str]) -> str:
    """Return many check ids in short: by suite, with how many."""
    by_suite = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{suite} ({_counted(count, 'check')})" for suite, count in by_suite.items())


def conclusion(records: list[Record]) -> tuple[str, Markup]:
    """Return the last line: what was verified of what was asked."""
    claims = {record["check"] for record in records}
    verified = claims - {record["check"] for record in records if record["outcome"] != "passed"}
    settings = {record["setting"] for record in records if record["outcome"] in JUDGED}
    said = f"verified {len(verified)} of {_counted(len(claims), 'claim')} in {_counted(len(settings), 'setting')}"
    failed = {
        record["check"] for record in records if record["outcome"] in ("failed", "unexpected pass")
    }
    unclear = {
        record["check"]
        for record in records
        if record["outcome"] in ("adapter error", "inconclusive")
    }
    if failed:
        hold = "does not hold" if len(failed) == 1 else "do not hold"
        return f"FAILED: {_counted(len(failed), 'claim')} {hold}; {said}", {
            "red": True,
            "bold": True,
        }
    if unclear:
        return f"NO VERDICT on {_counted(len(unclear), 'claim')}; {said}", {
            "red": True,
            "bold": True,
        }
    return f"PASSED: {said}", {"green": True, "bold": True}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
