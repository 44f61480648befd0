"""The commands that replace a session: `--ranks-list-checks` and `--ranks-self-check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_ranks.conformance.check import select
from pytest_ranks.errors import BadInputError, RanksError
from pytest_ranks.options import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def main(config: pytest.Config) -> int:
    """Run the command that the session's settings ask for.

    Raises:
        pytest.UsageError: for a suite that does not exist, or something that is not installed.
    """
    chosen = settings(config)
    try:
        if chosen.list_checks:
            return list_checks(chosen.suite or None, print)
        from pytest_ranks.conformance.self_check import print_matrix, self_check

        kills = self_check(chosen.suite or None, progress=lambda text: print(text, flush=True))
        return print_matrix(kills, print)
    except (BadInputError, RanksError) as error:
        raise pytest.UsageError(str(error)) from None


def list_checks(names: Iterable[str] | None, write: Callable[[str], None]) -> int:
    """Print every check: its id, what it claims and what it needs."""
    checks = select(names)
    suite = ""
    for check in checks:
        if check.suite != suite:
            suite = check.suite
            write(f"\n{suite}")
        write(f"  {check.id}")
        write(f"      {check.part('Claim')}")
        needs = [
            *check.requires,
            f"{' or '.join(check.strategies)} on {', '.join(map(str, check.worlds))} ranks",
        ]
        write(f"      needs: {'; '.join(needs)}; since {check.since}")
    write(f"\n{len(checks)} checks in {len({check.suite for check in checks})} suites")
    return 0
