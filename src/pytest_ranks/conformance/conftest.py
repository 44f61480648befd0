"""Collection of `pytest --pyargs pytest_ranks.conformance`: each file of `checks/` is a suite of items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_ranks.errors import BadInputError, not_installed
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from pytest_ranks.conformance.parametrize import BoundCheck

DEFAULT_SUBJECT = "pytest_ranks.subjects.reference:ReferenceTrainer"

_BOUND_KEY: pytest.StashKey[list[BoundCheck]] = pytest.StashKey()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the checks of a suite's file."""
    if file_path.suffix != ".py" or file_path.parent != Path(__file__).parent / "checks":
        return None
    mine = [bound for bound in _checks(parent.config) if bound.check.suite == file_path.stem]
    if not mine:
        return None
    from pytest_ranks.conformance.parametrize import SuiteFile

    suite: SuiteFile = SuiteFile.from_parent(parent, path=file_path, nodeid=file_path.stem)
    suite.bound = mine
    return suite


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the suites' order, whatever shuffles tests: the checks of the adapter come first, they gate the rest."""
    checks: list[BoundCheck] = config.stash.get(_BOUND_KEY, [])
    if checks:
        from pytest_ranks.conformance.parametrize import in_order

        in_order(items, checks, asked=config.getoption("keyword"))


def _checks(config: pytest.Config) -> list[BoundCheck]:
    if _BOUND_KEY not in config.stash:
        try:
            from pytest_ranks.conformance.parametrize import bound_checks
        except ModuleNotFoundError as error:
            text = not_installed("the conformance suites", error)
            raise pytest.Collector.CollectError(text) from None
        chosen = settings(config)
        try:
            config.stash[_BOUND_KEY] = bound_checks(
                chosen.subject or DEFAULT_SUBJECT, suites=chosen.suite or None
            )
        except BadInputError as error:
            raise pytest.Collector.CollectError(str(error)) from None
    return config.stash[_BOUND_KEY]
