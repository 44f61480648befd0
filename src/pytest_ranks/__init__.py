"""Test training code on real ranks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_ranks.conformance.parametrize import parametrize_with_checks
    from pytest_ranks.conformance.runner import check_trainer
    from pytest_ranks.errors import (
        BadInputError,
        RankFailure,
        RanksError,
        RankTimeout,
        UnavailableError,
    )
    from pytest_ranks.launch.faults import Faults, inject_faults
    from pytest_ranks.launch.functions import Launcher, ScriptResult
    from pytest_ranks.launch.injection.triggers import step
    from pytest_ranks.launch.rank_context import RankContext, current_rank
    from pytest_ranks.models.families import tiny_model

__version__ = "0.1.0"

__all__ = [
    "BadInputError",
    "Faults",
    "Launcher",
    "RankContext",
    "RankFailure",
    "RankTimeout",
    "RanksError",
    "ScriptResult",
    "UnavailableError",
    "check_trainer",
    "current_rank",
    "inject_faults",
    "parametrize_with_checks",
    "step",
    "tiny_model",
]

# Where each public name lives; looked up on first use, since pytest imports this package at its start.
_HOMES = {
    "BadInputError": "errors",
    "Faults": "launch.faults",
    "Launcher": "launch.functions",
    "RankContext": "launch.rank_context",
    "RankFailure": "errors",
    "RankTimeout": "errors",
    "RanksError": "errors",
    "ScriptResult": "launch.functions",
    "UnavailableError": "errors",
    "check_trainer": "conformance.runner",
    "current_rank": "launch.rank_context",
    "inject_faults": "launch.faults",
    "parametrize_with_checks": "conformance.parametrize",
    "step": "launch.injection.triggers",
    "tiny_model": "models.families",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
