"""Which fidelity a test item runs at: what the mark, a fixture of the user's and the session say."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pytest_ranks import _compat
from pytest_ranks.errors import BadInputError
from pytest_ranks.launch.fidelity import ladder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

    from pytest_ranks.launch.spec import RankSpec
    from pytest_ranks.options import Settings

# The fixture that a conftest, a module or a class overrides.
FIXTURE = "ranks_fidelity"
_NEEDS_PROCESSES = ("faults",)


def choose(
    item: pytest.Item, spec: RankSpec, parameters: Mapping[str, Any], settings: Settings
) -> tuple[RankSpec, str | None]:
    """Return what an item runs on, and why it is skipped, if it is.

    A fixture with parameters makes an item of each, whose id says its fidelity: that one holds, or
    the item is skipped. A fixture without is a default for tests that allow it, and the session's
    wish goes before it.

    Raises:
        BadInputError: the fixture names no fidelity, or the test needs processes.
    """
    wanted, why = settings.fidelity, None
    if FIXTURE in parameters:
        wanted = _known(parameters[FIXTURE])
        if spec.fidelity != wanted and not ladder.is_allowed(spec, wanted):
            why = _refusal(spec, wanted)
    elif wanted is None or not ladder.is_allowed(spec, wanted):
        wanted = _constant(item)
    if wanted is not None and ladder.is_allowed(spec, wanted):
        changed = ladder.at(spec, wanted)
        is_too_wide = changed.is_limited and spec.world_size > settings.max_world_size
        spec = spec if is_too_wide and not spec.is_limited else changed
    _check_processes(item, spec)
    return spec, why


def _refusal(spec: RankSpec, wanted: str) -> str:
    if spec.is_pinned:
        return (
            f"fixture {FIXTURE} says {wanted!r}, the test runs at fidelity {spec.fidelity!r} alone"
        )
    return (
        f"fixture {FIXTURE} says {wanted!r}, the test is valid at {spec.lowest_fidelity!r} and "
        f"above; write lowest_fidelity={wanted!r} on its mark if it is"
    )


def _constant(item: pytest.Item) -> str | None:
    """Return what an override of the fixture that takes nothing returns, None where there is none."""
    found = [one for one in _compat.fixture_definitions(item) if one.argname == FIXTURE]
    if not found or _is_ours(found[-1].func):
        return None
    if found[-1].argnames:
        raise BadInputError(
            f"ranks: the fixture {FIXTURE} takes {', '.join(found[-1].argnames)}, expected nothing, "
            "or params=[...]: it is asked before the ranks are there."
        )
    function: Any = inspect.unwrap(found[-1].func)
    is_method = bool(inspect.signature(function).parameters)
    return _known(function(getattr(item, "cls", None)) if is_method else function())


def _is_ours(function: Any) -> bool:
    return getattr(inspect.unwrap(function), "__module__", "") == "pytest_ranks.fixtures"


def _known(found: object) -> str:
    if not isinstance(found, str) or found not in ladder.FIDELITIES:
        raise BadInputError(
            f"ranks: the fixture {FIXTURE} says {found!r}, expected one of "
            f"{', '.join(map(repr, ladder.FIDELITIES))}."
        )
    return found


def _check_processes(item: pytest.Item, spec: RankSpec) -> None:
    for name in _NEEDS_PROCESSES:
        if spec.fidelity in ladder.HOSTED and name in getattr(item, "fixturenames", ()):
            raise BadInputError(
                f"ranks(fidelity={spec.fidelity!r}): the fixture {name!r} needs a process a rank, "
                f"expected fidelity {ladder.DEFAULT!r} or above."
            )
        if spec.keep_group and name in getattr(item, "fixturenames", ()):
            raise BadInputError(
                f"ranks(keep_group=True): the fixture {name!r} leaves a process group that cannot "
                "be kept; give the test a mark without it."
            )
