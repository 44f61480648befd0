"""The table of features: every row of it is held by a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "explanation" / "other_harnesses.md"
ROW_TESTS = "tests/launch/test_forty_three_rows.py"
ROWS = 43
HARNESSES = 10


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_of_tests(path: Path) -> set[str]:
    """Return the names of a file's tests, methods with their class."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if hasattr(one, "name")}
    return found


def test_the_table_has_every_row_once_and_every_harness() -> None:
    assert [int(row[0]) for row in rows()] == list(range(1, ROWS + 1))
    assert {len(row) for row in rows()} == {HARNESSES + 4}
    assert {cell for row in rows() for cell in row[2:-2]} <= {"yes", "partly", "no", "wrong", "-"}


def test_every_yes_of_ours_is_held_by_a_test_that_exists() -> None:
    for number, _, *_, ours, shown_by in rows():
        if ours == "not yet":
            assert not shown_by
            continue
        assert ours.startswith("yes"), number
        test = shown_by.strip("`")
        path, _, name = test.partition("::") if "::" in test else (ROW_TESTS, "", test)
        assert name in names_of_tests(REPOSITORY / path), f"row {number}: {shown_by}"
