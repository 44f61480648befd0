"""The hooks that this plugin calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_ranks.hardware.found import Hardware


@pytest.hookspec(firstresult=True)
def pytest_ranks_hardware(config: pytest.Config) -> Hardware | None:
    """Return what this machine has, or None to let the probes look.

    Called at most once a session, at the setup of the first test with a need of hardware. For
    machines that the probes do not know, and for tests of a project's own skips:

        from pathlib import Path
        from pytest_ranks.hardware.probes import probe

        def pytest_ranks_hardware(config):
            return probe(root=Path("tests/data/machine_with_two_gpus"))
    """
