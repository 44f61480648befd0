"""Ranks that cannot start: a process that is stopped, an import that never ends."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from launch.conftest import RECORDER

pytest.importorskip("torch")

STOPPED = """
import json, os, signal
from pathlib import Path
import pytest


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def children(pid):
    return {int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def note(rank):
    ranks = rank.gather(os.getpid())
    if rank.index == 0:
        stores = children(os.getppid()) - set(ranks)
        noted = {"rank": ranks[1], "zygote": os.getppid(), "stores": min(stores)}
        Path("noted.json").write_text(json.dumps(noted))


def stop(name):
    pid = json.loads(Path("noted.json").read_text())[name]
    Path(name).write_text(str(pid))
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.ranks(2)
def test_first(rank):
    note(rank)


def test_stops_a_rank():
    stop("rank")


@pytest.mark.ranks(2)
def test_meets_the_rank(rank):
    pass


@pytest.mark.ranks(2)
def test_second(rank):
    note(rank)


def test_stops_the_zygote():
    stop("zygote")


@pytest.mark.ranks(3)
def test_meets_the_zygote(rank):
    pass


@pytest.mark.ranks(3)
def test_third(rank):
    note(rank)


def test_stops_the_stores():
    stop("stores")


@pytest.mark.ranks(4)
def test_meets_the_stores(rank):
    pass


def test_says_who_was_stopped(record_property):
    for name in ("rank", "zygote", "stores"):
        record_property(name, Path(name).read_text())
"""

STOPPED_TEXT = (
    "{who} (pid {pid}) was stopped by a signal such as SIGSTOP and has not run for 3 s; by whom is "
    "unknown. So that this does not wait for ever, it is ended now; the next test on ranks starts "
    "a new one. To keep it, continue it sooner: kill -CONT {pid}"
)


def test_a_stopped_process_is_named_soon_and_the_next_test_gets_a_new_one(run_session):
    session = run_session({"test_it.py": STOPPED}, "-p", "no:randomly")
    pids = dict(session.call("test_says_who_was_stopped").properties)
    for name, who in (
        ("rank", "rank 1"),
        ("zygote", "the process that ranks are forked from"),
        ("stores", "a process that ranks need to find each other"),
    ):
        text = session.call(f"test_meets_the_{name}").text
        expected = STOPPED_TEXT.format(who=who, pid=pids[name])
        assert text == f"test_it.py::test_meets_the_{name}: {expected}", session.output
    assert "3 errors" in session.output
    assert "7 passed" in session.output


# Only the process that ranks are forked from hangs; the first test waits until it does, so that
# the time that it then gets may be short.
HANG = """
import sys, threading, time
from pathlib import Path


def import_for_ever():
    Path("it_hangs").touch()
    time.sleep(1000)


if "pytest_ranks.launch.session" in sys.modules:
    import_for_ever()
"""
# with a thread in the controller it is a process of its own, which imports the conftest again
THREAD = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
TESTS = """
import time
from pathlib import Path
import pytest


def test_waits_until_it_hangs():
    while not Path("it_hangs").exists():
        time.sleep(0.02)


@pytest.mark.ranks(2)
def test_one(rank):
    pass


@pytest.mark.ranks(3)
def test_two(rank):
    pass


@pytest.mark.ranks(2)
def test_three(rank):
    pass
"""


@pytest.mark.parametrize("file", ["test_it.py", "conftest.py"])
def test_an_import_that_hangs_is_waited_for_once(run_session, file):
    files = {"test_it.py": TESTS, "conftest.py": RECORDER + HANG + THREAD}
    if file == "test_it.py":
        files = {"test_it.py": TESTS + HANG}
    clock = ("--timeout=100",) if find_spec("pytest_timeout") else ()
    session = run_session(files, "-p", "no:randomly", "--ranks-join-timeout=1", *clock)
    text = session.call("test_one").text
    assert text.startswith(
        "test_it.py::test_one: the ranks could not start within 1 s (--ranks-join-timeout). What "
        "the process that they are forked from wrote, and where it is:\n"
    ), session.output
    assert f'{file}", line' in text
    assert "in import_for_ever" in text
    for name in ("test_two", "test_three"):
        assert session.call(name).text == (
            f"test_it.py::{name}: not run: the ranks could not start for an earlier test, within "
            "1 s (--ranks-join-timeout); its report says what they were doing"
        )
    assert "1 passed, 3 errors" in session.output
