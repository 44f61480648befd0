from __future__ import annotations

from pytest_ranks.conformance.findings import Finding, Hypothesis, diagnose


def test_a_finding_reads_as_rule_numbers_cause():
    finding = Finding(
        "weights MUST be 1",
        "they are 2",
        tolerance="1e-5",
        cause="twice",
        where="a.py:3",
        reference="https://example.org/1",
        run="/runs/1",
    )
    assert finding.text("loss.x[single]").splitlines() == [
        "loss.x[single]: weights MUST be 1",
        "  found:     they are 2",
        "  tolerance: 1e-5",
        "  likely:    twice",
        "  where:     a.py:3",
        "  like:      https://example.org/1",
        "  run:       /runs/1",
    ]


def test_without_a_cause_it_says_so_and_long_details_come_last():
    text = Finding("train MUST return", "it raised\n\nTraceback:\n  line", tolerance="").text("a.b")
    assert text.splitlines() == [
        "a.b: train MUST return",
        "  found:     it raised",
        "  likely:    cause unknown",
        "Traceback:",
        "  line",
    ]


def test_the_best_hypothesis_is_named_with_its_match_and_its_rival():
    near = Hypothesis(cause="A", error=1e-8, reference="https://example.org/a")
    far = Hypothesis(cause="B", error=6e-2)
    assert diagnose([far, near]) == (
        "A (match 1e-08; next best hypothesis off by 6e-02)",
        "https://example.org/a",
    )


def test_no_hypothesis_is_named_when_none_matches():
    assert diagnose([Hypothesis(cause="B", error=6e-2, reference="https://example.org/b")]) == (
        "none of 1 known causes matches (nearest, off by 6e-02: B)",
        "",
    )
