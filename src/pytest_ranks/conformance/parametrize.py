"""The pytest face: a check bound to a subject and a setting, as a parameter or as an item of its own."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_ranks import _compat
from pytest_ranks.conformance.diagnosis import KEYWORD, advice, is_step, place_of
from pytest_ranks.conformance.findings import CheckResult
from pytest_ranks.conformance.plan import plan_for
from pytest_ranks.conformance.runner import Session, run_check
from pytest_ranks.conformance.subject import find_subject, inspect_subject
from pytest_ranks.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_ranks.conformance.check import Check, Setting
    from pytest_ranks.conformance.subject import SubjectRef

_sessions: dict[SubjectRef, Session] = {}


class BoundCheck:
    """One check of one subject in one setting; call it to run it.

    Attributes:
        ref: the subject.
        check: the check.
        setting: strategy and world size; None for a check that is not applicable.
        expected: why it is expected to fail, or None.
        result: what came out, once it ran.
        diagnosing: whether a failure says what it means as a step of the diagnosis.
    """

    def __init__(
        self, ref: SubjectRef, check: Check, setting: Setting | None, expected: str | None
    ) -> None:
        self.ref = ref
        self.check = check
        self.setting = setting
        self.expected = expected
        self.folder: Path | None = None
        self.result: CheckResult | None = None
        self.diagnosing = False

    @property
    def id(self) -> str:
        """`suite.claim[setting]`."""
        return self.check.id if self.setting is None else f"{self.check.id}[{self.setting}]"

    def __repr__(self) -> str:
        return f"<check {self.id}>"

    def __call__(self) -> None:
        """Run the check; end the test as its result says."""
        self.result = run_check(
            session_for(self.ref, self.folder), self.check, self.setting, expected=self.expected
        )
        match self.result.outcome:
            case "passed":
                return
            case "expected failure":
                pytest.xfail(self.result.text)
            case "not applicable" | "not run":
                pytest.skip(f"{self.result.outcome}: {self.result.text}")
            case "failed":
                pytest.fail("\n".join([self.result.text, *self._further()]), pytrace=False)
            case outcome:
                text = f"{self.id}: {outcome}: {self.result.text}"
                pytest.fail("\n".join([text, *self._further()]), pytrace=False)

    def _further(self) -> list[str]:
        """Return the lines below a failure."""
        lines = [f"  reproduce: {self.reproduce()}"]
        return [*lines, advice(self.check.id)] if self.diagnosing else lines

    def reproduce(self) -> str:
        """Return the command that runs this check alone."""
        words = [
            "pytest",
            "--pyargs",
            "pytest_ranks.conformance",
            f"--ranks-subject={self.ref}",
            f"--ranks-suite={self.id}",
        ]
        return " ".join(shlex.quote(word) for word in words)


def session_for(ref: SubjectRef, folder: Path | None) -> Session:
    """Return the subject's session of this process, made at the first call."""
    if ref not in _sessions:
        base = folder if folder is not None else Path(tempfile.mkdtemp(prefix="pytest-ranks-"))
        _sessions[ref] = Session(ref, base / "conformance")
    return _sessions[ref]


def close_sessions() -> None:
    """End the ranks of all sessions of this process."""
    while _sessions:
        _sessions.popitem()[1].close()


def bound_checks(
    subject: object,
    *,
    suites: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[BoundCheck]:
    """Return every check that applies to a subject, bound to each of its settings.

    Raises:
        BadInputError: when the subject, a suite or an expected failure is none.
    """
    ref = find_subject(subject)
    planned = plan_for(
        inspect_subject(ref), suites, {**ref.declared_failures(), **(expected_failures or {})}
    )
    return [BoundCheck(ref, check, setting, reason) for check, setting, reason in planned]


def parametrize_with_checks(
    subject: object,
    *,
    suites: Iterable[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrise a test over the conformance checks of a subject.

    Args:
        subject: a class at the top of a module, or a text such as "mylib.testing:MyTrainer".
        suites: names of suites or check ids; None means all.
        expected_failures: check id to reason, such as a link to the bug report; a pass is then a
            failure.

    Example:
        ```python
        @parametrize_with_checks("mylib.testing:MyTrainer")
        def test_conformance(check):
            check()
        ```
    """
    try:
        checks = bound_checks(subject, suites=suites, expected_failures=expected_failures)
    except BadInputError as error:
        pytest.fail(f"parametrize_with_checks: {error}", pytrace=False)
    return pytest.mark.parametrize("check", [pytest.param(bound, id=bound.id) for bound in checks])


def prepare(item: pytest.Item) -> None:
    """Give the checks of an item the session's folder."""
    for bound in _bound(item):
        bound.folder = shared_folder(item.config)


def record_of(item: pytest.Item) -> dict[str, Any] | None:
    """Return the result of an item's check as plain data; None when it has none."""
    for bound in _bound(item):
        result = bound.result
        if result is not None:
            return {
                "subject": str(bound.ref),
                "suite": bound.check.suite,
                "check": result.check,
                "setting": result.setting,
                "outcome": result.outcome,
                # The reason alone, which is the same in all settings; what was read stands in the report.
                "text": bound.expected if result.outcome == "expected failure" else result.text,
                "cause": result.finding.cause if result.finding is not None else "",
                "seconds": result.seconds,
            }
    return None


def _bound(item: pytest.Item) -> list[BoundCheck]:
    if isinstance(item, CheckItem):
        return [item.bound]
    params = getattr(getattr(item, "callspec", None), "params", {})
    return [value for value in params.values() if isinstance(value, BoundCheck)]


def shared_folder(config: pytest.Config) -> Path:
    """Return the session's temporary folder, the same one for all of xdist's workers."""
    base = _compat.base_temp(config)
    return base.parent if hasattr(config, "workerinput") else base


def in_order(items: list[pytest.Item], checks: list[BoundCheck], *, asked: str) -> None:
    """Put check items in the suites' order, or in that of the diagnosis where `-k` asks for it.

    Args:
        items: those of the session, sorted in place; what is no check comes first.
        checks: every check, in the suites' order.
        asked: the text of `-k`.
    """
    if asked == KEYWORD:
        for item in items:
            if isinstance(item, CheckItem):
                item.bound.diagnosing = True
        checks = sorted(checks, key=lambda bound: place_of(bound.check.id, bound.setting))
    places = {bound: index for index, bound in enumerate(checks)}
    items.sort(key=lambda item: places[item.bound] if isinstance(item, CheckItem) else -1)


class CheckItem(pytest.Item):
    """One check as a test item: `loss::token_weights[ddp-2]`."""

    bound: BoundCheck

    def runtest(self) -> None:
        """Run the check."""
        self.bound()

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Return the headline of its report."""
        return self.path, None, self.bound.id


class SuiteFile(pytest.File):
    """The file of one suite; its items are the suite's checks."""

    bound: list[BoundCheck]

    def collect(self) -> Iterable[pytest.Item]:
        """Return an item a check and setting."""
        for bound in self.bound:
            name = bound.id.partition(".")[2]
            item: CheckItem = CheckItem.from_parent(self, name=name)
            item.bound = bound
            if is_step(bound.check.id, bound.setting):
                item.extra_keyword_matches.add(KEYWORD)
            yield item
