"""No process outlives a pytest session, however that ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

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
def test_no_process_survives_the_session(start_session, tmp_path, number, forked):
    arguments = ("-p", "no:rerunfailures") if forked else ()
    session = start_session(HANGING.replace("FOLDER", repr(str(tmp_path))), *arguments)
    while len(files := list(tmp_path.glob("*.pids"))) < 2:
        assert session.poll() is None, "the session ended before its ranks ran"
        time.sleep(0.02)
    pids = {int(pid) for file in files for pid in file.read_text().split()}
    assert len(pids) == 2 + 1 + 2  # ranks, the zygote, what the ranks started
    session.send_signal(number)
    session.wait(timeout=120)
    assert still_alive(pids) == []


STUCK = """
import os, sys, time
from pathlib import Path
import pytest

if "pytest_ranks.launch.session" in sys.modules:  # in the zygote alone
    Path(FOLDER, "part").write_text(str(os.getpid()))
    Path(FOLDER, "part").rename(Path(FOLDER, "zygote.pids"))
    time.sleep(1000)


@pytest.mark.ranks(2)
def test_it(rank):
    pass
"""


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "fresh"])
def test_a_zygote_that_hangs_does_not_survive_either(start_session, tmp_path, forked):
    arguments = ("-p", "no:rerunfailures") if forked else ()
    session = start_session(STUCK.replace("FOLDER", repr(str(tmp_path))), *arguments)
    while not (noted := tmp_path / "zygote.pids").exists():
        assert session.poll() is None, "the session ended before its zygote collected"
        time.sleep(0.02)
    session.kill()
    session.wait(timeout=120)
    assert still_alive([int(noted.read_text())]) == []


SCRIPT = """
import os, time
from pathlib import Path
part = Path(FOLDER, os.environ["RANK"] + ".part")
part.write_text(f"{os.getpid()} {os.getppid()}")
part.rename(part.with_suffix(".pids"))
time.sleep(1000)
"""


def test_no_script_survives_the_session(start_session, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FOLDER", repr(str(tmp_path))))
    session = start_session(f"def test_it(launch): launch.script([{str(script)!r}])")
    while len(files := list(tmp_path.glob("*.pids"))) < 2:
        assert session.poll() is None, "the session ended before its script ran"
        time.sleep(0.02)
    pids = {int(pid) for file in files for pid in file.read_text().split()}
    assert len(pids) == 2 + 1  # ranks and torchrun
    session.kill()
    session.wait(timeout=120)
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
