"""However a session ends: no process, no shared memory, no temporary file is left, nobody else dies."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.launch.conftest import command, environment, write_files

pytest.importorskip("torch")

PATIENCE = 120.0  # seconds; only a failure waits that long

# Each rank has a child in a session of its own, a daemon that is nobody's child, a thread in a
# lock, torch's and Python's shared memory. Then rank 0 waits in a collective for rank 1.
SOURCE = """
import json, os, signal, subprocess, sys, time
from multiprocessing import shared_memory
from pathlib import Path
import pytest, torch
import torch.distributed as dist


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def surround(rank):
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensor = torch.ones(4).share_memory_()
    block = shared_memory.SharedMemory(create=True, size=16)
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    said = subprocess.run(
        ["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"], capture_output=True, check=True
    )
    files = [*Path("/dev/shm").glob(f"torch_{os.getpid()}_*"), Path("/dev/shm", block.name)]
    assert len(files) == 2
    zygote = os.getppid()
    noted = {
        "rank": os.getpid(), "zygote": zygote, "guardian": parent(zygote),
        "others": [child.pid, int(said.stdout)], "files": list(map(str, files)),
    }
    part = Path(os.environ["NOTES"], f"{rank.index}.part")
    part.write_text(json.dumps(noted))
    part.rename(part.with_suffix(".json"))
    return tensor, block


@pytest.mark.ranks(2)
def test_it(rank):
    kept = surround(rank)
    dist.barrier()  # both have noted what they have
    if rank.index == 1:
        HOW
    dist.all_reduce(torch.ones(1))


@pytest.mark.ranks(2)
def test_next(rank):
    dist.all_reduce(torch.ones(1))
"""
WAIT = "time.sleep(1000)"


@dataclass
class Scene:
    folder: Path
    temporary: Path
    process: subprocess.Popen[bytes]
    bystanders: list[subprocess.Popen[bytes]]

    def notes(self) -> list[dict]:
        """Return what the ranks noted, once both have."""
        end = time.monotonic() + PATIENCE
        while len(files := sorted((self.folder / "notes").glob("*.json"))) < 2:
            assert time.monotonic() < end, "the ranks never ran"
            time.sleep(0.02)
        return [json.loads(file.read_text()) for file in files]

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def end(self) -> int:
        """Wait for the end of the session, and hold that it left nothing and killed nobody."""
        notes = self.notes()
        status = self.process.wait(timeout=PATIENCE)
        pids = {one[name] for one in notes for name in ("rank", "zygote", "guardian")}
        pids |= {pid for one in notes for pid in one["others"]}
        assert len(pids) == 2 * 3 + 2
        files = [Path(file) for one in notes for file in one["files"]]
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and (left := [*alive(pids), *filter(Path.exists, files)]):
            time.sleep(0.02)
        assert left == [], self.output()
        while time.monotonic() < end and any(self.temporary.glob("*coverage*")):
            time.sleep(0.02)
        assert [path.name for path in self.temporary.iterdir()] == ["pytest-of-root"]
        assert [one.poll() for one in self.bystanders] == [None] * len(self.bystanders)
        return status


def alive(pids):
    return [pid for pid in pids if is_alive(pid)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def start(tmp_path):
    """Start a session in a process group of its own, with bystanders in and beside it."""
    (tmp_path / "notes").mkdir()
    # torch's manager of shared memory listens on a socket below, whose path has 107 characters at most
    temporary = Path(tempfile.mkdtemp(prefix="rk", dir="/tmp"))
    started: list[subprocess.Popen[bytes]] = []

    def run(how: str = WAIT, *arguments: str, terminal: int | None = None) -> Scene:
        write_files(tmp_path, {"test_it.py": SOURCE.replace("HOW", how)})
        output = (tmp_path / "output.txt").open("wb")
        variables = {
            **environment(tmp_path),
            "NOTES": str(tmp_path / "notes"),
            "TMPDIR": str(temporary),
            "USER": "root",
            "LOGNAME": "root",
        }
        process = subprocess.Popen(
            command("-p", "no:randomly", "-p", "no:rerunfailures", *arguments),
            cwd=tmp_path,
            env=variables,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=output if terminal is None else terminal,
            stderr=subprocess.STDOUT,
            start_new_session=terminal is not None,
            process_group=0 if terminal is None else None,
            preexec_fn=None if terminal is None else take_terminal,  # noqa: PLW1509 - no threads
        )
        bystanders = [subprocess.Popen(["sleep", "1000"])]
        if terminal is None:
            bystanders.append(subprocess.Popen(["sleep", "1000"], process_group=process.pid))
        output.close()
        started.extend((process, *bystanders))
        return Scene(tmp_path, temporary, process, bystanders)

    yield run
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(temporary)


def take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_the_controller_is_killed(start):
    scene = start()
    scene.notes()
    scene.process.kill()
    assert scene.end() == -signal.SIGKILL


def test_the_controller_is_killed_while_lines_are_measured(start):
    pytest.importorskip("pytest_cov")
    scene = start(WAIT, "--cov=.")
    scene.notes()
    assert [one.name[:21] for one in scene.temporary.glob("*coverage*")] == [
        "pytest-ranks-coverage"
    ]
    scene.process.kill()
    assert scene.end() == -signal.SIGKILL


def test_ctrl_c(start):
    scene = start()
    scene.notes()
    scene.process.send_signal(signal.SIGINT)
    assert scene.end() == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt: while test_it.py::test_it ran on 2 ranks" in scene.output()
    assert "no tests ran" in scene.output()


def test_ctrl_c_twice(start):
    scene = start()
    scene.notes()
    scene.process.send_signal(signal.SIGINT)
    scene.process.send_signal(signal.SIGINT)
    assert scene.end() in (pytest.ExitCode.INTERRUPTED, -signal.SIGINT)


def test_the_controller_is_asked_to_end(start):
    scene = start()
    scene.notes()
    scene.process.terminate()
    assert scene.end() == 128 + signal.SIGTERM
    assert "SIGTERM came while test_it.py::test_it ran on 2 ranks" in scene.output()


def test_the_terminal_is_closed(start):
    ours, theirs = pty.openpty()
    scene = start(terminal=theirs)
    os.close(theirs)
    scene.notes()
    os.close(ours)
    # 120: what Python ends with where a write failed before the signal came
    assert scene.end() in (-signal.SIGHUP, 120)


def test_a_rank_is_killed(start):
    scene = start("os.kill(os.getpid(), signal.SIGKILL)")
    assert scene.end() == pytest.ExitCode.TESTS_FAILED
    assert "died of SIGKILL" in scene.output()
    assert "1 failed, 1 passed" in scene.output()


def test_the_process_that_ranks_are_forked_from_is_killed(start):
    scene = start("os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)")
    assert scene.end() == pytest.ExitCode.TESTS_FAILED
    said = "test_it.py::test_it: the process that ranks are forked from died of SIGKILL."
    assert said in scene.output()
    assert "1 passed, 1 error" in scene.output()


def test_the_deadline_passes(start):
    scene = start(WAIT, "--ranks-timeout=2")
    assert scene.end() == pytest.ExitCode.TESTS_FAILED
    assert "timed out after 2 s" in scene.output()
