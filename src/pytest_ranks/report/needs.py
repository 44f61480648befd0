"""Which tests needed what, which of them ran, and whether that is what was required.

A test ran when its call phase happened and was not skipped. In the process that runs a test its
reports get the attribute `ranks_needs`, plain data that crosses to pytest-xdist's controller.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pytest

    from pytest_ranks.hardware.requirements import Need, Required

ATTRIBUTE = "ranks_needs"
STARTED = "started"
RAN = "ran"
SKIPPED = "skipped"
ERROR = "error in setup"


@dataclass(slots=True, kw_only=True)
class TestRecord:
    """What became of one test with needs.

    Attributes:
        needs: kind, label and devices found, for each of its needs.
        state: how far it came.
        why: the skip's reason.
    """

    # pytest would collect a class of this name where a user imports it.
    __test__ = False

    needs: list[dict[str, Any]]
    state: str = STARTED
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the summary.

    Attributes:
        label: the kind of need, for `ranks` with the world size.
        selected: how many tests with that need the session had.
        ran: how many had a call phase that was not skipped.
        skipped: how many were skipped.
        why: why those that did not run did not, with the number of tests for each reason.
    """

    label: str
    selected: int
    ran: int
    skipped: int
    why: Mapping[str, int]


def attach(report: pytest.TestReport, needs: Iterable[tuple[Need, int]]) -> None:
    """Give a report its test's needs and the devices found for each."""
    plain = [{"kind": n.kind, "label": n.label, "found": found} for n, found in needs]
    setattr(report, ATTRIBUTE, plain)


@dataclass(slots=True, kw_only=True)
class NeedsBook:
    """The session's tests with needs, by node id.

    Attributes:
        selected: how many tests were collected for each label, as far as a process has told.
        tests: what became of each test that was started.
    """

    selected: Counter[str] = field(default_factory=Counter)
    tests: dict[str, TestRecord] = field(default_factory=dict)

    def select(self, counts: Mapping[str, int]) -> None:
        """Take what one process collected; all of them collect the same tests."""
        self.selected |= Counter(counts)

    def record(self, report: pytest.TestReport) -> None:
        """Take one report of one phase."""
        needs = getattr(report, ATTRIBUTE, None)
        if not needs:
            return
        test = self.tests.setdefault(report.nodeid, TestRecord(needs=needs))
        is_expected_failure = hasattr(report, "wasxfail")
        if report.when == "call" and (not report.skipped or is_expected_failure):
            # Devices are counted for a test that ran; its other reports do not know them.
            test.state, test.needs = RAN, needs
        elif report.when != "teardown" and report.skipped:
            test.state, test.why = SKIPPED, _skip_reason(report)
        elif report.when == "setup" and report.failed:
            test.state = ERROR

    def rows(self) -> list[Row]:
        """Return the summary, hardware first, then ranks by world size."""
        labels = set(self.selected)
        for test in self.tests.values():
            labels.update(need["label"] for need in test.needs)
        return [self._row(label) for label in sorted(labels, key=_place)]

    def _row(self, label: str) -> Row:
        """Count the tests of one label."""
        tests = [t for t in self.tests.values() if any(n["label"] == label for n in t.needs)]
        selected = max(self.selected[label], len(tests))
        why = Counter(test.why or test.state for test in tests if test.state != RAN)
        why[STARTED], interrupted = 0, why[STARTED]
        why["not finished"], why["not started"] = interrupted, selected - len(tests)
        return Row(
            label=label,
            selected=selected,
            ran=sum(test.state == RAN for test in tests),
            skipped=sum(test.state == SKIPPED for test in tests),
            why={reason: number for reason, number in why.most_common() if number > 0},
        )

    def judge(self, required: Iterable[Required]) -> list[str]:
        """Return a sentence for each required kind whose tests did not run as required."""
        verdicts = ((entry, self._judge(entry)) for entry in required)
        return [f"{entry} is not met: {why}" for entry, why in verdicts if why is not None]

    def _judge(self, entry: Required) -> str | None:
        """Return why one requirement is not met, or None where it is."""
        that_ran = [
            need
            for test in self.tests.values()
            if test.state == RAN
            for need in test.needs
            if need["kind"] == entry.kind
        ]
        ran = [need["found"] for need in that_ran]
        if any(found >= entry.count for found in ran):
            return None
        number = f"{len(ran)} {entry.kind} test{'' if len(ran) == 1 else 's'} ran"
        if ran and entry.kind == "ranks":
            return number + _processes(that_ran)
        if ran:
            return f"{number}, with {max(ran)} device{'' if max(ran) == 1 else 's'} at most"
        rows = [row for row in self.rows() if row.label.split()[0] == entry.kind]
        selected = sum(row.selected for row in rows)
        if not selected:
            return f"no {entry.kind} test was selected"
        reasons: Counter[str] = Counter()
        for row in rows:
            reasons.update(row.why)
        told = "; ".join(
            reason if count == selected else f"{count} x {reason}"
            for reason, count in reasons.most_common()
        )
        verb = "test was" if selected == 1 else "tests were"
        return f"{selected} {entry.kind} {verb} selected, none ran: {told}"


def _processes(that_ran: list[dict[str, Any]]) -> str:
    """Return on how many rank processes tests ran, and which had none: their ranks are pretended."""
    most = max(need["found"] for need in that_ran)
    pretended = [need["label"].split()[-1] for need in that_ran if need["found"] == 0]
    names = ", ".join(sorted(set(pretended)))
    if most == 0:
        return f", none on rank processes (fidelity {names}); it takes fidelity gloo or above"
    others = f"; {len(pretended)} had no rank processes (fidelity {names})" if pretended else ""
    return f", on {most} rank process{'es' * (most > 1)} at most{others}"


def _place(label: str) -> tuple[int, int, str]:
    """Return where a label comes in the summary."""
    order = ("gpu", "multi_gpu", "trainium", "requires", "ranks")
    kind, _, size = label.partition(" ws=")
    return order.index(kind), int(size.partition(" ")[0] or 0), label


def _skip_reason(report: pytest.TestReport) -> str:
    """Return the reason of a skip, without the word that pytest puts before it."""
    if isinstance(report.longrepr, tuple | list):
        return str(report.longrepr[-1]).removeprefix("Skipped: ")
    # An expected failure with run=False: some releases of pytest give it a whole traceback.
    expected = getattr(report, "wasxfail", "").removeprefix("reason: ")
    return expected or "skipped without a reason"
