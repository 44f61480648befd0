"""The page on porting: what was green before fails after, and the rest goes on passing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "port_a_test_class.md"
TEXT = PAGE.read_text()
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
SHOWN = re.findall(r"^```text\n\$ pytest before.py\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)

pytest.importorskip("torch")


def outcomes(pytester, name: str, **files: str):
    for file, text in files.items():
        (pytester.path / f"{file}.py").write_text(text)
    return pytester.runpytest_subprocess("-p", "no:randomly", f"{name}.py")


def test_the_class_as_it_was_is_green_where_a_rank_died(pytester) -> None:
    pytest.importorskip("expecttest", reason="torch's test classes need expecttest")
    result = outcomes(pytester, "before", before=FILES["before"])
    result.assert_outcomes(passed=2)
    assert SHOWN[0].strip() == "2 passed"


def test_swapping_the_base_class_shows_the_death(pytester) -> None:
    removed, added = re.findall(r"^[-+](from .*)$", TEXT, re.MULTILINE)
    assert removed in FILES["before"]
    swapped = FILES["before"].replace(removed, added)
    result = outcomes(pytester, "before", before=swapped, ranks_case=FILES["ranks_case"])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([f"*{SHOWN[1].splitlines()[0].removeprefix('FAILED ')[:60]}*"])


def test_the_plain_class_says_the_same(pytester) -> None:
    result = outcomes(pytester, "after", after=FILES["after"])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*rank 1 of 2 failed first*exited with code 3 without a report*"])
