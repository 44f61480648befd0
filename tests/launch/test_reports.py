"""What is made of the reports of ranks, without ranks: runs written by hand, a real item."""

from __future__ import annotations

import os
import shlex

import pytest

from pytest_ranks.launch.outcome import ExpectedEnd
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.reporting import reports
from pytest_ranks.launch.reporting.reports import Context
from pytest_ranks.launch.wire import Finished, Phase


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
    return str(decided.of("call").longrepr).splitlines()


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
    assert decided.of("call").longrepr.reprcrash.message == "rank 1 of 2 failed first: boom"


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
    assert (decided.verdict, decided.of("call").longrepr) == ("passed", None)


def raising(phase, text, *, at, when="call"):
    """Make the reports of a rank that failed in one phase."""
    phases = [phase("setup")]
    if when == "setup":
        phases = []
    elif when == "teardown":
        phases.append(phase("call"))
    return [*phases, phase(when, "failed", longrepr=text, at=at)]


def finished(*phases):
    return [Finished(phases=phases)]


def test_ranks_that_failed_alike_are_told_once(request, phase):
    texts = [
        "no <A at 0x7f01>",
        "no <A at 0x7f02>",
        "other",
        "other",
        "Connection closed by peer [127.0.0.1]:1.",
        "Connection closed by peer [127.0.0.1]:2.",
    ]
    runs = [
        RankRun(
            rank=rank,
            messages=finished(*raising(phase, text, at=float(rank)), phase("teardown")),
            done=True,
        )
        for rank, text in enumerate(texts)
    ]
    decided = reports.decide(request.node, runs, Context(timeout=1))
    assert text_of(decided) == [
        "rank 0 of 6 failed first (rank 1 failed the same way; ranks 2 and 3 failed too; "
        "ranks 4 and 5 were cut off by that): no <A at 0x7f01>",
        "collateral: ranks 4 and 5 Connection closed by peer [127.0.0.1]:1.",
        "ranks 2 and 3 failed too: other",
        f"reproduce: pytest '{request.node.nodeid}'",
    ]


def test_ranks_that_failed_in_their_own_way_show_their_tracebacks(request, phase):
    texts = [
        "first",
        *(f"own {rank}\nwith a place" for rank in range(1, 11)),
        "own 10\nwith a place",
    ]
    runs = [
        RankRun(rank=rank, messages=finished(*raising(phase, text, at=float(rank))), done=True)
        for rank, text in enumerate(texts)
    ]
    text = "\n".join(text_of(reports.decide(request.node, runs, Context(timeout=1))))
    for rank in range(1, 9):
        assert f"\n\ntraceback of rank {rank}:\nown {rank}\nwith a place\n" in text
    assert text.count("with a place") == 8
    assert "\nleft out: the tracebacks of ranks 9, 10 and 11\n" in text


def test_a_teardown_that_failed_after_the_call_is_an_error_of_its_own(request, phase, passed):
    both = (*raising(phase, "in call", at=1), phase("teardown", "failed", longrepr="after", at=2))
    runs = [
        RankRun(rank=0, messages=[passed], done=True),
        RankRun(rank=1, messages=finished(*both), done=True),
    ]
    decided = reports.decide(request.node, runs, Context(timeout=1))
    assert text_of(decided)[0] == "rank 1 of 2 failed first: in call"
    assert "rank 1 then failed in teardown too: after" in text_of(decided)
    assert decided.of("teardown").outcome == "failed"
    assert decided.of("teardown").text == "rank 1 of 2 failed first: after"


def test_a_rank_that_failed_and_then_died_did_so_in_this_order(request, phase):
    said = phase("call", "failed", longrepr="first", at=1.0)
    runs = [RankRun(rank=0, messages=[said], crashed=True, status=-11, at=5.0)]
    decided = reports.decide(request.node, runs, Context(timeout=1))
    assert text_of(decided)[0] == "rank 0 of 1 failed: first"
    assert "rank 0 then died of SIGSEGV without a report" in text_of(decided)


@pytest.mark.parametrize(
    ("death_at", "first"),
    [
        (1.0, "died of SIGKILL without a report"),
        (1.9, "died of SIGKILL without a report"),
        (9.0, "x"),
    ],
)
def test_a_death_may_be_seen_late_but_not_as_late_as_this(request, phase, death_at, first):
    runs = [
        RankRun(rank=0, crashed=True, status=-9, at=death_at),
        RankRun(rank=1, messages=raising(phase, "x", at=1.0), done=True),
    ]
    decided = reports.decide(request.node, runs, Context(timeout=1))
    assert text_of(decided)[0].endswith(f": {first}")


def test_what_a_dead_rank_wrote_last_is_told_without_the_rest(request, passed):
    output = "\n".join(f"line {number}" for number in range(9))
    runs = [
        RankRun(rank=0, messages=[passed], done=True),
        RankRun(rank=1, crashed=True, status=-9, output=output),
    ]
    decided = reports.decide(request.node, runs, Context(timeout=1))
    lines = text_of(decided)
    start = lines.index("last output of rank 1:")
    assert lines[start + 1 : start + 6] == [f"  line {number}" for number in range(4, 9)]
    assert ("Captured output (rank 1)", output) in decided.sections


@pytest.mark.parametrize("name", ["plain", "it's", 'say "it"', "back\\slash", "a b[$x]"])
def test_the_line_to_reproduce_is_one_word_for_a_shell(request, name):
    class Item:
        nodeid = f"test_a.py::test_x[{name}]"
        config = request.config

    line = reports.reproduce(Item())
    words = shlex.split(line)
    assert words[:2] == ["reproduce:", "pytest"]
    here, there = request.config.invocation_params.dir, request.config.rootpath
    assert words[2:] == [os.path.relpath(there, here).removeprefix(".").lstrip("/") + Item.nodeid]


def test_a_headline_is_short_however_long_the_message_is() -> None:
    from pytest_ranks.launch.reporting.item_failures import MOST_CHARACTERS, _headline

    assert _headline("ValueError: short") == "ValueError: short"
    long = _headline("ValueError: " + "y" * 3_000_000)
    assert long.startswith("ValueError: yyy")
    assert long.endswith(f"y [... {3_000_012 - MOST_CHARACTERS} characters]")
    assert len(long) < MOST_CHARACTERS + 40
