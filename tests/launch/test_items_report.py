"""The JSON report, JUnit XML and the times of phases: the same failures as on the terminal."""

from __future__ import annotations

import json
import re
import signal
import time
from xml.etree import ElementTree

import pytest

from launch.conftest import project

pytest.importorskip("torch")


class Run:
    def __init__(self, session, folder):
        self.session = session
        self.document = json.loads((folder / "deep" / "ranks.json").read_text())
        self.xml = ElementTree.parse(folder / "junit.xml").getroot()

    def item(self, name):
        (found,) = [one for one in self.document["items"] if one["node_id"].endswith(f"::{name}")]
        return found

    def case(self, name):
        (found,) = [one for one in self.xml.iter("testcase") if one.get("name") == name]
        return found


@pytest.fixture(scope="module")
def run(run_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    session = run_session(
        {"test_it.py": project("reported"), "test_plain.py": "def test_plain():\n    pass\n"},
        *("-p", "no:randomly", "-p", "no:rerunfailures", "--durations=0", "-vv"),
        *(f"--junitxml={folder / 'junit.xml'}", "-o", "junit_logging=all"),
        f"--ranks-report={folder / 'deep' / 'ranks.json'}",
    )
    return Run(session, folder)


def fixed(value):
    """Return a part of the document without what differs from run to run."""
    if isinstance(value, dict):
        return {key: "TIME" if isinstance(one, float) else fixed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [fixed(one) for one in value]
    if isinstance(value, str):
        value = re.sub(r"RuntimeError: \[.*?\] Connection closed by peer \S+\.", "PEER", value)
    return value


def rank_record(**changes):
    return {
        "status": "failed",
        "is_collateral": False,
        "phases": [
            {"when": "setup", "outcome": "passed", "seconds": "TIME"},
            {"when": "call", "outcome": "failed", "seconds": "TIME"},
            {"when": "teardown", "outcome": "passed", "seconds": "TIME"},
        ],
        "exit_code": None,
        "signal": None,
        "stacks": "",
        **changes,
    }


def test_the_record_of_a_failure_is_this(run):
    text = """\
rank 1 of 2 failed first (rank 0 was cut off in all_reduce): ValueError: boom

rank = <rank 1 of 2>

    def test_fails(rank):
        print("printed by", rank.index)
        if rank.index == 1:
>           raise ValueError("boom")
E           ValueError: boom

test_it.py:27: ValueError
collateral: rank 0 PEER
reproduce: pytest 'test_it.py::test_fails'"""
    record = run.item("test_fails")
    for rank, raised in zip(record["ranks"], ("RuntimeError", "ValueError: boom"), strict=True):
        assert raised in rank["traceback"]
        rank["traceback"] = "TRACEBACK"
    assert fixed(record) == {
        "node_id": "test_it.py::test_fails",
        "world_size": 2,
        "mesh": {},
        "backend": "gloo",
        "fidelity": "gloo",
        "verdict": "failed",
        "outcome": "failed",
        "when": "call",
        "seconds": {"setup": "TIME", "call": "TIME", "teardown": "TIME"},
        "root_rank": 1,
        "headline": text.splitlines()[0],
        "explanations": [],
        "text": text,
        "reproduce": "pytest 'test_it.py::test_fails'",
        "ranks": [
            rank_record(
                rank=0,
                headline="PEER",
                is_collateral=True,
                traceback="TRACEBACK",
                output=[{"name": "Captured stdout call", "text": "printed by 0\n"}],
            ),
            rank_record(
                rank=1,
                headline="ValueError: boom",
                traceback="TRACEBACK",
                output=[{"name": "Captured stdout call", "text": "printed by 1\n"}],
            ),
        ],
        "attempt": 1,
        "worker": None,
    }


def test_the_document_tells_of_the_session(run):
    document = {key: value for key, value in run.document.items() if key != "items"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", document.pop("started"))
    assert re.fullmatch(r"3\.\d+\.\d+\S*", document.pop("python"))
    assert document.pop("pytest") == pytest.__version__
    assert document.pop("pytest_ranks")
    assert document.pop("seconds") > 0
    assert document == {
        "schema_version": 1,
        "exit_status": 1,
        "ended": "finished",
        "reason": "",
        "unfinished": [],
        "counts": {
            "passed": 2,
            "failed": 2,
            "crashed": 1,
            "not_run": 1,
            "skipped": 1,
            "error": 1,
            "timed_out": 1,
        },
    }
    assert "- ranks report: /" in run.session.output


def test_it_has_every_item_on_ranks_and_no_other(run):
    assert [
        (one["node_id"].partition("::")[2], one["outcome"]) for one in run.document["items"]
    ] == [
        ("test_passes", "passed"),
        ("test_fails", "failed"),
        ("test_dies", "failed"),
        ("test_all_fail_alike", "failed"),
        ("test_skipped_by_mark", "skipped"),
        ("test_skips", "skipped"),
        ("test_slow", "passed"),
        ("test_bad_end", "failed"),
        ("test_hangs", "failed"),
    ]


def test_a_death_has_its_signal_and_last_words(run):
    record = run.item("test_dies")
    assert record["verdict"] == "crashed"
    died, other = record["ranks"][1], record["ranks"][0]
    assert (died["status"], died["signal"], died["exit_code"]) == ("crashed", "SIGKILL", None)
    assert died["output"] == [{"name": "Captured output", "text": "last words of 1"}]
    assert other["is_collateral"]
    assert "last output of rank 1:\n  last words of 1\n" in record["text"]


def test_a_hang_has_the_stacks_of_all_ranks(run):
    record = run.item("test_hangs")
    assert record["verdict"] == "timed_out"
    assert [one["status"] for one in record["ranks"]] == ["timed_out", "timed_out"]
    assert "in all_reduce" in record["ranks"][0]["stacks"]
    assert "in test_hangs" in record["ranks"][1]["stacks"]


def test_ranks_that_failed_alike_are_told_once(run):
    text = run.item("test_all_fail_alike")["text"]
    assert re.match(
        r"rank \d of 3 failed first \(ranks \d and \d failed the same way\): assert 1 == 2", text
    )
    assert text.count("assert 1 == 2") == 3  # headline, source, explanation


def test_an_item_that_no_rank_came_to_is_not_run(run):
    record = run.item("test_skipped_by_mark")
    assert (record["verdict"], record["when"], record["ranks"]) == ("not_run", "setup", [])
    assert record["headline"] == "Skipped: not today"


def test_a_mesh_is_named_in_order(run):
    assert list(run.item("test_passes")["mesh"].items()) == [("dp", 1), ("tp", 2)]


def test_an_error_in_teardown_belongs_there(run):
    record = run.item("test_bad_end")
    assert (record["verdict"], record["when"], record["root_rank"]) == ("error", "teardown", 1)


def test_the_time_of_a_phase_is_the_slowest_ranks(run):
    seconds = run.item("test_slow")["seconds"]
    at_least = {"setup": 0.2, "call": 0.3, "teardown": 0.4}
    assert all(seconds[when] >= least for when, least in at_least.items()), seconds
    phases = [one["phases"] for one in run.item("test_slow")["ranks"]]
    for number, when in enumerate(at_least):
        assert seconds[when] == max(phase[number]["seconds"] for phase in phases)
    shown = dict(re.findall(r"^([\d.]+)s (\w+) +test_it.py::test_slow$", run.session.output, re.M))
    assert sorted(shown.values()) == ["call", "setup", "teardown"], run.session.output
    assert run.item("test_hangs")["seconds"]["call"] >= 1


# ---- JUnit


def test_junit_has_the_text_of_a_failure(run):
    (failure,) = run.case("test_fails").iter("failure")
    headline = "rank 1 of 2 failed first (rank 0 was cut off in all_reduce): ValueError: boom"
    assert failure.get("message") == headline
    assert failure.text == run.item("test_fails")["text"]
    (failure,) = run.case("test_hangs").iter("failure")
    assert "stacks of rank 0:" in failure.text
    (error,) = run.case("test_bad_end").iter("error")
    assert error.get("message").startswith('failed on teardown with "rank 1 of 2 failed first')


def test_junit_names_the_rank_of_each_output(run):
    out = run.case("test_fails").find("system-out").text
    assert "--- Captured stdout call (rank 0) ---\nprinted by 0\n" in out
    assert "--- Captured stdout call (rank 1) ---\nprinted by 1\n" in out
    assert "--- Captured output (rank 1) ---\nlast words of 1" in (
        run.case("test_dies").find("system-out").text
    )


def test_junit_has_world_size_verdict_and_root_rank(run):
    def properties(name):
        found = run.case(name).iter("property")
        return {one.get("name"): one.get("value") for one in found}

    told = {"fidelity": "gloo", "world_size": "2"}
    assert properties("test_passes") == {**told, "verdict": "passed", "answer": "42"}
    assert properties("test_fails") == {**told, "verdict": "failed", "root_rank": "1"}
    assert properties("test_dies") == {**told, "verdict": "crashed", "root_rank": "1"}


def test_junit_time_is_that_of_the_phases(run):
    whole = sum(run.item("test_slow")["seconds"].values())
    assert float(run.case("test_slow").get("time")) == pytest.approx(whole, abs=0.01)


def test_the_terminal_names_ranks_in_titles_alone(run):
    assert "--- Captured stdout call (rank 0) ---\nprinted" not in run.session.output
    assert re.search(r"-+ Captured stdout call \(rank 0\) -+\nprinted by 0\n", run.session.output)


# ---- other sessions


def test_xdist_and_reruns_merge_into_one_document(run_session, tmp_path):
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_rerunfailures")
    path = tmp_path / "ranks.json"
    text = "\n".join(
        f"""
@pytest.mark.ranks(2)
def test_{name}(rank):
    assert rank.index != {bad}
"""
        for name, bad in (("a", 5), ("b", 1), ("c", 6))
    )
    session = run_session(
        {"test_it.py": f"import pytest\n{text}"},
        *("-n", "2", "--reruns", "1", f"--junitxml={tmp_path / 'junit.xml'}"),
        env={"RANKS_REPORT": str(path)},
    )
    assert session.returncode == 1, session.output
    items = json.loads(path.read_text())["items"]
    assert sorted((one["node_id"][-1], one["verdict"], one["attempt"]) for one in items) == [
        ("a", "passed", 1),
        ("b", "failed", 1),
        ("b", "failed", 2),
        ("c", "passed", 1),
    ]
    assert {one["worker"] for one in items} <= {"gw0", "gw1"}
    xml = ElementTree.parse(tmp_path / "junit.xml").getroot()
    (failure,) = xml.iter("failure")
    assert failure.text.startswith("rank 1 of 2 failed first: ")


LATE = """
import pytest

@pytest.fixture(scope="module")
def wide():
    yield
    raise ValueError("at the end")

@pytest.mark.ranks(2)
def test_a(wide):
    pass

def test_plain():
    assert False

@pytest.mark.ranks(2)
def test_never_run(wide):
    pass
"""


def test_a_teardown_after_all_reports_has_a_record_of_its_own(run_session, tmp_path):
    path = tmp_path / "ranks.json"
    session = run_session({"test_it.py": LATE}, "-x", "-p", "no:randomly", f"--ranks-report={path}")
    assert session.returncode == 1, session.output
    passed, late = json.loads(path.read_text())["items"]
    assert (passed["verdict"], passed["when"], passed["attempt"]) == ("passed", "call", 1)
    assert (late["verdict"], late["when"], late["attempt"]) == ("error", "teardown", 1)
    assert (late["node_id"], late["ranks"]) == ("test_it.py::test_a", [])
    assert late["headline"].startswith("ranks 0 and 1: "), late
    assert "ValueError: at the end" in late["text"]


def test_an_interrupted_session_has_a_document_too(start_session, tmp_path):
    path, begun = tmp_path / "ranks.json", tmp_path / "begun"
    process = start_session(
        f"""
import pathlib, time
import pytest

@pytest.mark.ranks(2)
def test_a(rank):
    pass

@pytest.mark.ranks(2)
def test_b(rank):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(1000)
""",
        f"--ranks-report={path}",
    )
    end = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=180) == 2
    document = json.loads(path.read_text())
    assert (document["ended"], document["reason"]) == (
        "interrupted",
        "KeyboardInterrupt: while test_it.py::test_b ran on 2 ranks",
    )
    assert document["exit_status"] == 2
    assert document["unfinished"] == ["test_it.py::test_b"]
    assert [one["node_id"] for one in document["items"]] == ["test_it.py::test_a"]


def test_the_folder_of_the_document_has_to_be_possible(run_session, tmp_path):
    (tmp_path / "file").touch()
    session = run_session({"test_it.py": ""}, f"--ranks-report={tmp_path}/file/ranks.json")
    assert session.returncode == 4
    assert (
        f"--ranks-report: found '{tmp_path}/file/ranks.json', expected a path in a folder that is "
        "there or can be made ("
    ) in session.output


def test_a_folder_is_no_place_for_the_document(run_session, tmp_path):
    session = run_session({"test_it.py": ""}, f"--ranks-report={tmp_path}")
    assert session.returncode == 4
    assert (
        f"--ranks-report: found the folder {str(tmp_path)!r}, expected the path of a file; "
        f"write for example --ranks-report={tmp_path}/ranks.json"
    ) in session.output
