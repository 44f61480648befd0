"""Checks as a product: point them at a trainer and get a verdict."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_ranks.conformance.findings import CheckResult, Finding
    from pytest_ranks.conformance.job import Job, Optimizer
    from pytest_ranks.conformance.parametrize import parametrize_with_checks
    from pytest_ranks.conformance.runner import check_trainer
    from pytest_ranks.conformance.subject import Capabilities, Subject, Trained, full_parameters

_PLACES = {
    "Capabilities": "subject",
    "CheckResult": "findings",
    "Finding": "findings",
    "Job": "job",
    "Optimizer": "job",
    "Subject": "subject",
    "Trained": "subject",
    "check_trainer": "runner",
    "full_parameters": "subject",
    "parametrize_with_checks": "parametrize",
}

__all__ = [
    "Capabilities",
    "CheckResult",
    "Finding",
    "Job",
    "Optimizer",
    "Subject",
    "Trained",
    "check_trainer",
    "full_parameters",
    "parametrize_with_checks",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
