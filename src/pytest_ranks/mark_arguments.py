"""The arguments of a mark, checked with sentences that a reader of the test understands."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, nearest_or_all

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from pytest_ranks.hardware.requirements import Need


def call(function: Callable[..., tuple[Need, ...]], mark: pytest.Mark) -> tuple[Need, ...]:
    """Call a mark's function.

    Raises:
        BadInputError: an argument is unknown, given twice, or cannot be used.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    for name in mark.kwargs:
        if name not in known:
            as_text = f"expected texts without a name: {mark.name}({name!r})."
            expected = nearest_or_all(name, known) if known else as_text
            raise BadInputError(f"{mark.name}({name}=...): unknown argument {name!r}, {expected}")
    check_positional(function, mark)
    try:
        return function(*mark.args, **mark.kwargs)
    except BadInputError as error:
        raise BadInputError(f"{mark.name}: {error}") from None


def check_positional(function: Callable[..., object], mark: pytest.Mark) -> None:
    """Check how many arguments a mark has without a name, and that none is given by name too.

    Raises:
        BadInputError: there are more than its function takes, or one is there twice.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    places = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if len(mark.args) > len(places):
        others = "; write others by name" if len(places) < len(parameters) else ""
        raise BadInputError(
            f"{mark.name}{mark.args!r}: found {len(mark.args)} arguments without a name, expected "
            f"{', '.join(places)} alone{others}."
        )
    for name in places[: len(mark.args)]:
        if name in mark.kwargs:
            raise BadInputError(f"{mark.name}: {name} is given twice, expected it once.")
