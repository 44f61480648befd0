"""Projects of users, run by pytester, on machines that the tests lay out."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def sessions_of_this_plugin_alone(request, monkeypatch) -> None:
    """A user's session has our plugin and no other, and no settings of whoever runs this suite."""
    for name in list(os.environ):
        if name.startswith(("RANKS_", "NEURON_")) or name.endswith("_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)
    if "pytester" in request.fixturenames:
        # pytester clears the options from outside; ours have to come after that.
        request.getfixturevalue("pytester")
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_ranks.plugin")


@pytest.fixture
def with_gpus(pytester):
    """Return a function that gives the user's project a machine with so many NVIDIA GPUs."""

    def lay_out(count: int) -> None:
        rows = [f"{n}, GPU-{n}, 23034, 570.86.15, NVIDIA L4, 8.9" for n in range(count)]
        tool = pytester.mkdir("machine") / "usr/bin/nvidia-smi"
        tool.parent.mkdir(parents=True)
        tool.write_text("\n".join(["#!/bin/sh", *(f"echo '{row}'" for row in rows)]) + "\n")
        tool.chmod(0o755)
        pytester.makeconftest(
            f"""
            from pathlib import Path
            from pytest_ranks.hardware.probes import probe

            def pytest_ranks_hardware(config):
                return probe(root=Path({str(pytester.path / "machine")!r}))
            """
        )

    return lay_out
