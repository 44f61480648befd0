"""Worlds of real pytest sessions: one process a rank, as a launcher starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pytest_ranks.launch.processes import kill_tree

RECORDER = """
import json, os
import pytest

os.environ.setdefault("PID_OF_PYTEST", str(os.getpid()))  # ranks inherit it

@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    row = {
        "id": report.nodeid.partition("::")[2],
        "when": report.when,
        "outcome": report.outcome,
        "text": report.longreprtext,
        "sections": report.sections,
    }
    with open(os.environ["RECORDED"], "a") as file:
        file.write(json.dumps(row) + "\\n")
"""
# rerunfailures starts a thread in each session, so that ranks need a second start of pytest
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:rerunfailures")
SECONDS = 180.0  # for a session that takes 10; nothing here is a measurement


@dataclass
class Process:
    """One process that a test started, and all below it."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    file: Path

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def wait(self, seconds: float = SECONDS) -> int:
        return self.popen.wait(timeout=seconds)

    def wait_for(self, text: str, count: int, seconds: float = SECONDS) -> None:
        """Wait until the process has written a text so often."""
        end = time.monotonic() + seconds
        while self.output.count(text) < count:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.output}"
            time.sleep(0.05)

    def end(self) -> None:
        kill_tree(self.popen.pid, self.pidfd)
        self.popen.wait()
        os.close(self.pidfd)


@dataclass
class World:
    """A folder with tests, and the processes that run them."""

    folder: Path
    processes: list[Process] = field(default_factory=list)

    def write(self, text: str) -> None:
        (self.folder / "conftest.py").write_text(RECORDER)
        (self.folder / "pytest.ini").write_text("[pytest]\n")
        (self.folder / "test_it.py").write_text(text)

    def start(self, *command: str, **variables: str) -> Process:
        kept = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("PYTEST_", "RANKS_", "SLURM", "TORCHELASTIC"))
        }
        file = self.folder / f"output{len(self.processes)}.txt"
        with file.open("wb") as stdout:
            popen = subprocess.Popen(
                command,
                cwd=self.folder,
                env={
                    **kept,
                    "RECORDED": str(self.folder / "reports.jsonl"),
                    "FOLDER": str(self.folder),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "PET_LOG_DIR": str(self.folder / "logs"),
                    **variables,
                },
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Process(popen, os.pidfd_open(popen.pid), file)
        self.processes.append(process)
        return process

    def torchrun(self, *options: str, arguments: tuple[str, ...] = ()) -> Process:
        return self.start(
            *(sys.executable, "-m", "torch.distributed.run", *options),
            *("-m", "pytest", *PLUGINS, *arguments),
        )

    def srun(self, *arguments: str, size: int, nodes: int, **variables: str) -> list[Process]:
        """Start all ranks as srun does: plain processes that differ in their variables."""
        port = free_port()
        return [
            self.srun_rank(rank, *arguments, size=size, nodes=nodes, port=port, **variables)
            for rank in range(size)
        ]

    def srun_rank(
        self, rank: int, *arguments: str, size: int, nodes: int, port: int, **variables: str
    ) -> Process:
        on_node = size // nodes
        return self.start(
            *(sys.executable, "-m", "pytest", *PLUGINS),
            *arguments,
            SLURM_JOB_ID="77",
            SLURM_STEP_ID="0",
            SLURM_PROCID=str(rank),
            SLURM_NTASKS=str(size),
            SLURM_LOCALID=str(rank % on_node),
            SLURM_NODEID=str(rank // on_node),
            SLURM_NNODES=str(nodes),
            SLURM_JOB_NODELIST=f"host[0-{nodes - 1}]",
            SLURMD_NODENAME=f"host{rank // on_node}",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WHO=str(rank),
            **variables,
        )

    def rows(self) -> dict[str, list[dict]]:
        """Return the reports by test, as the one session that reports wrote them."""
        path = self.folder / "reports.jsonl"
        found: dict[str, list[dict]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            found.setdefault(row["id"], []).append(row)
        return found

    def outcomes(self) -> dict[str, str]:
        """Return the one word for each test that is reported: the worst of its phases."""
        order = ("passed", "skipped", "failed")
        return {
            name: max((row["outcome"] for row in rows), key=order.index)
            for name, rows in self.rows().items()
        }

    def text(self, name: str) -> str:
        """Return what the one report of a test that did not pass says."""
        texts = [row["text"] for row in self.rows()[name] if row["outcome"] == "failed"]
        assert len(texts) == 1, self.rows()[name]
        return texts[0]

    def end(self) -> None:
        """End what is left, however the test went."""
        for process in self.processes:
            process.end()


def free_port() -> int:
    """Return a port that nobody has; srun's ranks know theirs beforehand, so a test has to guess."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
