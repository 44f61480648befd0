"""What all tests of this repository share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# What CPU ranks and GPUs are both put through; a failure there shows its values too.
pytest.register_assert_rewrite("bodies")

with suppress(ImportError):  # tests that need no torch run without it
    from hypothesis import settings

    # No test is about time: the first example of one may wait for numpy, or for a busy machine.
    settings.register_profile("ranks", deadline=None)
    settings.load_profile("ranks")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and what it starts does too: sessions under test must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
SLOW = (
    "conformance/test_bad_subjects.py",
    "conformance/test_kill_matrix.py",
    "conformance/test_verdict.py",
    "docs",
    "launch/test_attached_n*.py",
    "launch/test_attached_srun.py",
    "launch/test_attached_torchrun.py",
    "launch/test_host.py",
    "launch/test_items_*.py",
    "launch/test_forty_three_rows.py",
    "launch/test_launch_fixture.py",
    "models/test_tiny_families.py",
    "models/test_tiny_models_page.py",
    "reference/test_reference_cli.py",
    "reference/test_reference_liger.py",
    "reference/test_reference_orthogonal.py",
    "reference/test_reference_ranks.py",
    "subjects",
    "test_*_on_ranks.py",
    "test_diagnostic.py",
    "test_hand_mutants.py",
    "test_training_components.py",
    "test_model_initialization.py",
    "test_tox_environments.py",
)
"""Tests that start ranks or sessions, or build every family of models: seconds, where others take milliseconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `tox -e test-quick` leaves out."""
    for item in items:
        path = item.path.relative_to(HERE) if item.path.is_relative_to(HERE) else Path()
        if any(path.match(entry) or entry == path.parts[0] for entry in SLOW if path.parts):
            item.add_marker("slow")
    # A diagnosis has an order, also where the others are shuffled.
    places = [place for place, item in enumerate(items) if item.path.name == "test_diagnostic.py"]
    ordered = sorted((items[place] for place in places), key=lambda item: item.location[1:])
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> Iterator[None]:
    """Keep the sessions that tests start from taking over the settings of the one that runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("RANKS_") or name == "PYTEST_ADDOPTS":
                patch.delenv(name)
        yield
