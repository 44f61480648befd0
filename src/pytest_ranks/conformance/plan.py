"""Which checks run in which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.conformance.check import Check, Setting, select, valid_expectations
from pytest_ranks.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_ranks.conformance.subject import Capabilities

Planned = tuple[Check, Setting | None, str | None]
"""A check, the setting to run it in (None: not applicable) and why it is expected to fail, or None."""


def plan_for(
    capabilities: Capabilities,
    names: Iterable[str] | None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Planned]:
    """Return what will be judged: each selected check in each of its settings, with its expected failure.

    A check that is not applicable is there once, without a setting.

    Args:
        capabilities: what the subject declares.
        names: suites, check ids and check ids with a setting such as "loss.targets[ddp-2]"; None
            means all.
        expected_failures: check id, with or without a setting, to reason.

    Raises:
        BadInputError: for a suite, check, setting or expected failure that does not exist.
    """
    expected = dict(expected_failures or {})
    valid_expectations(expected)
    wanted = None if names is None else [name.partition("[") for name in names]
    planned: list[Planned] = []
    for check in select(None if wanted is None else [name for name, _, _ in wanted]):
        if check.unmet(capabilities):
            planned.append((check, None, None))
            continue
        possible = check.settings(capabilities)
        asked = {
            setting.rstrip("]")
            for name, _, setting in wanted or [("", "", "")]
            if name in (check.id, check.suite, "")
        }
        for setting in possible if "" in asked else _named(asked, possible, check):
            reason = expected.get(f"{check.id}[{setting}]", expected.get(check.id))
            planned.append((check, setting, reason))
    return planned


def _named(asked: set[str], possible: tuple[Setting, ...], check: Check) -> list[Setting]:
    by_name = {str(setting): setting for setting in possible}
    for name in asked:
        if name not in by_name:
            raise BadInputError(
                f"{check.id} has no setting {name!r} for this subject.{did_you_mean(name, by_name)} "
                f"Its settings: {', '.join(by_name)}"
            )
    return [setting for name, setting in by_name.items() if name in asked]
