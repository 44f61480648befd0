"""What is made of the reports of ranks, without ranks: runs written by hand, a real item."""

from __future__ import annotations

import pytest

from pytest_ranks.launch import reports
from pytest_ranks.launch.messages import Finished, Phase
from pytest_ranks.launch.outcome import ExpectedEnd
from pytest_ranks.launch.pool import RankRun
from pytest_ranks.launch.reports import Context


@pytest.fixture
def phase(request):
    """Make the message of one phase as a rank sends it."""
    item = request.node

    def make(when, outcome="passed", *, longrepr=None, at=0.0):
        report = pytest.TestReport(
            item.nodeid, item.location, {}, outcome=outcome, longrepr=longrepr, when=when
        )
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        return Phase(when=when, outcome=outcome, was_xfail=None, report=data, at=at)

    return make


@pytest.fixture
def passed(phase):
    return Finished(phases=(phase("setup"), phase("call"), phase("teardown")))


@pytest.fixture
def failed(phase):
    call = phase("call", "failed", longrepr="boom")
    return Finished(phases=(phase("setup"), call, phase("teardown")))


def text_of(decided):
    return str(decided.longrepr).splitlines()


def test_explanations_stand_right_below_the_headline(request, passed, failed):
    runs = [
        RankRun(rank=0, messages=[passed], done=True),
        RankRun(rank=1, messages=[failed], done=True),
    ]
    context = Context(timeout=1, explanations=["first:\nof two lines", "second"])
    decided = reports.decide(request.node, runs, context)
    assert text_of(decided)[:4] == [
        "rank 1 of 2 failed first: boom",
        "first:",
        "of two lines",
        "second",
    ]
    assert decided.longrepr.reprcrash.message == "rank 1 of 2 failed first: boom"


def test_a_declared_death_that_did_not_happen_is_named(request, passed):
    runs = [RankRun(rank=rank, messages=[passed], done=True) for rank in (0, 1)]
    ends = {1: ExpectedEnd(text="die of SIGKILL", statuses=frozenset({-9}))}
    decided = reports.decide(request.node, runs, Context(timeout=1, expected_ends=ends))
    assert decided.verdict == "failed"
    first = "rank 1 was expected to die of SIGKILL, it passed"
    assert text_of(decided)[0] == first


def test_a_declared_death_leaves_the_word_to_the_others(request, passed):
    runs = [
        RankRun(rank=0, crashed=True, status=-9),
        RankRun(rank=1, messages=[passed], done=True),
    ]
    ends = {0: ExpectedEnd(text="SIGKILL", statuses=frozenset({-9}))}
    decided = reports.decide(request.node, runs, Context(timeout=1, expected_ends=ends))
    assert (decided.verdict, decided.longrepr) == ("passed", None)
