"""No process outlives a pytest session, however that ends."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, environment, write_files

pytest.importorskip("torch")

HANGING = """
import os, subprocess, sys, time
from pathlib import Path
import pytest


@pytest.mark.ranks(2)
def test_it(rank):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    part = Path(FOLDER, f"{rank.index}.part")
    part.write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
    part.rename(part.with_suffix(".pids"))
    time.sleep(1000)
"""


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "fresh"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_survives_the_session(tmp_path, number, forked):
    write_files(tmp_path, {"test_it.py": HANGING.replace("FOLDER", repr(str(tmp_path)))})
    arguments = ("-p", "no:rerunfailures") if forked else ()
    session = subprocess.Popen(
        command("-p", "no:randomly", *arguments),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while len(files := list(tmp_path.glob("*.pids"))) < 2:
        assert session.poll() is None, "the session ended before its ranks ran"
        time.sleep(0.02)
    pids = {int(pid) for file in files for pid in file.read_text().split()}
    assert len(pids) == 2 + 1 + 2  # ranks, the zygote, what the ranks started
    session.send_signal(number)
    session.wait(timeout=30)
    assert still_alive(pids) == []


def still_alive(pids):
    """Return which of these processes live on, once none does or patience is over."""
    for _ in range(250):
        alive = [pid for pid in pids if is_alive(pid)]
        if not alive:
            return []
        time.sleep(0.02)
    return alive


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
