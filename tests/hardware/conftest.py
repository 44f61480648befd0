"""A folder laid out like a machine's `/`: drivers' files, device nodes, tools that are scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_ranks.hardware.probes import probe

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_ranks.hardware.found import Hardware


class FakeMachine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: set[str] = set()

    def file(self, name: str, text: object = "") -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def program(self, name: str, script: str) -> None:
        self.file(name, f"#!/bin/sh\n{script}")
        (self.root / name.lstrip("/")).chmod(0o755)

    def prints(self, name: str, output: str) -> None:
        self.file(f"{name}.out", output)
        self.program(name, f"cat '{self.root / name.lstrip('/')}.out'")

    def pci(self, vendor: str, device_class: str, *, slot: str = "0000:01:00.0") -> None:
        self.file(f"/sys/bus/pci/devices/{slot}/vendor", vendor)
        self.file(f"/sys/bus/pci/devices/{slot}/class", device_class)

    def look(self, **environ: str) -> Hardware:
        # The scripts need `cat` and `sleep`; nothing of the probes comes from PATH under a root.
        environment = {"PATH": "/usr/bin:/bin", **environ}
        return probe(self.root, environ=environment, installed=self.modules.__contains__)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path / "machine")
