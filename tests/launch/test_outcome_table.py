"""Every combination of what two and three ranks can make of an item, against the design's sentence.

The oracle is that sentence, read from left to right: "crash or missing report, error in setup or
teardown, failed, timed out, ranks disagree, strict xpass, xpassed, xfailed on all, skipped on all,
passed". The combinations go in as what ranks send and how their processes ended.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, permutations, product

import pytest

from pytest_ranks.launch.outcome import ExpectedEnd, result_of, verdict
from pytest_ranks.launch.rank_run import RankRun
from pytest_ranks.launch.wire import Finished, Phase, Raised

KILLED = ExpectedEnd(text="die of SIGKILL", statuses=frozenset({-9}))
GREEN = {"passed", "xpassed", "xfailed", "skipped"}


def phase(when, outcome="passed", *, was_xfail=None, longrepr=None):
    return Phase(
        when=when, outcome=outcome, was_xfail=was_xfail, report={"longrepr": longrepr}, at=0.0
    )


SETUP, CALL, TEARDOWN = phase("setup"), phase("call"), phase("teardown")
FAILED_CALL = phase("call", "failed")
BAD_SETUP, BAD_TEARDOWN = phase("setup", "failed"), phase("teardown", "failed")


def finished(*phases, **changes):
    return {"messages": [Finished(phases=phases, **changes)], "done": True}


# label -> how the rank's run ended, and how it had to
STATES = {
    "passed": finished(SETUP, CALL, TEARDOWN),
    "failed": finished(SETUP, FAILED_CALL, TEARDOWN),
    "failed, streamed": {
        "messages": [FAILED_CALL, Finished(phases=(SETUP, TEARDOWN))],
        "done": True,
    },
    "skipped": finished(SETUP, phase("call", "skipped"), TEARDOWN),
    "skipped in setup": finished(phase("setup", "skipped"), TEARDOWN),
    "xfailed": finished(SETUP, phase("call", "skipped", was_xfail="why"), TEARDOWN),
    "xpassed": finished(SETUP, phase("call", was_xfail="why"), TEARDOWN),
    "strict xpass": finished(
        SETUP, phase("call", "failed", longrepr="[XPASS(strict)] why"), TEARDOWN
    ),
    "error in setup": finished(BAD_SETUP, TEARDOWN),
    "error in teardown": finished(SETUP, CALL, BAD_TEARDOWN),
    "failed, error in teardown": finished(SETUP, FAILED_CALL, BAD_TEARDOWN),
    "skipped, error in teardown": finished(SETUP, phase("call", "skipped"), BAD_TEARDOWN),
    "crashed": {"crashed": True, "status": -11},
    "crashed after a pass": {"messages": [SETUP, CALL], "crashed": True, "status": 0},
    "raised": {"messages": [Raised(headline="x", traceback="", at=0.0)], "done": True},
    "timed out": {"stopped": "deadline"},
    "abandoned": {"stopped": "abandoned"},
    "stopped": {"stopped": "collateral"},
    "missing": finished(missing="no such item"),
    "one item too many": finished(SETUP, CALL, TEARDOWN, SETUP, CALL, TEARDOWN),
    "late error": finished(SETUP, CALL, TEARDOWN, errors=("after the report",)),
    "silent": finished(),
    "died as declared": {"crashed": True, "status": -9, "expected": True},
    "died another way": {"crashed": True, "status": -11, "expected": True},
    "should have died": {**finished(SETUP, CALL, TEARDOWN), "expected": True},
}

# What the labels mean to the sentence. A rank that we stopped because of another's failure counts
# for nothing; where nobody failed, its report is missing. A declared death says nothing.
CRASHED = {
    "crashed",
    "crashed after a pass",
    "raised",
    "missing",
    "one item too many",
    "late error",
    "silent",
    "died another way",
}
ERROR = {
    "error in setup",
    "error in teardown",
    "failed, error in teardown",
    "skipped, error in teardown",
}
FAILED = {"failed", "failed, streamed", "should have died"}
TIMED_OUT = {"timed out", "abandoned"}
SAME = {"skipped in setup": "skipped"}


def sentence(labels):
    """Return the verdict as the design's sentence gives it."""
    said = {SAME.get(label, label) for label in labels} - {"died as declared"}
    for word, labels_of_word in (
        ("crashed", CRASHED),
        ("error", ERROR),
        ("failed", FAILED),
        ("timed_out", TIMED_OUT),
        ("crashed", {"stopped"}),
    ):
        if said & labels_of_word:
            return word
    if len(said) > 1:
        return "disagree"
    for word in ("strict xpass", "xpassed", "xfailed", "skipped"):
        if said == {word}:
            return word.replace(" ", "_")
    assert said <= {"passed"}
    return "passed"


def result(rank, label):
    run = dict(STATES[label])
    expected_end = KILLED if run.pop("expected", False) else None
    return result_of(RankRun(rank=rank, **run), expected_end=expected_end)


def verdict_of(labels):
    return verdict([result(rank, label) for rank, label in enumerate(labels)])


@pytest.mark.parametrize("first", STATES)
@pytest.mark.parametrize("second", STATES)
def test_two_ranks(first, second):
    assert verdict_of((first, second)) == sentence((first, second))


@pytest.mark.parametrize("first", STATES)
def test_three_ranks_in_any_order(first):
    for others in combinations_with_replacement(STATES, 2):
        labels = (first, *others)
        found = {verdict_of(order) for order in permutations(labels)}
        assert found == {sentence(labels)}, labels


@pytest.mark.parametrize("label", STATES)
def test_one_rank(label):
    assert verdict_of((label,)) == sentence((label,))


@pytest.mark.parametrize("added", STATES)
def test_no_further_report_turns_a_failing_verdict_into_a_passing_one(added):
    for labels in combinations_with_replacement(STATES, 2):
        if verdict_of(labels) not in GREEN:
            assert verdict_of((*labels, added)) not in GREEN, (*labels, added)


def test_green_is_said_by_every_rank_or_by_none():
    for labels in combinations_with_replacement(STATES, 3):
        if (word := verdict_of(labels)) in GREEN:
            said = {SAME.get(label, label) for label in labels} - {"died as declared"}
            assert said <= {word}, labels


def test_no_rank_at_all_is_no_pass():
    assert verdict([]) == "crashed"


@pytest.mark.parametrize("setup", ["passed", "skipped", "xfailed"])
@pytest.mark.parametrize("call", ["passed", "skipped", "xfailed"])
@pytest.mark.parametrize("counts", list(product(range(3), repeat=3)), ids=str)
def test_each_phase_is_reported_exactly_once_or_the_test_fails(setup, call, counts):
    def said(when, word):
        outcome = "skipped" if word == "xfailed" else word
        return phase(when, outcome, was_xfail="why" if word == "xfailed" else None)

    phases = [
        one
        for one, count in zip(
            (said("setup", setup), said("call", call), TEARDOWN), counts, strict=True
        )
        for _ in range(count)
    ]
    found = result_of(RankRun(rank=0, **finished(*phases)))
    is_complete = counts == ((1, 1, 1) if setup == "passed" else (1, 0, 1))
    expected = (call if setup == "passed" else setup) if is_complete else "crashed"
    assert verdict([found]) == expected
    assert verdict([found, found]) == expected
