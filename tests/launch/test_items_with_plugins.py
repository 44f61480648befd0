"""Tests on ranks under xdist, rerunfailures, randomly, timeout, and pytest's own options."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

FILE = """
import os, time, warnings
import pytest, torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def wide():
    return object()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("number", range(6))
def test_wide(number, wide, rank):
    dist.barrier()


@pytest.mark.ranks([1, 2])
def test_sizes(rank):
    dist.barrier()


@pytest.mark.ranks(2)
def test_second_time(rank):
    rank.barrier()
    with open(f"{os.environ['RECORDED']}.{rank.index}", "a") as file:
        file.write("x")
        file.flush()
        assert os.fstat(file.fileno()).st_size > 1


@pytest.mark.ranks(2)
def test_worker(rank, worker_id):
    assert worker_id == os.environ.get("PYTEST_XDIST_WORKER", "master")


@pytest.mark.ranks(2)
def test_warns(rank):
    warnings.warn("said on ranks", FutureWarning)


@pytest.mark.ranks(2)
@pytest.mark.timeout(4)
def test_timeout_of_another_plugin(rank):
    time.sleep(1000)


def test_plain():
    pass


class TestClass:
    @pytest.mark.ranks(2)
    def test_method(self, rank, tmp_path, capsys):
        print("x")
        assert capsys.readouterr().out == "x\\n"
"""


def outcomes(session):
    found = {}
    for row in session.rows:
        if row.when == "call" or row.outcome != "passed":
            found.setdefault(row.id.partition("::")[2], []).append(row.outcome)
    return found


EXPECTED = {
    **{f"test_wide[{number}]": ["passed"] for number in range(6)},
    "test_sizes[ws=1]": ["passed"],
    "test_sizes[ws=2]": ["passed"],
    "test_second_time": ["rerun", "passed"],
    "test_worker": ["passed"],
    "test_warns": ["passed"],
    "test_timeout_of_another_plugin": ["failed"],
    "test_plain": ["passed"],
    "TestClass::test_method": ["passed"],
}


@pytest.fixture(scope="module")
def under_xdist(run_session):
    for plugin in ("xdist", "pytest_rerunfailures", "pytest_timeout"):
        pytest.importorskip(plugin)
    return run_session(
        {"test_it.py": FILE},
        *("-n", "2", "--reruns", "1", "--only-rerun", "assert", "--junitxml=junit.xml"),
        "--durations=3",
    )


def test_xdist_and_reruns(under_xdist):
    assert outcomes(under_xdist) == EXPECTED, under_xdist.output
    assert "said on ranks" in under_xdist.output
    assert "slowest 3 durations" in under_xdist.output


def test_our_deadline_comes_before_that_of_pytest_timeout(under_xdist):
    text = under_xdist.call("test_timeout_of_another_plugin").text
    assert "timed out after 3.2 s: ranks 0 and 1 were in test_timeout_of_another" in text


def test_the_report_of_a_worker_keeps_its_first_and_last_line(under_xdist):
    last = under_xdist.call("test_timeout_of_another_plugin").text.splitlines()[-1]
    assert last == "reproduce: pytest 'test_it.py::test_timeout_of_another_plugin'"


def test_random_order_import_mode_and_warnings_as_errors(run_session):
    pytest.importorskip("pytest_randomly")
    session = run_session(
        {"test_it.py": FILE},
        *("-p", "randomly", "-p", "no:rerunfailures"),
        *("--import-mode=importlib", "-W", "error", "-k", "not second and not another"),
    )
    expected = {
        name: ["failed"] if name == "test_warns" else found
        for name, found in EXPECTED.items()
        if "second" not in name and "another" not in name
    }
    assert outcomes(session) == expected, session.output
    assert "FutureWarning: said on ranks" in session.call("test_warns").text


def test_setup_is_shown_by_the_controller_alone(run_session):
    session = run_session(
        {"test_it.py": FILE}, "--setup-show", "-p", "no:randomly", "-k", "TestClass or plain"
    )
    expected = {"test_plain": ["passed"], "TestClass::test_method": ["passed"]}
    assert outcomes(session) == expected, session.output
    assert "test_it.py::TestClass::test_method" in session.output


def test_a_rank_without_a_mark_is_one_sentence(run_session):
    session = run_session({"test_it.py": "def test_it(rank): pass\n"}, "-p", "no:randomly")
    assert session.call("test_it").text == (
        "the fixture 'rank' needs a mark that says how many ranks: @pytest.mark.ranks(2)."
    )


def test_no_rank_is_started_to_collect(run_session):
    session = run_session({"test_it.py": FILE}, "--collect-only", "-q")
    assert "test_it.py::test_sizes[ws=2]" in session.output
    assert "no tests ran" not in session.output
