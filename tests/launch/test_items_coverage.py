"""Lines that only ranks execute are covered, however the rank ends, with pytest-cov and coverage alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.conftest import environment, write_files

pytest.importorskip("torch")
pytest.importorskip("pytest_cov")
coverage = pytest.importorskip("coverage", minversion="7.10")

# Each line with a comment is executed by ranks alone; `never` by nobody.
SUBJECT = """
import os, signal, time


def by_rank(index):
    if index == 1:
        found = "one"  # passes
    elif index == 7:
        found = "seven"  # never
    else:
        found = "other"  # passes
    return found


def sleep_for_ever():
    while True:
        time.sleep(0.01)  # sleeps


def wait_for_nobody(rank):
    if rank.index == 0:
        import torch.distributed as dist
        dist.barrier()  # waits
    else:
        sleep_for_ever()


def leave():
    os._exit(3)  # exits


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)  # killed


def be_terminated():
    os.kill(os.getpid(), signal.SIGTERM)  # terminated
    time.sleep(60)


def fail():
    assert False  # fails


def tear_down():
    return "torn down"  # teardown


def called():
    return 1  # launched


def fork_and_wait():
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM  # reaped
"""

FILE = """
import pytest
import subject

@pytest.fixture(scope="module")
def wide():
    yield
    subject.tear_down()

@pytest.mark.ranks(2)
def test_passes(rank):
    assert subject.by_rank(rank.index)

@pytest.mark.ranks(2)
def test_wide(rank, wide):
    pass

@pytest.mark.ranks(2, timeout=1)
def test_hangs(rank):
    subject.wait_for_nobody(rank)

@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["leave", "be_killed", "be_terminated", "fail", "fork_and_wait"])
def test_ends(name, rank):
    if rank.index == 1:
        getattr(subject, name)()

def test_launch(launch):
    assert launch(subject.called, world_size=2) == [1, 1]
"""

FAILED = {
    "test_hangs": "timed out after 1 s",
    "test_ends[leave]": "rank 1 of 2 failed first: exited with code 3",
    "test_ends[be_killed]": "rank 1 of 2 failed first: died of SIGKILL",
    "test_ends[be_terminated]": "rank 1 of 2 failed first: died of SIGTERM",
    "test_ends[fail]": "rank 1 of 2 failed first",
}
EXPECTED = {word: word != "never" for word in re.findall(r"# (\w+)$", SUBJECT, re.MULTILINE)}


def covered(file: Path) -> dict[str, bool]:
    """Return which of the marked lines a JSON report counts as executed."""
    executed = set(json.loads(file.read_text())["files"]["subject.py"]["executed_lines"])
    found: dict[str, bool] = {}
    for number, line in enumerate(SUBJECT.splitlines(), start=1):
        if match := re.search(r"# (\w+)$", line):
            found[match[1]] = found.get(match[1], True) and number in executed
    return found


def run(folder: Path, *arguments: str, expected: int = 1) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**environment(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == expected, done.stdout
    return done.stdout


def texts(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    return {row["id"].partition("::")[2]: row["text"] for row in rows if row["outcome"] == "failed"}


PYTEST = ("pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:rerunfailures", "-q")
COV = ("--cov=subject", "--cov-report=json:report.json", "--cov-branch")


@pytest.fixture
def project(tmp_path):
    write_files(tmp_path, {"subject.py": SUBJECT, "test_it.py": FILE})
    return tmp_path


PATCHES = "[run]\nparallel = true\npatch = subprocess, _exit, fork\nsigterm = true\n"


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [((), ""), (("-n", "2"), PATCHES)],
    ids=["one process", "xdist and what users have configured by themselves"],
)
def test_pytest_cov_reports_the_lines_of_ranks(project, arguments, settings):
    (project / ".coveragerc").write_text(settings)
    output = run(project, *PYTEST, *COV, "--cov-context=test", *arguments)
    assert covered(project / "report.json") == EXPECTED, output
    found = texts(project)
    assert found.keys() == FAILED.keys(), output
    for name, text in FAILED.items():
        assert text in found[name], output
    data = coverage.CoverageData(basename=str(project / ".coverage"))
    data.read()
    contexts = data.measured_contexts()
    assert "test_it.py::test_passes|run" in contexts
    if not settings:  # coverage's own patches leave files of each process that ends
        assert [file for file in project.iterdir() if file.name.startswith(".coverage.")] == []


def test_coverage_run_measures_ranks_too(project):
    (project / ".coveragerc").write_text("[run]\nbranch = true\nsource = .\n")
    run(project, "coverage", "run", "-m", *PYTEST)
    run(project, "coverage", "json", "-o", "report.json", expected=0)
    assert covered(project / "report.json") == EXPECTED


def test_without_the_plugin_nothing_is_measured(project):
    run(project, *PYTEST, "-p", "no:cov", "-k", "passes", expected=0)
    assert [file for file in project.iterdir() if file.name.startswith(".coverage")] == []
