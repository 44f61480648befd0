"""What all tests of this repository share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> Iterator[None]:
    """Keep the sessions that tests start from taking over the settings of the one that runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("RANKS_") or name == "PYTEST_ADDOPTS":
                patch.delenv(name)
        yield
