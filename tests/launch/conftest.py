"""Real pytest sessions in processes of their own, with their reports as data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECTS = Path(__file__).parent / "projects"
RECORDER = """
import json, os
import pytest

@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    row = {
        "id": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "wasxfail": getattr(report, "wasxfail", None),
        "text": report.longreprtext,
        "sections": report.sections,
        "properties": report.user_properties,
    }
    with open(os.environ["RECORDED"], "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


@dataclass(frozen=True)
class Row:
    id: str
    when: str
    outcome: str
    wasxfail: str | None
    text: str
    sections: list
    properties: list

    @property
    def summary(self) -> tuple[str, str, str | None]:
        return self.when, self.outcome, self.wasxfail


@dataclass(frozen=True)
class Session:
    returncode: int
    output: str
    rows: list[Row]

    def of(self, name: str) -> list[Row]:
        """Return the reports of one test, by the end of its id."""
        found = [row for row in self.rows if row.id.endswith(f"::{name}")]
        assert found, f"no report of {name!r}; the session said:\n{self.output}"
        return found

    def call(self, name: str) -> Row:
        """Return the one report of a test that did not pass, else that of its call."""
        rows = self.of(name)
        bad = [row for row in rows if row.outcome != "passed"]
        telling = bad or [row for row in rows if row.when == "call"]
        assert len(telling) == 1, f"{name}: {[row.summary for row in rows]}\n{self.output}"
        return telling[0]


def project(name: str) -> str:
    """Return the text of a user's test file, which sessions run and this one never collects."""
    return (PROJECTS / f"{name}.py").read_text()


def environment(folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "RANKS_"))
        and name not in ("CI", "BUILD_NUMBER")  # where pytest shortens no line of its summary
    }
    return {**kept, "RECORDED": str(folder / "reports.jsonl"), "PYTHONDONTWRITEBYTECODE": "1"}


def write_files(folder: Path, files: dict[str, str]) -> None:
    (folder / "conftest.py").write_text(RECORDER)
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (folder / name).write_text(text)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


RunSession = Callable[..., Session]


@pytest.fixture(scope="session")
def run_session(tmp_path_factory: pytest.TempPathFactory) -> RunSession:
    """Run pytest on these files: `run_session({"test_a.py": "..."}, "-x")`."""

    def run(files: dict[str, str], *arguments: str, env: dict[str, str] | None = None) -> Session:
        folder = tmp_path_factory.mktemp("session")
        write_files(folder, files)
        done = subprocess.run(
            command(*arguments),
            cwd=folder,
            env={**environment(folder), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=180,
            check=False,
        )
        reports = folder / "reports.jsonl"
        lines = reports.read_text().splitlines() if reports.exists() else []
        rows = [Row(**json.loads(line)) for line in lines]
        return Session(done.returncode, done.stdout, rows)

    return run


StartSession = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_session(tmp_path: Path) -> StartSession:
    """Start pytest on one file in `tmp_path` and go on: `start_session("...", "-x")`."""

    def start(text: str, *arguments: str) -> subprocess.Popen[bytes]:
        write_files(tmp_path, {"test_it.py": text})
        return subprocess.Popen(
            command("-p", "no:randomly", *arguments),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    return start
