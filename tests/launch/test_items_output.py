"""What ranks write is shown at once without capture: whole lines, each with its rank."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

FILE = """
import ctypes, os, sys
import pytest

C = ctypes.CDLL(None)


@pytest.mark.ranks(3)
def test_lines(rank):
    for number in range(200):
        print(f"line {number} of {rank.index} ", end="")
        print("goes on")
        if number % 50 == 0:
            rank.barrier()
    C.printf(b"from C on %d\\n", rank.index)
    C.printf(b"C without an end")
    C.fflush(None)
    os.write(2, b"\\nto the descriptor\\n")
    sys.stderr.write("no newline at the end")


@pytest.mark.ranks(3)
def test_killed(rank):
    print(f"last words of {rank.index}")
    if rank.index == 1:
        os.kill(os.getpid(), 9)
    rank.barrier()


def test_plain():
    print("of the controller")
"""


@pytest.mark.parametrize("option", ["-s", "--capture=tee-sys"])
def test_lines_are_whole_and_have_their_rank_in_front(run_session, option):
    arguments = (option, "-v", "-p", "no:randomly", "-p", "no:rerunfailures")
    session = run_session({"test_it.py": FILE}, *arguments)
    lines = session.output.splitlines()
    for rank in range(3):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        numbered = [line for line in mine if line.endswith("goes on")]
        assert numbered == [f"[rank {rank}] line {n} of {rank} goes on" for n in range(200)]
        assert f"[rank {rank}] no newline at the end" in mine
        if option == "-s":  # the other leaves C to the terminal too, but it does not tee it
            assert f"[rank {rank}] from C on {rank}" in mine
            assert f"[rank {rank}] C without an end" in mine
            assert f"[rank {rank}] to the descriptor" in mine
    assert "[rank 1] last words of 1" in lines
    assert not any("of the controller" in line for line in lines if line.startswith("[rank"))
    assert session.call("test_lines").outcome == "passed"
    killed = session.call("test_killed")
    assert "died of SIGKILL" in killed.text
    assert "goes on" not in str(killed.sections)  # what another test wrote before


MUCH = """
import threading
import pytest

LINES = 30_000  # of 100 characters


def write(what):
    for number in range(LINES):
        print(f"{what} {number:<89}")


@pytest.fixture
def wordy(rank):
    if rank.index == 1:
        write("in setup:")


@pytest.mark.ranks(2)
def test_much(rank, wordy):
    if rank.index == 1:
        write("in call: ")
    assert rank.index == 0


class Del:
    def __del__(self):
        raise ValueError("in del")


def fail_in_a_thread(name):
    thread = threading.Thread(target=lambda: 1 / 0, name=name)
    thread.start()
    thread.join()


@pytest.mark.ranks(2)
def test_beside(rank):
    Del()
    if rank.index == 1:
        fail_in_a_thread("mine")


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("error")
def test_error(rank):
    if rank.index == 1:
        fail_in_a_thread("mine")


@pytest.mark.ranks(2, fidelity="threads")
def test_beside_threads(rank):
    if rank.index == 1:
        fail_in_a_thread("of a process")


@pytest.mark.ranks(2, fidelity="threads")
def test_threads(rank):
    if rank.index == 1:
        write("in call: ")
    assert rank.index == 0
"""


@pytest.fixture(scope="module")
def much(run_session, tmp_path_factory):
    """Return the session, its JSON report and its JUnit XML."""
    folder = tmp_path_factory.mktemp("reports")
    report, junit = folder / "ranks.json", folder / "junit.xml"
    places = (f"--ranks-report={report}", f"--junitxml={junit}", "-o", "junit_logging=all")
    session = run_session({"test_it.py": MUCH}, "-p", "no:randomly", *places)
    return session, report, junit


def test_warnings_about_threads_and_finalizers_name_their_ranks(much):
    session, _, _ = much
    assert session.call("test_beside").outcome == "passed"
    summary = session.output.partition("warnings summary")[2].partition("short test summary")[0]
    said = summary.splitlines()
    lines = [line for line in said if ".py:" in line and "ExceptionWarning: " in line]
    told = [line.partition("ExceptionWarning: ")[2].partition(" at 0x")[0] for line in lines]
    assert sorted(told) == [
        "Exception in thread of a process",  # of all ranks, so nobody knows of which
        "rank 1: Exception in thread mine",
        "ranks 0 and 1: Exception ignored in: <function Del.__del__",
    ]
    row = session.call("test_error")
    assert row.text.startswith("rank 1 of 2 failed first: pytest.PytestUnhandledThreadException")
    assert "pytest_ranks/" not in row.text


def test_only_both_ends_of_much_output_are_kept(much):
    session, report, junit = much
    mark = "\n[... 2900100 characters left out ...]\n"
    sections = dict(session.call("test_much").sections)
    for phase, what in (("setup", "in setup:"), ("call", "in call: ")):
        first, found, last = sections[f"Captured stdout {phase} (rank 1)"].partition(mark)
        assert found
        assert (len(first), len(last)) == (20_000, 79_900)
        assert first.startswith(f"{what} 0 ")
        assert last.splitlines()[-1].split()[-1] == "29999"
    (on_threads,) = [text for _, text in session.call("test_threads").sections]
    assert on_threads.count(mark) == 1
    assert len(session.output) < 500_000
    assert session.output.count(mark) == 3
    items = json.loads(report.read_text())["items"]
    output = {one["name"]: one["text"] for one in items[0]["ranks"][1]["output"]}
    assert output["Captured stdout call"] == sections["Captured stdout call (rank 1)"]
    assert junit.read_text().count(mark) == 3
    assert junit.stat().st_size < 500_000


def test_captured_output_is_not_shown(run_session):
    arguments = ("-k", "lines", "-p", "no:randomly", "-p", "no:rerunfailures")
    session = run_session({"test_it.py": FILE}, *arguments)
    assert "[rank" not in session.output, session.output
    sections = dict(session.of("test_lines")[-1].sections)
    assert sections, session.output
