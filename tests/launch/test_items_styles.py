"""Every style of writing a test runs on ranks: subtests, TestCase, xunit classes, async, beside doctests."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytest.importorskip("torch")

HAS_SUBTESTS = find_spec("_pytest.subtests") is not None  # of pytest 9
FILE = """
import unittest
import pytest
import torch.distributed as dist


def documented():
    '''
    >>> 1 + 1
    2
    '''


@pytest.mark.ranks(2)
class TestCaseOfUnittest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.index = dist.get_rank()

    def setUp(self):
        self.addCleanup(dist.barrier)

    def test_unit(self):
        self.assertEqual(self.index, dist.get_rank())

    def test_unit_fails(self):
        self.assertEqual(self.index, 0)

    @unittest.skip("not now")
    def test_unit_skipped(self):
        raise AssertionError


@pytest.mark.ranks(2)
class TestXunit:
    @classmethod
    def setup_class(cls):
        cls.log = ["class"]

    def setup_method(self, method):
        self.log.append(method.__name__)

    def teardown_method(self):
        self.log.append("torn down")

    def test_first(self, rank):
        assert self.log == ["class", "test_first"]

    def test_second(self, rank):
        assert self.log == ["class", "test_first", "torn down", "test_second"]


def setup_module(module):
    module.value = [dist.get_rank() if dist.is_initialized() else None]


@pytest.mark.ranks(2)
def test_setup_module(rank):
    assert value == [rank.index]


def test_plain():
    assert value == [None]


try:
    import anyio
except ImportError:
    pass
else:
    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.mark.ranks(2)
    @pytest.mark.anyio
    async def test_async(rank, anyio_backend):
        await anyio.sleep(0.001)
        rank.barrier()
        assert rank.index == 0
"""
SUBTESTS = """
import unittest
import pytest


@pytest.mark.ranks(2)
def test_some_fail(rank, subtests):
    for number in range(3):
        with subtests.test("case", number=number):
            assert number != 0, "on all"
            assert (number, rank.index) != (1, 1), "on one"
        rank.barrier()


@pytest.mark.ranks(2)
def test_all_pass(rank, subtests):
    with subtests.test("fine"):
        rank.barrier()


@pytest.mark.ranks(2)
def test_dies_later(rank, subtests):
    import os
    with subtests.test("before"):
        assert rank.index == 0
    rank.barrier()
    os._exit(5)


@pytest.mark.ranks(2)
class TestOfUnittest(unittest.TestCase):
    def test_sub(self):
        for number in range(2):
            with self.subTest(number=number):
                self.assertEqual(number, 0)
"""
QUIET = ("-p", "no:randomly", "-p", "no:rerunfailures")


def test_styles(run_session):
    session = run_session({"test_it.py": FILE}, *QUIET, "--doctest-modules", "--strict-markers")
    outcomes = {
        row.id.rpartition("::")[2]: row.outcome
        for row in session.rows
        if row.when == "call" or row.outcome != "passed"
    }
    expected = {
        "test_it.documented": "passed",
        "test_unit": "passed",
        "test_unit_fails": "failed",
        "test_unit_skipped": "skipped",
        "test_first": "passed",
        "test_second": "passed",
        "test_setup_module": "passed",
        "test_plain": "passed",
    }
    if find_spec("anyio"):
        expected["test_async"] = "failed"
        assert "rank 1 of 2 failed first: assert 1 == 0" in session.call("test_async").text
    assert outcomes == expected, session.output
    text = session.call("test_unit_fails").text
    assert text.startswith("rank 1 of 2 failed first")
    assert "AssertionError: 1 != 0" in text


@pytest.mark.skipif(not HAS_SUBTESTS, reason="needs the subtests of pytest 9")
@pytest.mark.parametrize("distribution", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_failed_subtests_of_ranks_are_never_lost(run_session, distribution):
    if distribution and find_spec("xdist") is None:
        pytest.skip("needs pytest-xdist")
    session = run_session({"test_it.py": SUBTESTS}, *QUIET, "-rA", *distribution)
    lines = session.output.splitlines()

    quote = "'" if distribution else ""  # pytest quotes once more for each process on the way

    def has(start: str, name: str) -> bool:
        wanted = f"{start} test_it.py::{name} - ".replace("'", quote)
        return any(line.startswith(wanted) for line in lines)

    assert has("SUBFAILED[case] (number='0')", "test_some_fail"), session.output
    assert has("SUBFAILED[case] (number='1', rank='1')", "test_some_fail"), session.output
    assert not any("number='2'" in line for line in lines if line.startswith("SUBFAILED"))
    assert has("FAILED", "test_some_fail"), session.output
    assert "contains 2 failed subtests" in session.output
    assert session.of("test_all_pass")[-1].outcome == "passed"
    assert "PASSED test_it.py::test_all_pass" in lines
    assert has("SUBFAILED[before] (rank='1')", "test_dies_later"), session.output
    died = [row.text for row in session.of("test_dies_later") if "exited with code 5" in row.text]
    assert died, session.output
    assert has("SUBFAILED(number='1')", "TestOfUnittest::test_sub"), session.output
    assert session.returncode == 1
