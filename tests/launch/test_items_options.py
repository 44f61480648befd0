"""Options of pytest and its plugins mean on ranks what they mean anywhere: one session a row."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from launch.conftest import environment, write_files

pytest.importorskip("torch")

FILE = """
import logging, os
import pytest

log = logging.getLogger("mine")


@pytest.fixture
def shown():
    log.warning("set up on %s", os.environ["RANK"])
    yield


@pytest.mark.ranks(2)
@pytest.mark.xdist_group("one")
def test_passes(rank, shown, tmp_path):
    (tmp_path / "file").write_text("x")
    log.warning("called on %s", rank.index)
    rank.barrier()


@pytest.mark.ranks(2)
def test_fails(rank):
    assert rank.index == 0


@pytest.mark.ranks([1, 2])
class TestSizes:
    def test_size(self, rank):
        pass


def test_plain():
    pass
"""
INI = "[pytest]\nmarkers = xdist_group: of xdist\n"
ALL = Counter(passed=4, failed=1)
NONE: Counter[str] = Counter()
NO_PLUGINS = [
    f"-pno:{name}"
    for name in ("logging", "junitxml", "cacheprovider", "xdist", "timeout", "cov", "faulthandler")
]
NO_TMP = Counter(passed=3, failed=1)
DESELECTED = ["--deselect", "test_it.py::test_fails"]
ROWS = {
    "each": (["-n2", "--dist=each"], Counter(passed=8, failed=2), []),
    "loadscope": (["-n2", "--dist=loadscope", "--maxfail=5"], ALL, []),
    "loadgroup": (["-n2", "--dist=loadgroup"], ALL, []),
    "worksteal": (["-n2", "--dist=worksteal"], ALL, []),
    "exitfirst": (["-x"], Counter(passed=1, failed=1), ["stopping after 1 failures"]),
    "ids": (
        ["test_it.py::TestSizes::test_size[ws=2]", "test_it.py::test_fails", *DESELECTED],
        Counter(passed=1),
        ["1 passed"],
    ),
    "collect-only": (["--collect-only"], NONE, ["<Function test_size[ws=2]>"]),
    "fixtures-per-test": (["--fixtures-per-test"], NONE, ["fixtures used by test_passes"]),
    "setup-plan": (["--setup-plan"], NONE, ["SETUP    F rank"]),
    "setup-only": (["--setup-only"], NONE, ["no tests ran"]),
    "without plugins": (NO_PLUGINS, ALL, []),
    "without capture": (["-pno:capture"], ALL, []),
    "without terminal": (["-pno:terminal"], ALL, []),
    "without tmpdir": (["-pno:tmpdir", "--deselect=test_it.py::test_passes"], NO_TMP, []),
    "live log": (
        ["--log-cli-level=INFO", "-k", "passes"],
        Counter(passed=1),
        ["[rank 1] WARNING", "called on 1", "set up on 0"],
    ),
    "log file": (["--log-file=log.txt", "-k", "passes"], Counter(passed=1), []),
}


def outcomes(session) -> Counter[str]:
    return Counter(
        row.outcome for row in session.rows if row.when == "call" or row.outcome == "failed"
    )


@pytest.mark.parametrize("name", ROWS)
def test_option(run_session, name):
    arguments, expected, texts = ROWS[name]
    if arguments[0] == "-n2" and find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    files = {"test_it.py": FILE, "pytest.ini": INI}
    quiet = ("-pno:randomly", "-pno:rerunfailures")  # the latter's thread costs a fresh start
    session = run_session(files, "--strict-markers", *quiet, *arguments)
    assert outcomes(session) == expected, session.output
    for text in texts:
        assert text in session.output, session.output
    assert "INTERNALERROR" not in session.output
    if expected["failed"]:
        failed = [row.text for row in session.rows if row.outcome == "failed"]
        assert all("rank 1 of 2 failed first" in text for text in failed), session.output


THREAD = """
import threading
started = threading.Event()
threading.Thread(target=lambda: (started.set(), threading.Event().wait()), daemon=True).start()
started.wait()
"""
WITH_THREAD = """
import threading
import pytest
import torch.distributed as dist

@pytest.mark.ranks(2)
def test_it(rank):
    # a fork would have lost the thread, and kept whatever lock it held
    assert threading.active_count() > 1
    dist.barrier()
    assert rank.index == 0
"""


def test_a_conftest_that_starts_a_thread_has_ranks_in_fresh_processes(run_session):
    from launch.conftest import RECORDER

    files = {"conftest.py": RECORDER + THREAD, "test_it.py": WITH_THREAD}
    session = run_session(files, "-pno:randomly", "-pno:rerunfailures")
    assert "rank 1 of 2 failed first: assert 1 == 0" in session.call("test_it").text


CRASH = """
import os
import pytest

@pytest.mark.ranks(2)
@pytest.mark.parametrize("number", range(4))
def test_on_ranks(rank, number):
    rank.barrier()

def test_ends_its_worker():
    os._exit(3)
"""


def test_a_worker_that_crashes_is_replaced_with_its_ranks(run_session):
    pytest.importorskip("xdist")
    session = run_session({"test_it.py": CRASH}, "-n2", "-pno:randomly")
    assert "crashed while running 'test_it.py::test_ends_its_worker'" in session.output
    passed = {row.id for row in session.rows if row.when == "call" and row.outcome == "passed"}
    assert len(passed) == 4, session.output


def test_last_failed_stepwise_and_junit(tmp_path):
    write_files(tmp_path, {"test_it.py": FILE, "pytest.ini": INI})

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-pno:randomly", "-pno:rerunfailures", *arguments],
            cwd=tmp_path,
            env={**environment(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        return done.stdout

    assert "1 failed, 4 passed" in run("--junitxml=junit.xml")
    cases = {
        case.get("name"): case
        for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    }
    assert set(cases) == {
        "test_passes",
        "test_fails",
        "test_size[ws=1]",
        "test_size[ws=2]",
        "test_plain",
    }
    failure = cases["test_fails"].find("failure")
    assert failure is not None
    assert "rank 1 of 2 failed first: assert 1 == 0" in failure.get("message", "")
    assert "reproduce: pytest 'test_it.py::test_fails'" in (failure.text or "")
    assert [name for name, case in cases.items() if case.find("failure") is not None] == [
        "test_fails"
    ]
    assert "run-last-failure: rerun previous 1 failure" in run("--lf")
    assert "1 failed, 1 passed" in run("--sw")
    again = run("--sw", "--sw-skip")
    assert "1 failed, 3 passed, 1 deselected" in again, again


SET_UP = """
import os
from pathlib import Path
import pytest


@pytest.fixture
def noted(rank, request):
    Path(os.environ["NOTES"], f"{request.node.name}-{rank.index}").write_text(str(os.getpid()))


@pytest.mark.ranks(2)
def test_one(noted):
    pass


@pytest.mark.ranks(2)
def test_two(noted):
    pass
"""


def test_ranks_that_only_set_up_serve_the_next_test(run_session, tmp_path):
    arguments = ("-pno:randomly", "-pno:rerunfailures", "--setup-only")
    session = run_session({"test_it.py": SET_UP}, *arguments, env={"NOTES": str(tmp_path)})
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(found) == 4, session.output
    assert [found[f"test_one-{rank}"] for rank in (0, 1)] == [
        found[f"test_two-{rank}"] for rank in (0, 1)
    ]
